"""Encoded examples to padded batches.

Notation as in `batches`: B examples, T longest sequence of the batch, P longest prompt. Masks come from lengths; the
filler id fills what they leave out and is never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.batches import InstructionBatch, PreferenceBatch, PromptBatch, ScoringBatch

LossOn = Literal["response", "all"]
Ids = Sequence[int] | np.ndarray


class EncodedExample(NamedTuple):
    """Prompt and response as one sequence of ids; the first `prompt_length` are the prompt."""

    ids: Ids
    prompt_length: int
    row_id: int


class EncodedPair(NamedTuple):
    """Two such sequences with the same prompt."""

    chosen_ids: Ids
    rejected_ids: Ids
    prompt_length: int
    row_id: int


class EncodedPrompt(NamedTuple):
    """A prompt's ids, and its text without special tokens."""

    ids: Ids
    text: str
    row_id: int


class EncodedSequence(NamedTuple):
    """A prompt and response to score, the texts of both, and the column the response came from."""

    ids: Ids
    prompt: str
    response: str
    role: str
    row_id: int


def pack_ids(ids: list[int]) -> np.ndarray:
    """Ids as they are kept in memory: 4 bytes a token instead of a Python object."""
    return np.asarray(ids, dtype=np.int32)


def pad(
    sequences: Sequence[Ids], filler: int, side: Literal["left", "right"], length: int = 0
) -> tuple[Tensor, Tensor]:
    """Stack sequences to one length.

    Args:
        sequences: B sequences of ids.
        filler: id for the padding.
        side: where the padding goes.
        length: pad to this at the least.

    Returns:
        Ids `[B, T]`, int64, and a mask `[B, T]`, True for real tokens.

    Example:
        >>> ids, mask = pad([[5, 6], [7]], filler=0, side="left")
        >>> ids.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[True, True], [False, True]])
    """
    total = max(length, max(len(ids) for ids in sequences))
    out = torch.full((len(sequences), total), filler, dtype=torch.int64)
    mask = torch.zeros(len(sequences), total, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        place = slice(total - len(ids), total) if side == "left" else slice(0, len(ids))
        out[row, place] = torch.as_tensor(ids, dtype=torch.int64)
        mask[row, place] = True
    return out, mask


def collate_instructions(
    examples: Sequence[EncodedExample], filler: int, loss_on: LossOn = "response"
) -> InstructionBatch:
    """Examples to teach, padded on the right.

    Args:
        examples: B of them.
        filler: id for the padding.
        loss_on: teach the tokens of the response, or every token but the first.
    """
    ids, mask = pad([example.ids for example in examples], filler, "right")
    starts = [example.prompt_length if loss_on == "response" else 1 for example in examples]
    taught = mask & (torch.arange(ids.shape[1]) >= torch.tensor(starts).unsqueeze(1))
    return InstructionBatch(ids, mask, taught, _row_ids(examples))


def collate_pairs(examples: Sequence[EncodedPair], filler: int) -> PreferenceBatch:
    """Pairs, both sides padded on the right to the longest sequence of either.

    Args:
        examples: B of them.
        filler: id for the padding.
    """
    length = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in examples)
    chosen = pad([pair.chosen_ids for pair in examples], filler, "right", length)
    rejected = pad([pair.rejected_ids for pair in examples], filler, "right", length)
    return PreferenceBatch(*chosen, *rejected, _row_ids(examples))


def collate_prompts(examples: Sequence[EncodedPrompt], filler: int) -> PromptBatch:
    """Prompts, padded on the left.

    Args:
        examples: B of them.
        filler: id for the padding.
    """
    ids, mask = pad([example.ids for example in examples], filler, "left")
    return PromptBatch(ids, mask, [example.text for example in examples], _row_ids(examples))


def collate_sequences(examples: Sequence[EncodedSequence], filler: int) -> ScoringBatch:
    """Sequences to score, padded on the right.

    Args:
        examples: B of them.
        filler: id for the padding.
    """
    ids, mask = pad([example.ids for example in examples], filler, "right")
    prompts, responses = [example.prompt for example in examples], [example.response for example in examples]
    return ScoringBatch(ids, mask, prompts, responses, [example.role for example in examples], _row_ids(examples))


def _row_ids(
    examples: Sequence[EncodedExample] | Sequence[EncodedPair] | Sequence[EncodedPrompt] | Sequence[EncodedSequence],
) -> Tensor:
    return torch.tensor([example.row_id for example in examples], dtype=torch.int64)
