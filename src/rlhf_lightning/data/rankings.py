"""The pairs of a ranking put together again, so that a batch holds each of its responses once.

Prepared tokens hold all pairs of a row one after the other, whichever way they are going to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_lightning.data.collate import EncodedPair, EncodedRanking, Ids
from rlhf_lightning.data.preparing.prepared import TokenTable


def ranking_of(pairs: Sequence[EncodedPair]) -> EncodedRanking:
    """The ranking that some pairs were made of.

    Args:
        pairs: of one row, one at least. Responses of the same ids are one, as they are to a model.

    Example:
        >>> best, middle, worst = [1, 2, 5], [1, 2, 6, 6], [1, 2, 7]
        >>> sides = [(best, middle), (best, worst), (middle, worst)]
        >>> ranking = ranking_of([EncodedPair(*both, 2, 0, weight=1 / 3) for both in sides])
        >>> ranking.sequences == [best, middle, worst], ranking.pairs
        (True, [(0, 1), (0, 2), (1, 2)])
    """
    sequences: list[Ids] = []
    numbers: dict[bytes, int] = {}

    def number(ids: Ids) -> int:
        known = numbers.setdefault(np.asarray(ids, dtype=np.int64).tobytes(), len(sequences))
        if known == len(sequences):
            sequences.append(ids)
        return known

    return EncodedRanking(
        sequences=sequences,
        pairs=[(number(pair.chosen_ids), number(pair.rejected_ids)) for pair in pairs],
        prompt_length=pairs[0].prompt_length,
        row_id=pairs[0].row_id,
        margins=[pair.margin for pair in pairs],
        weights=[pair.weight for pair in pairs],
    )


class RankingTable(Sequence[EncodedRanking]):
    """A table of pairs as one of rankings, each of the pairs of one row of the data.

    Args:
        pairs: those of a row one after the other.

    Attributes:
        row_ids: number of each row in the data, `[N]`, int64.
        sources: number of each row's source, `[N]`, int16.
        total_lengths: tokens of prompt and longest response together, `[N]`, int64.
    """

    def __init__(self, pairs: TokenTable) -> None:
        self.pairs = pairs
        begins = np.append(True, pairs.row_ids[1:] != pairs.row_ids[:-1])[: len(pairs)]
        starts = np.flatnonzero(begins)
        self._borders = np.append(starts, len(pairs))
        self.row_ids, self.sources = pairs.row_ids[starts], pairs.sources[starts]
        lengths = pairs.total_lengths
        self.total_lengths = np.maximum.reduceat(lengths, starts) if len(starts) else lengths

    def __len__(self) -> int:
        """Number of rankings."""
        return len(self.row_ids)

    def __getitem__(self, index: Any) -> Any:
        """One ranking, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        return ranking_of(self.pairs[int(self._borders[row]) : int(self._borders[row + 1])])

    @property
    def identity(self) -> str:
        """That of the pairs, whose rows it tells apart."""
        return self.pairs.identity

    def __reduce__(self) -> tuple[Any, ...]:
        """The pairs say it all."""
        return RankingTable, (self.pairs,)
