"""Encoded examples to padded batches.

Notation as in `batches`: B examples, T longest sequence of the batch, P longest prompt. Masks come from lengths; the
id `filler` fills what they leave out and is never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.batches import (
    InstructionBatch,
    PreferenceBatch,
    PromptBatch,
    RankingBatch,
    RatedBatch,
    ScoringBatch,
    Sources,
)
from rlhf_lightning.chat.written import WrittenPrompt

LossOn = Literal["response", "turns", "all"]
Ids = Sequence[int] | np.ndarray


class EncodedExample(NamedTuple):
    """Prompt and response as one sequence of ids.

    Attributes:
        ids: of both, joined.
        prompt_length: how many of them are the prompt.
        row_id: number of the row in its source; -1 for a blank, which counts for nothing.
        turns: where the assistant spoke earlier in the prompt: first token, token after the last, and so on.
    """

    ids: Ids
    prompt_length: int
    row_id: int
    turns: Ids = ()


class EncodedPair(NamedTuple):
    """Two such sequences with the same prompt.

    Attributes:
        chosen_ids: of prompt and preferred response.
        rejected_ids: of prompt and other response.
        prompt_length: how many of either are the prompt.
        row_id: number of the row in its source.
        margin: by how much the chosen one was preferred, 0 where nobody said.
        weight: how much the pair counts.
    """

    chosen_ids: Ids
    rejected_ids: Ids
    prompt_length: int
    row_id: int
    margin: float = 0.0
    weight: float = 1.0


class EncodedRanking(NamedTuple):
    """All responses to one prompt, and the pairs of them that are compared.

    Attributes:
        sequences: prompt and each response, each once.
        pairs: which of them is chosen and which rejected, of each pair; one at least.
        prompt_length: how many ids of each are the prompt.
        row_id: number of the row in its source.
        margins: of each pair, as in `EncodedPair`.
        weights: likewise.
    """

    sequences: Sequence[Ids]
    pairs: Sequence[tuple[int, int]]
    prompt_length: int
    row_id: int
    margins: Sequence[float]
    weights: Sequence[float]


class EncodedRating(NamedTuple):
    """A prompt and a response as one sequence of ids, and what the response was rated.

    Attributes:
        ids: of both, joined.
        prompt_length: how many of them are the prompt.
        row_id: number of the row in its source; -1 for a blank, which counts for nothing.
        scores: one number for each attribute, NaN where nobody has said.
    """

    ids: Ids
    prompt_length: int
    row_id: int
    scores: Sequence[float] | np.ndarray


class EncodedPrompt(NamedTuple):
    """A prompt's ids, its text without special tokens, how its row wrote it, where that is known, and its source."""

    ids: Ids
    text: str
    row_id: int
    written: WrittenPrompt | None = None
    source: int = 0


class EncodedSequence(NamedTuple):
    """A prompt and response to score, the texts of both, and the column the response came from."""

    ids: Ids
    prompt: str
    response: str
    role: str
    row_id: int


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
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r} is neither left nor right")
    total = max(length, max(len(ids) for ids in sequences))
    # Filled in numpy, because memory-mapped ids are read-only, which torch.as_tensor warns about.
    out = np.full((len(sequences), total), filler, dtype=np.int64)
    mask = np.zeros((len(sequences), total), dtype=np.bool_)
    for row, ids in enumerate(sequences):
        place = slice(total - len(ids), total) if side == "left" else slice(0, len(ids))
        out[row, place] = ids
        mask[row, place] = True
    return torch.from_numpy(out), torch.from_numpy(mask)


def taught_tokens(example: EncodedExample, loss_on: LossOn) -> np.ndarray:
    """Which tokens of an example are targets, `[T]`, bool; the first never is, since nothing predicts it.

    Of a blank, whose row id is negative, none is.

    Args:
        example: prompt and response.
        loss_on: `response`, the response alone; `turns`, also what the assistant said earlier in the prompt; `all`,
            every token.

    Example:
        >>> taught_tokens(EncodedExample([1, 5, 6, 7, 8, 2], 4, 0, turns=[1, 3]), "turns").tolist()
        [False, True, True, False, True, True]
    """
    if loss_on not in ("response", "turns", "all"):
        raise ValueError(f"loss_on {loss_on!r} is none of response, turns and all")
    taught = np.zeros(len(example.ids), dtype=np.bool_)
    if example.row_id < 0:
        return taught
    taught[0 if loss_on == "all" else example.prompt_length :] = True
    if loss_on == "turns":
        for start, end in zip(example.turns[::2], example.turns[1::2], strict=True):
            taught[start:end] = True
    taught[:1] = False
    return taught


def collate_instructions(
    examples: Sequence[EncodedExample], filler: int, loss_on: LossOn = "response"
) -> InstructionBatch:
    """Examples to teach, padded on the right."""
    ids, mask = pad([example.ids for example in examples], filler, "right")
    taught, _ = pad([taught_tokens(example, loss_on) for example in examples], 0, "right")
    return InstructionBatch(ids, mask, taught.bool(), _row_ids(examples))


