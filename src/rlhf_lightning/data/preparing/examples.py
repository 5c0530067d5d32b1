"""Rows as ids to the examples of each kind, for what is written to disk and what is streamed alike."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from rlhf_lightning.data.collate import EncodedExample, EncodedPair, EncodedPrompt, EncodedRating
from rlhf_lightning.data.encode import EncodedRow, written_prompt
from rlhf_lightning.data.preparing.filters import hash_of_ids
from rlhf_lightning.data.preparing.reading import Item, RowReader
from rlhf_lightning.data.rows import Need, Row

DUPLICATE = "prompt is a duplicate"
FURTHER = "further pairs of rankings"


class ExampleMaker:
    """Makes the examples of the rows of one source, each prompt alone only once, and counts what comes of them.

    Args:
        reader: reads the rows, and counts.
        remove_same: leave out pairs that the limits have made equal.
    """

    def __init__(self, reader: RowReader, remove_same: bool) -> None:
        self._reader, self._remove_same = reader, remove_same
        self._prompts: set[int] = set()

    def examples(self, item: Item, ids: EncodedRow) -> dict[Need, list[Any]]:
        """The examples of a row by kind; none, where it is counted as dropped after all."""
        row, counts = item.row, self._reader.counts
        examples: dict[Need, list[Any]] = {}
        lost = known = ""
        if "finetune" in item.kinds:
            whole = np.concatenate([ids.prompt, ids.responses[0]])
            examples["finetune"] = [EncodedExample(whole, len(ids.prompt), row.row_id, ids.turns)]
        if "rated" in item.kinds:
            whole = np.concatenate([ids.prompt, ids.responses[0]])
            examples["rated"] = [EncodedRating(whole, len(ids.prompt), row.row_id, row.scores)]
        if "preference" in item.kinds:
            if pairs := ranked_pairs(row, ids, self._remove_same):
                examples["preference"] = pairs
            else:
                lost = _no_pairs(row)
                self._reader.unfit["preference"][lost] += 1
        if "prompts" in item.kinds:
            asked = ids.prompt if ids.asked is None else ids.asked
            if self._came_before(asked):
                known = DUPLICATE
            else:
                examples["prompts"] = [EncodedPrompt(asked, "", row.row_id, written_prompt(row), row.source)]
        if not examples:
            self._reader.drop_kept(known or lost, item, ids)
            return examples
        if lost:
            counts.lacking[lost] += 1
        if known:
            counts.others[DUPLICATE] += 1
        if (count := len(examples.get("preference", ()))) > 1:
            counts.others[FURTHER] += count - 1
        return examples

    def _came_before(self, prompt: np.ndarray) -> bool:
        number = hash_of_ids(prompt)
        before = number in self._prompts
        self._prompts.add(number)
        return before


def ranked_pairs(row: Row, ids: EncodedRow, remove_same: bool) -> list[EncodedPair]:
    """All pairs of a ranking, which together count as much as one row (Ouyang et al. 2022, section 3.5).

    Args:
        row: its ranks and weight. Ties make no pair; with a `tie_margin`, two of half the weight, one either way round.
        ids: with each response at the rank of the same number.
        remove_same: leave out pairs of equal ids.
    """
    ranks, responses = row.ranks or range(len(ids.responses)), ids.responses
    pairs: list[tuple[int, int, float, float]] = []  # better, worse, margin, share
    for a, b in combinations(range(len(responses)), 2):
        if remove_same and np.array_equal(responses[a], responses[b]):
            continue
        if ranks[a] != ranks[b]:
            pairs.append((*((a, b) if ranks[a] < ranks[b] else (b, a)), row.margin, 1.0))
        elif row.tie_margin is not None:
            pairs += [(a, b, row.tie_margin, 0.5), (b, a, row.tie_margin, 0.5)]
    wholes = [np.concatenate([ids.prompt, response]) for response in responses]
    count = sum(share for *_, share in pairs)
    return [
        EncodedPair(wholes[better], wholes[worse], len(ids.prompt), row.row_id, margin, row.weight * share / count)
        for better, worse, margin, share in pairs
    ]


def _no_pairs(row: Row) -> str:
    tied = len(row.ranks) > 1 and len(set(row.ranks)) == 1
    return "no response ranks above another" if tied else "chosen and rejected are the same after cutting"
