"""Parsed rows to encoded examples: tokenised in chunks, cut to the limits, everything left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from rlhf_lightning.data.chat import ChatEncoder, Rendered
from rlhf_lightning.data.collate import EncodedExample, EncodedPair, EncodedPrompt, EncodedSequence, pack_ids
from rlhf_lightning.data.limits import LongPrompts, TokenLimits, fit_prompt, fit_sequences
from rlhf_lightning.data.rows import Example, Pair, PromptRow, count_drop

RowT = TypeVar("RowT", bound=Example | Pair | PromptRow)
Rows = Iterable[tuple[RowT, Rendered]]
_CHUNK = 1000  # rows tokenised in one call; the tokenizer works on them in parallel


def encode_instructions(
    rows: Rows[Example], chat: ChatEncoder, limits: TokenLimits, counts: Counter[str]
) -> Iterator[EncodedExample]:
    """Prompt and response joined.

    Args:
        rows: examples with their rendered prompts.
        chat: turns text into ids.
        limits: what to cut to.
        counts: changed in place.
    """
    for row, prompt, (response,) in _fitted(rows, ("response",), chat, limits, counts):
        yield EncodedExample(pack_ids(prompt + response), len(prompt), row.row_id)


def encode_pairs(
    rows: Rows[Pair], chat: ChatEncoder, limits: TokenLimits, counts: Counter[str]
) -> Iterator[EncodedPair]:
    """Both responses, each behind the same prompt; pairs that the limits have made equal are dropped.

    Args:
        rows: pairs with their rendered prompts.
        chat: turns text into ids.
        limits: what to cut to.
        counts: changed in place.
    """
    for row, prompt, (chosen, rejected) in _fitted(rows, ("chosen", "rejected"), chat, limits, counts):
        if chosen == rejected:
            count_drop(counts, "chosen and rejected are the same after cutting")
        else:
            yield EncodedPair(pack_ids(prompt + chosen), pack_ids(prompt + rejected), len(prompt), row.row_id)


def encode_prompts(
    rows: Rows[RowT], chat: ChatEncoder, room: int, long_prompts: LongPrompts, counts: Counter[str]
) -> Iterator[EncodedPrompt]:
    """Prompts alone.

    Args:
        rows: anything with a prompt, rendered.
        chat: turns text into ids.
        room: tokens a prompt may have.
        long_prompts: what to do with longer ones.
        counts: changed in place.
    """
    for chunk in _chunks(rows):
        encoded = chat.encode_prompts([rendered.text for _, rendered in chunk])
        for (row, _), ids in zip(chunk, encoded, strict=True):
            kept = fit_prompt(ids, room, chat.prefix, long_prompts, counts)
            if kept is not None:
                yield EncodedPrompt(pack_ids(kept), chat.decode([kept])[0], row.row_id)


def encode_scored(
    rows: Rows[RowT], columns: tuple[str, ...], chat: ChatEncoder, limits: TokenLimits, counts: Counter[str]
) -> Iterator[EncodedSequence]:
    """One sequence for each response of every row.

    Args:
        rows: examples or pairs with their rendered prompts.
        columns: where their responses stand: `response`, or `chosen` and `rejected`.
        chat: turns text into ids.
        limits: what to cut to.
        counts: changed in place.
    """
    for row, prompt, responses in _fitted(rows, columns, chat, limits, counts):
        for column, response in zip(columns, responses, strict=True):
            yield scored_sequence(prompt, response, column, row.row_id, chat)


def scored_sequence(
    prompt: list[int], response: list[int], role: str, row_id: int, chat: ChatEncoder
) -> EncodedSequence:
    """A sequence to score, with the texts it stands for.

    Args:
        prompt: ids.
        response: ids.
        role: the column the response came from.
        row_id: of the row.
        chat: turns ids back into text.
    """
    texts = chat.decode([prompt, response])
    return EncodedSequence(pack_ids(prompt + response), texts[0], texts[1], role, row_id)


def drop_duplicates(prompts: Iterable[EncodedPrompt], counts: Counter[str]) -> Iterator[EncodedPrompt]:
    """Prompts that have not come before, by their ids; the others are counted.

    Args:
        prompts: encoded.
        counts: changed in place.
    """
    seen: set[bytes] = set()
    for prompt in prompts:
        key = pack_ids(list(prompt.ids)).tobytes()
        if key in seen:
            count_drop(counts, "prompt is a duplicate")
        else:
            seen.add(key)
            yield prompt


def _fitted(
    rows: Rows[RowT], columns: tuple[str, ...], chat: ChatEncoder, limits: TokenLimits, counts: Counter[str]
) -> Iterator[tuple[RowT, list[int], list[list[int]]]]:
    """Row, ids of its prompt and ids of its responses, cut to the limits, for the rows whose prompt is kept."""
    for chunk in _chunks(rows):
        prompts = chat.encode_prompts([rendered.text for _, rendered in chunk])
        by_column = [_responses(chunk, chat, column) for column in columns]
        for (row, _), prompt, *responses in zip(chunk, prompts, *by_column, strict=True):
            fitted = fit_sequences(prompt, responses, limits, chat.prefix, counts)
            if fitted is not None:
                yield row, fitted[0], fitted[1]


def _chunks(rows: Rows[RowT]) -> Iterator[list[tuple[RowT, Rendered]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _responses(chunk: list[tuple[RowT, Rendered]], chat: ChatEncoder, column: str) -> list[list[int]]:
    return chat.encode_responses([chat.response_text(getattr(row, column), rendered.kind) for row, rendered in chunk])
