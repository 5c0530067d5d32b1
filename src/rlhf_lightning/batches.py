"""What the data modules hand to the modules: one NamedTuple per kind of example.

Notation: B batch, T padded length, P padded prompt length. Every mask is boolean and True means "counts". Masks come
from lengths, never from comparing ids with the pad id, so models whose pad token is their EOS work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from torch import Tensor


class InstructionBatch(NamedTuple):
    """Prompt and response as one sequence, or several such examples packed in a row; padded on the right.

    Attributes:
        input_ids: token ids, `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool.
        loss_mask: True for tokens the model is taught to produce, `[B, T]`, bool. `loss_mask[b, t]` speaks of token t
            as a *target*, predicted from the tokens before it; the first token of an example is never one.
        row_ids: number of each example's row in its source, int64; named in error messages. `[B]`, or `[B, E]` for
            packed rows, -1 where a row holds fewer than E examples.
        position_ids: place of each token in its own example, `[B, T]`, int64, 0 on padding, for packed rows; None
            where every row holds one example.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    row_ids: Tensor
    position_ids: Tensor | None = None


class PreferenceBatch(NamedTuple):
    """Chosen and rejected sequences of the same prompts, both padded on the right to one length T.

    Attributes:
        chosen_ids: prompt and chosen response, `[B, T]`, int64.
        chosen_mask: True for real tokens, `[B, T]`, bool.
        rejected_ids: prompt and rejected response, `[B, T]`, int64.
        rejected_mask: True for real tokens, `[B, T]`, bool.
        row_ids: number of each pair's row in its source, `[B]`, int64.
        margins: by how much the chosen score must lead, `[B]`, float32, in units of the raw score; None for 0.
        weights: how much each pair counts in the loss, `[B]`, float32, not negative; None for 1.
    """

    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    row_ids: Tensor
    margins: Tensor | None = None
    weights: Tensor | None = None


class PromptBatch(NamedTuple):
    """Prompts to answer, padded on the left.

    Attributes:
        prompt_ids: token ids, `[B, P]`, int64.
        prompt_mask: True for real tokens, `[B, P]`, bool.
        prompts: the text of each prompt as it was tokenised, without special tokens; what reward functions see.
        row_ids: number of each prompt's row in its source, `[B]`, int64.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompts: list[str]
    row_ids: Tensor


class ScoringBatch(NamedTuple):
    """Whole sequences to be scored by a reward model, padded on the right.

    Attributes:
        input_ids: prompt and response, `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool.
        prompts: the text of each prompt.
        responses: the text of each response.
        roles: which column each response came from: `response`, `chosen` or `rejected`.
        row_ids: number of each sequence's row in its source, `[B]`, int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[str]
    responses: list[str]
    roles: list[str]
    row_ids: Tensor


BatchT = TypeVar("BatchT", InstructionBatch, PreferenceBatch, PromptBatch, ScoringBatch)
TrainBatchT = TypeVar("TrainBatchT", InstructionBatch, PreferenceBatch)


def split_batch(batch: BatchT, size: int) -> Iterator[BatchT]:
    """Cut a batch into consecutive pieces of at most `size` examples; the last may be smaller.

    Example:
        >>> import torch
        >>> ids, mask = torch.arange(6).view(3, 2), torch.ones(3, 2, dtype=torch.bool)
        >>> pieces = list(split_batch(InstructionBatch(ids, mask, mask, torch.arange(3)), 2))
        >>> [p.row_ids.tolist() for p in pieces]
        [[0, 1], [2]]
    """
    for start in range(0, len(batch.row_ids), size):
        pieces: Any = [None if field is None else field[start : start + size] for field in batch]
        yield type(batch)(*pieces)


def micro_batches(batch: TrainBatchT, size: int | None) -> list[TrainBatchT]:
    """Cut a batch into pieces of at most `size` rows of similar length, each as wide as its longest.

    The longest come first, so a run that does not fit in memory fails at its first backward pass. A loss that is a sum
    over tokens or pairs is the same whichever way the batch is cut.

    Args:
        batch: padded on the right; a packed row stays whole.
        size: None leaves the batch whole.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
        >>> pieces = micro_batches(InstructionBatch(mask.long(), mask, mask, torch.arange(3)), 2)
        >>> [(p.row_ids.tolist(), p.input_ids.shape[1]) for p in pieces]
        [([1, 2], 3), ([0], 1)]
    """
    if size is None:
        return [batch]
    mask = batch.attention_mask if isinstance(batch, InstructionBatch) else batch.chosen_mask | batch.rejected_mask
    lengths, order = mask.sum(dim=1).sort(descending=True, stable=True)
    pieces: list[Any] = []
    for index, width in zip(order.split(size), lengths[::size].tolist(), strict=True):
        rows = {name: field[index] for name, field in batch._asdict().items() if field is not None}
        per_token = {name: field[:, :width] for name, field in rows.items() if name != "row_ids" and field.dim() == 2}
        pieces.append(type(batch)(**rows | per_token))
    return pieces
