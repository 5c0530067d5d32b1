"""How long a sequence may be, and what gives way when it is longer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.rows import count_drop
from rlhf_lightning.errors import UserError

LongPrompts = Literal["cut", "drop"]


class TokenLimits(NamedTuple):
    """Limits in tokens, special tokens included.

    Attributes:
        max_length: of prompt and response together.
        max_prompt_length: of the prompt; None leaves it what the response does not need.
        min_response_length: how much of a response must have room at the least, whatever the prompt.
        long_prompts: cut a prompt that is too long from the left, or drop the example.
    """

    max_length: int
    max_prompt_length: int | None
    min_response_length: int
    long_prompts: LongPrompts

    @classmethod
    def checked(
        cls,
        max_length: int,
        max_prompt_length: int | None,
        min_response_length: int | None,
        long_prompts: LongPrompts,
    ) -> TokenLimits:
        """Limits that make sense together.

        Args:
            max_length: see the class.
            max_prompt_length: see the class.
            min_response_length: see the class; None means a quarter of `max_length`.
            long_prompts: see the class.

        Raises:
            UserError: a limit below 1, or one that leaves no room for the other part.
        """
        check_positive(max_length=max_length, max_prompt_length=max_prompt_length)
        check_positive(min_response_length=min_response_length)
        if max_prompt_length is not None and max_prompt_length >= max_length:
            raise UserError(
                f"max_prompt_length ({max_prompt_length}) must be below max_length ({max_length}), "
                "which counts prompt and response together"
            )
        if min_response_length is None:
            min_response_length = max(1, max_length // 4)
        if min_response_length >= max_length:
            raise UserError(f"min_response_length ({min_response_length}) must be below max_length ({max_length})")
        return cls(max_length, max_prompt_length, min_response_length, long_prompts)

    def prompt_room(self, response_length: int) -> int:
        """How many tokens a prompt may have before a response of this length."""
        room = self.max_length - min(response_length, self.min_response_length)
        return room if self.max_prompt_length is None else min(room, self.max_prompt_length)


def check_positive(**values: int | None) -> None:
    """Refuse numbers below 1 by name; None passes.

    Args:
        values: name and number.

    Raises:
        UserError: the first number below 1.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")


def check_context(tokenizer: PreTrainedTokenizerBase, name: str, length: int) -> None:
    """Refuse a limit beyond the context of the model that lies in the tokenizer's folder, if one does.

    Args:
        tokenizer: loaded from anywhere.
        name: of the limit.
        length: its value, in tokens.

    Raises:
        UserError: the model has fewer positions than that.
    """
    config = Path(tokenizer.name_or_path or "", "config.json")
    if not config.is_file():
        return
    context = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    if context is not None and length > context:
        raise UserError(f"{name} ({length}) is beyond the {context} positions of {tokenizer.name_or_path}; lower it")


def cut_prompt(ids: list[int], room: int, prefix: list[int]) -> list[int]:
    """The end of a prompt, behind its leading special tokens.

    Args:
        ids: of the prompt.
        room: tokens it may have.
        prefix: the ids every sequence begins with, kept.

    Example:
        >>> cut_prompt([1, 10, 11, 12, 13], 3, prefix=[1])
        [1, 12, 13]
    """
    if len(ids) <= room:
        return ids
    kept = prefix[:room]
    return kept + ids[len(ids) - (room - len(kept)) :]


def fit_prompt(
    ids: list[int], room: int, prefix: list[int], long_prompts: LongPrompts, counts: Counter[str]
) -> list[int] | None:
    """A prompt that fits, or None where it is dropped; either is counted.

    Args:
        ids: of the prompt.
        room: tokens it may have.
        prefix: the ids every sequence begins with.
        long_prompts: what to do with a prompt that is too long.
        counts: changed in place.
    """
    if len(ids) <= room:
        return ids
    if long_prompts == "drop":
        count_drop(counts, "prompt is too long")
        return None
    counts["cut: prompt"] += 1
    return cut_prompt(ids, room, prefix)


def fit_sequences(
    prompt: list[int], responses: list[list[int]], limits: TokenLimits, prefix: list[int], counts: Counter[str]
) -> tuple[list[int], list[list[int]]] | None:
    """A prompt and its responses, cut to the limits; None where the prompt is too long and dropped.

    A response that does not fit loses its end, and with it its EOS, so it is never taught as complete.

    Args:
        prompt: ids, the leading special tokens included.
        responses: ids, the EOS included; all to the same prompt, which is cut alike for all.
        limits: what to obey.
        prefix: the ids every sequence begins with.
        counts: what is cut or dropped is counted here.
    """
    room = limits.prompt_room(max(len(ids) for ids in responses))
    kept = fit_prompt(prompt, room, prefix, limits.long_prompts, counts)
    if kept is None:
        return None
    left = limits.max_length - len(kept)
    counts["cut: response"] += sum(len(ids) > left for ids in responses)
    return kept, [ids[:left] for ids in responses]
