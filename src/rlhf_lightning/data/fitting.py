"""Whether data fit the model that lies in the folder of their tokenizer.

Apart from the limits of rows, which processes that only tokenise need, too: reading a model's config takes Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.capacity import RESIZE, context_length
from rlhf_lightning.models.adapter_folders import folder_config


def check_context(tokenizer: PreTrainedTokenizerBase, name: str, length: int, cure: str = "lower it to") -> None:
    """Refuse a limit beyond the context of the model that lies in the tokenizer's folder, if one does.

    Args:
        tokenizer: loaded from anywhere.
        name: of the limit.
        length: its value, in tokens.
        cure: what to do; the positions follow.

    Raises:
        UserError: the model has fewer positions than that.
    """
    config = folder_config(tokenizer.name_or_path or "")
    context = None if config is None else context_length(config)
    if context is not None and length > context:
        said = f"{name} ({length}) is beyond the {context} positions of {tokenizer.name_or_path}"
        raise UserError(f"{said}; {cure} {context}")


def check_ids(tokenizer: PreTrainedTokenizerBase, largest_id: Callable[[], int]) -> None:
    """Refuse data with ids that the model in the tokenizer's folder, if one lies there, has no embedding for.

    Args:
        tokenizer: that made the data; with fewer tokens than the model has embeddings it cannot go wrong.
        largest_id: looks for the largest id of the data.

    Raises:
        UserError: names the token.
    """
    config = folder_config(tokenizer.name_or_path or "")
    rows = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if rows is None or len(tokenizer) <= rows or (found := largest_id()) < rows:
        return
    token = tokenizer.convert_ids_to_tokens(found)
    raise UserError(
        f"the data hold the token '{token}' (id {found}), but the model of {tokenizer.name_or_path} has {rows} "
        f"embeddings; {RESIZE}"
    )
