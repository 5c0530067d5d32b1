"""What the data modules hand to the modules: one NamedTuple per kind of example.

Notation: B batch, T padded length, P padded prompt length. Every mask is boolean and True means "counts". Masks come
from lengths, never from comparing ids with the pad id, so models whose pad token is their EOS work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.host import alike, on_host, to_device


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
        prompt_lengths: tokens of the prompt that both sides begin with, `[B]`, int64; None where that is not known.
    """

    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    row_ids: Tensor
    margins: Tensor | None = None
    weights: Tensor | None = None
    prompt_lengths: Tensor | None = None


class RankingBatch(NamedTuple):
    """Prompts, each with all its responses, of which pairs are compared; padded on the right to one length T.

    Attributes:
        input_ids: prompt and each of K responses, every one of them once, `[B, K, T]`, int64.
        attention_mask: True for real tokens, `[B, K, T]`, bool; nowhere for what a prompt of fewer responses lacks.
        pairs: which of the K is chosen and which rejected in each pair, `[B, M, 2]`, int64; -1 for what a prompt of
            fewer than M pairs, of which each has one at least, lacks.
        row_ids: number of each prompt's row in its source, `[B]`, int64.
        margins: by how much the chosen score must lead, `[B, M]`, float32, in units of the raw score; None for 0.
        weights: how much each pair counts in the loss, `[B, M]`, float32, not negative; None where the pairs of a
            prompt count alike and 1 together.
        prompt_lengths: tokens of the prompt that its responses follow, `[B]`, int64; None where that is not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pairs: Tensor
    row_ids: Tensor
    margins: Tensor | None = None
    weights: Tensor | None = None
    prompt_lengths: Tensor | None = None


class RatedBatch(NamedTuple):
    """Prompts with a response that somebody has rated by K attributes, padded on the right.

    Attributes:
        input_ids: prompt and response, `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool.
        scores: what each response was rated, `[B, K]`, float32; anything finite where nobody has said.
        score_mask: True where somebody has, `[B, K]`, bool.
        row_ids: number of each row in its source, `[B]`, int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scores: Tensor
    score_mask: Tensor
    row_ids: Tensor


class Sources(NamedTuple):
    """Where the prompts of a batch come from.

    Attributes:
        names: of all sources of the data, the same in every batch.
        numbers: of each prompt's source among them, `[B]`, int64.
    """

    names: list[str]
    numbers: Tensor

    def are_among(self, names: Sequence[str]) -> Tensor:
        """Which prompts come from some sources, `[B]`, bool.

        Args:
            names: of the sources, as they are or as logs have them; those that are none of these have no prompts.
        """
        both = zip(self.names, log_names(self.names), strict=True)
        wanted = [number for number, called in enumerate(both) if {*called} & {*names}]
        return torch.isin(self.numbers, to_device(torch.tensor(wanted, dtype=torch.int64), self.numbers.device))


def log_names(names: Sequence[str]) -> list[str]:
    """Names that logs can hold, no two alike: of files without folders and endings where that tells them apart.

    Args:
        names: any texts.

    Example:
        >>> log_names(["data/helpful.jsonl", "openai/summarize-tldr"]), log_names(["a/x.csv", "b/x.csv", "b x.csv"])
        (['helpful', 'summarize_tldr'], ['a_x_csv', 'b_x_csv', 'b_x_csv_2'])
    """
    short = [name.rpartition("/")[2].partition(".")[0] for name in names]
    names = names if len(set(short)) < len(names) else short
    plain = [re.sub(r"\W+", "_", name).strip("_") or "source" for name in names]
    return [name if (again := plain[:i].count(name)) == 0 else f"{name}_{again + 1}" for i, name in enumerate(plain)]


class PromptBatch(NamedTuple):
    """Prompts to answer, padded on the left.

    Attributes:
        prompt_ids: token ids, `[B, P]`, int64.
        prompt_mask: True for real tokens, `[B, P]`, bool.
        prompts: the text of each prompt as it was tokenised, without special tokens.
        row_ids: number of each prompt's row in its source, `[B]`, int64.
        written: each prompt as its row wrote it, whole; what rewards are given. None where that is not known: they are
            then given `prompts`.
        sources: where each prompt comes from, if the data are a blend; None for one source.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompts: list[str]
    row_ids: Tensor
    written: list[WrittenPrompt] | None = None
    sources: Sources | None = None


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


TrainBatchT = TypeVar("TrainBatchT", bound=InstructionBatch | PreferenceBatch | RankingBatch | RatedBatch)
_PER_ROW = frozenset(("row_ids", "scores", "score_mask"))
"""Fields whose second dimension, if they have one, is not that of tokens."""


def length_sorted_pieces(
    lengths: Tensor,
    size: int | None,
    max_tokens: int | None,
    min_pieces: int = 1,
    sequences: Tensor | None = None,
) -> list[Tensor]:
    """Cut rows into pieces of similar length, longest first.

    Args:
        lengths: how wide each row is, `[N]`, integers; or `[N, S]` for rows of S parts that are padded apart, where a
            piece is as wide as the widest of each part together.
        size: rows in a piece at most; None for no such limit.
        max_tokens: rows times width of a piece at most, save that a row wider than that goes alone; None for no such
            limit.
        min_pieces: pieces at least, at most N; the largest are halved until there are as many.
        sequences: how many sequences of that width each row is, `[N]`, int64; None for one.

    Returns:
        Indices of the rows of each piece, int64, on the device of `lengths`.

    Example:
        >>> import torch
        >>> [piece.tolist() for piece in length_sorted_pieces(torch.tensor([2, 9, 3, 4]), None, 8)]
        [[1], [3, 2], [0]]
    """
    parts = on_host(lengths)[0].reshape(len(lengths), -1)
    of_rows = torch.ones(len(parts), dtype=torch.int64) if sequences is None else on_host(sequences)[0]
    order = (parts.sum(dim=1) * of_rows).argsort(descending=True, stable=True)
    widths, numbers = parts[order].tolist(), of_rows[order].tolist()
    counts = _greedy_counts(widths, numbers, size, max_tokens)
    while len(counts) < min_pieces:
        _halve_largest(counts, widths, numbers)
    return [to_device(rows, lengths.device) for rows in order.split(counts)]


def _greedy_counts(widths: list[list[int]], numbers: list[int], size: int | None, max_tokens: int | None) -> list[int]:
    """Rows of each piece when each takes as many of the next rows as it may."""
    counts: list[int] = []
    piece: list[int] = []  # width of each part
    sequences = 0  # of the piece
    for row, number in zip(widths, numbers, strict=True):
        wider = list(map(max, piece, row)) if piece else row
        full = not counts or counts[-1] == size
        if full or (max_tokens is not None and (sequences + number) * sum(wider) > max_tokens):
            counts.append(1)
            piece, sequences = row, number
        else:
            counts[-1] += 1
            piece, sequences = wider, sequences + number
    return counts


def _halve_largest(counts: list[int], widths: list[list[int]], numbers: list[int]) -> None:
    """Replace the piece of most tokens that has several rows by its two halves."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    tokens = [
        sum(numbers[start : start + count]) * sum(map(max, zip(*widths[start : start + count], strict=True)))
        if count > 1
        else -1
        for start, count in zip(starts, counts, strict=True)
    ]
    largest = tokens.index(max(tokens))
    count = counts[largest]
    if count == 1:
        raise ValueError("there are fewer rows than pieces to make; every process needs as many rows as the others")
    counts[largest : largest + 1] = [count - count // 2, count // 2]


def _places(batch: InstructionBatch | PreferenceBatch | RankingBatch | RatedBatch) -> int:
    if isinstance(batch, PreferenceBatch):
        return batch.chosen_ids.numel() + batch.rejected_ids.numel()
    return batch.input_ids.numel()


def micro_batches(
    batch: TrainBatchT,
    size: int | None = None,
    max_tokens: int | None = None,
    min_pieces: int = 1,
    lengths: Tensor | None = None,
) -> list[TrainBatchT]:
    """Cut a batch into pieces of rows of similar length, each as wide as its longest.

    The longest come first, so a run that does not fit in memory fails at its first backward pass. A loss that is a sum
    over tokens or pairs is the same whichever way the batch is cut.

    Args:
        batch: padded on the right; a packed row stays whole, and so does a prompt with all its responses.
        size: rows in a piece at most; None for no such limit.
        max_tokens: tokens of a piece at most, padding included, as in `length_sorted_pieces`; None for no such limit.
        min_pieces: pieces at least, at most the number of rows.
        lengths: tokens the model is shown for each row, `[B]`, int64; None for what is usual: a preference row is shown
            as two sequences as wide as the longer, a ranking as one of each response.

    Returns:
        The batch itself, uncut, where no limit is below it.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
        >>> pieces = micro_batches(InstructionBatch(mask.long(), mask, mask, torch.arange(3)), 2)
        >>> [(p.row_ids.tolist(), p.input_ids.shape[1]) for p in pieces]
        [([1, 2], 3), ([0], 1)]
    """
    if size is None and min_pieces == 1 and (max_tokens is None or _places(batch) <= max_tokens):
        return [batch]
    longest, sequences = _shown(batch)
    wide = (longest, sequences) if lengths is None else (on_host(lengths)[0], None)
    pieces: list[Any] = []
    for index in length_sorted_pieces(wide[0], size, max_tokens, min_pieces, wide[1]):
        width, there = int(longest[index].max()), to_device(index, batch.row_ids.device)
        rows = {name: _rows(field, there) for name, field in batch._asdict().items() if field is not None}
        pieces.append(type(batch)(**rows | {name: _columns(rows[name], width) for name in _per_token(batch, rows)}))
    return pieces


def _shown(batch: InstructionBatch | PreferenceBatch | RankingBatch | RatedBatch) -> tuple[Tensor, Tensor]:
    """Tokens of the longest sequence of each row, and how many sequences it is, both `[B]`, in the host's memory."""
    if isinstance(batch, PreferenceBatch):
        longest = torch.maximum(*(mask.sum(dim=1) for mask in on_host(batch.chosen_mask, batch.rejected_mask)))
        return longest, torch.full_like(longest, 2)
    if isinstance(batch, RankingBatch):
        tokens = on_host(batch.attention_mask)[0].sum(dim=2)  # [B, K]
        return tokens.amax(dim=1), (tokens > 0).sum(dim=1)
    longest = on_host(batch.attention_mask)[0].sum(dim=1)
    return longest, torch.ones_like(longest)


def _per_token(batch: Any, rows: dict[str, Tensor]) -> set[str]:
    """Names of the fields whose last dimension is T."""
    if isinstance(batch, RankingBatch):
        return {"input_ids", "attention_mask"}
    return {name for name, field in rows.items() if name not in _PER_ROW and field.dim() == 2}


def _rows(field: Tensor, index: Tensor) -> Tensor:
    return alike(lambda field, index: field[index], field, index)


def _columns(field: Tensor, width: int) -> Tensor:
    return alike(lambda field: field[..., :width], field)


def name_rows(row_ids: Tensor) -> str:
    """How error messages name the examples of a batch.

    Args:
        row_ids: any shape; negative numbers stand for no example.

    Example:
        >>> name_rows(torch.tensor([3, 7]))
        'rows 3, 7'
    """
    return "rows " + ", ".join(str(row) for row in on_host(row_ids)[0].flatten().tolist() if row >= 0)


def without_blanks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Predictions of real rows; a blank, which makes the processes' shares equal, has the row id -1.

    Args:
        rows: with their row ids as `row`.
    """
    return [row for row in rows if row["row"] >= 0]


def repeat_prompts(batch: PromptBatch, times: int) -> PromptBatch:
    """Each prompt several times, next to one another, for as many responses.

    Args:
        batch: B prompts.
        times: how often.

    Returns:
        B * times prompts; the batch itself for once.
    """
    if times == 1:
        return batch
    rows = torch.arange(len(batch.prompts)).repeat_interleave(times)
    order, there = rows.tolist(), to_device(rows, batch.row_ids.device)
    return PromptBatch(
        prompt_ids=batch.prompt_ids[there],
        prompt_mask=_rows(batch.prompt_mask, there),
        prompts=[batch.prompts[i] for i in order],
        row_ids=_rows(batch.row_ids, there),
        written=None if batch.written is None else [batch.written[i] for i in order],
        sources=None if batch.sources is None else batch.sources._replace(numbers=batch.sources.numbers[there]),
    )
