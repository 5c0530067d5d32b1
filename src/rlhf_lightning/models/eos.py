"""Which ids end a response: the one rule for generation, PPO and exports."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.templates import turn_ends
from rlhf_lightning.errors import UserError


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None = None) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS, those of the generation config and of the chat template.

    Args:
        tokenizer: the policy's tokenizer, with the chat template that its data were written by.
        generation_eos: `generation_config.eos_token_id` of the model.

    Raises:
        UserError: there is none, so no response could ever end.
    """
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    extra = [generation_eos] if isinstance(generation_eos, int) else (generation_eos or [])
    ids += [i for i in dict.fromkeys([*extra, *turn_ends(tokenizer)]) if i not in ids]
    if not ids:
        raise UserError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no EOS token, so no response could end; set one"
        )
    return ids
