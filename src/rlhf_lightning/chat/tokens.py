"""What a tokenizer writes unasked, and what its vocabulary keeps for special use."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

RESERVED = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>")
"""Tokens that vocabularies carry for this purpose or that ordinary text never contains, most fitting first."""


def default_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids a tokenizer puts before a text unasked: its BOS, or nothing."""
    with_special = tokenizer("x").input_ids
    plain = tokenizer("x", add_special_tokens=False).input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []
