"""How long a sequence may be, and what gives way when it is longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_lightning.arguments import AT_LEAST_1, SHARE_BELOW_1, check_arguments
from rlhf_lightning.errors import UserError

_COUNTS = ("max_length", "max_prompt_length", "response_room", "num_samples", "num_proc")
_BATCHES = ("batch_size", "eval_batch_size", "rollout_batch_size")
RANGES = {
    **dict.fromkeys((*_COUNTS, *_BATCHES), AT_LEAST_1),
    **dict.fromkeys(("validation_split", "test_split"), SHARE_BELOW_1),
}
"""What numbers may be, for `check_arguments`, wherever data are prepared or batched; all others are at least 0."""


@dataclass(frozen=True)
class TokenLimits:
    """Limits in tokens, special tokens included.

    Args:
        max_length: of prompt and response together.
        max_prompt_length: of the prompt; None leaves it what the response does not need.
        response_room: how much of a response must have room at the least, whatever the prompt; by default a quarter of
            `max_length`.
        long_prompts: cut a prompt that is too long, or drop the row.
        minimum_response_length: rows with a response of fewer tokens are dropped; the EOS does not count.

    Raises:
        UserError: a limit below 1, or one that leaves no room for the other part.
    """

    max_length: int
    max_prompt_length: int | None = None
    response_room: int | None = None
    long_prompts: Literal["cut", "drop"] = "cut"
    minimum_response_length: int = 0

    def __post_init__(self) -> None:
        check_arguments(TokenLimits, vars(self), RANGES)
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "which counts prompt and response together"
            )
        for name, value in (
            ("response_room", self.kept_room),
            ("minimum_response_length", self.minimum_response_length),
        ):
            if value >= self.max_length:
                raise UserError(f"{name} ({value}) must be below max_length ({self.max_length})")

    @property
    def kept_room(self) -> int:
        """Tokens of a response that have room whatever the prompt."""
        return max(1, self.max_length // 4) if self.response_room is None else self.response_room

    def prompt_room(self, response_lengths: Sequence[int]) -> int:
        """How many tokens a prompt may have before responses of these lengths; before none, `kept_room` is left."""
        room = self.max_length - min(max(response_lengths, default=self.kept_room), self.kept_room)
        return room if self.max_prompt_length is None else min(room, self.max_prompt_length)


def cut_prompt(ids: np.ndarray, turns: np.ndarray, room: int, prefix: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The end of a prompt, behind its leading special tokens.

    Args:
        ids: of the prompt, which begins with `prefix`.
        turns: parts of it, first token and one after the last of each; those cut away are left out.
        room: tokens it may have.
        prefix: the ids every sequence begins with, kept.

    Returns:
        Ids and turns of what is left.

    Example:
        >>> ids, turns = np.array([1, 10, 11, 12, 13]), np.array([1, 2, 3, 4])
        >>> [part.tolist() for part in cut_prompt(ids, turns, 3, prefix=[1])]
        [[1, 12, 13], [1, 2]]
    """
    removed = len(ids) - room
    if removed <= 0:
        return ids, turns
    kept = min(len(prefix), room)
    left = np.maximum(turns.reshape(-1, 2) - removed, kept)
    left = left[left[:, 0] < left[:, 1]]
    return np.concatenate([ids[:kept], ids[kept + removed :]]), left.reshape(-1)