def collate_packed(
    packed: Sequence[Sequence[EncodedExample]], filler: int, loss_on: LossOn = "response"
) -> InstructionBatch:
    """Examples to teach, several in each row, with positions that restart at each.

    The first token of an example is never a target, so nothing is predicted across a border.
    """
    ids, mask = pad([np.concatenate([example.ids for example in row]) for row in packed], filler, "right")
    taught, _ = pad(
        [np.concatenate([taught_tokens(example, loss_on) for example in row]) for row in packed], 0, "right"
    )
    positions, _ = pad([np.concatenate([np.arange(len(example.ids)) for example in row]) for row in packed], 0, "right")
    row_ids, _ = pad([[example.row_id for example in row] for row in packed], -1, "right")
    return InstructionBatch(ids, mask, taught.bool(), row_ids, positions)


def collate_pairs(examples: Sequence[EncodedPair], filler: int) -> PreferenceBatch:
    """Pairs, both sides padded on the right to the longest sequence of either."""
    length = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in examples)
    chosen_ids, chosen_mask = pad([pair.chosen_ids for pair in examples], filler, "right", length)
    rejected_ids, rejected_mask = pad([pair.rejected_ids for pair in examples], filler, "right", length)
    return PreferenceBatch(
        chosen_ids=chosen_ids,
        chosen_mask=chosen_mask,
        rejected_ids=rejected_ids,
        rejected_mask=rejected_mask,
        row_ids=_row_ids(examples),
        margins=torch.tensor([pair.margin for pair in examples], dtype=torch.float32),
        weights=torch.tensor([pair.weight * (pair.row_id >= 0) for pair in examples], dtype=torch.float32),
        prompt_lengths=torch.tensor([pair.prompt_length for pair in examples], dtype=torch.int64),
    )


def collate_rankings(examples: Sequence[EncodedRanking], filler: int) -> RankingBatch:
    """Rankings, all sequences padded on the right to the longest, all prompts to the most responses and pairs."""
    shape = len(examples), max(len(example.sequences) for example in examples)
    width = max(len(ids) for example in examples for ids in example.sequences)
    input_ids = torch.full((*shape, width), filler, dtype=torch.int64)
    mask = torch.zeros((*shape, width), dtype=torch.bool)
    most = max(len(example.pairs) for example in examples)
    pairs = torch.full((shape[0], most, 2), -1, dtype=torch.int64)
    margins, weights = torch.zeros(shape[0], most), torch.zeros(shape[0], most)
    for row, example in enumerate(examples):
        ids, real = pad(example.sequences, filler, "right", width)
        input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, real
        there = slice(len(example.pairs))
        pairs[row, there] = torch.tensor(example.pairs)
        margins[row, there] = torch.tensor(example.margins, dtype=torch.float32)
        weights[row, there] = torch.tensor(example.weights, dtype=torch.float32) * (example.row_id >= 0)
    return RankingBatch(
        input_ids=input_ids,
        attention_mask=mask,
        pairs=pairs,
        row_ids=_row_ids(examples),
        margins=margins,
        weights=weights,
        prompt_lengths=torch.tensor([example.prompt_length for example in examples], dtype=torch.int64),
    )


def collate_ratings(examples: Sequence[EncodedRating], filler: int) -> RatedBatch:
    """Rated responses, padded on the right; of a blank no score counts."""
    ids, mask = pad([example.ids for example in examples], filler, "right")
    scores = torch.from_numpy(np.stack([np.asarray(example.scores, dtype=np.float32) for example in examples]))
    row_ids = torch.tensor([example.row_id for example in examples], dtype=torch.int64)
    said = ~scores.isnan() & (row_ids >= 0).unsqueeze(1)  # [B, K]
    return RatedBatch(ids, mask, scores.nan_to_num(0.0), said, row_ids)


def collate_prompts(
    examples: Sequence[EncodedPrompt], filler: int, source_names: Sequence[str] | None = None
) -> PromptBatch:
    """Prompts, padded on the left, and where there are several sources, those that they come from."""
    ids, mask = pad([example.ids for example in examples], filler, "left")
    written = [example.written for example in examples if example.written is not None]
    all_written = written if len(written) == len(examples) else None
    sources = None
    if source_names is not None:
        numbers = torch.tensor([example.source for example in examples], dtype=torch.int64)
        sources = Sources(list(source_names), numbers)
    texts = [example.text for example in examples]
    return PromptBatch(ids, mask, texts, _row_ids(examples), all_written, sources)


def collate_sequences(examples: Sequence[EncodedSequence], filler: int) -> ScoringBatch:
    """Sequences to score, padded on the right."""
    ids, mask = pad([example.ids for example in examples], filler, "right")
    prompts, responses = [example.prompt for example in examples], [example.response for example in examples]
    return ScoringBatch(ids, mask, prompts, responses, [example.role for example in examples], _row_ids(examples))


def _row_ids(
    examples: Sequence[EncodedExample]
    | Sequence[EncodedPair]
    | Sequence[EncodedRanking]
    | Sequence[EncodedPrompt]
    | Sequence[EncodedSequence],
) -> Tensor:
    return torch.tensor([example.row_id for example in examples], dtype=torch.int64)
