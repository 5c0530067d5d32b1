"""Chat templates of tokenizers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer a chat template, which it then carries into every folder it is saved to.

    Args:
        tokenizer: changed in place.
        template: path of a Jinja file, or the template itself.

    Raises:
        UserError: no such file.
    """
    if "{" not in template:
        path = Path(template).expanduser()
        if not path.is_file():
            raise UserError(f"chat_template: {template} does not exist; give a Jinja file or the template itself")
        template = path.read_text(encoding="utf-8")
    tokenizer.chat_template = template
