"""The rows of several opened sources as one."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

from rlhf_lightning.data.rows import BadRowError, DroppedRow, Need, Row
from rlhf_lightning.data.sources.raw_rows import find_part
from rlhf_lightning.data.sources.table_rows import Rows

Outcome = Row | BadRowError | DroppedRow


class BlendRows(Rows):
    """The rows of several opened sources, one source after the other.

    Args:
        parts: the opened sources; blends among them count as their own sources.
        weights: of each part.
    """

    def __init__(self, parts: list[Rows], weights: list[float]) -> None:
        self._parts, self._weights = parts, weights
        self.source_names = [name for part in parts for name in part.source_names]
        weighted = zip(parts, weights, strict=True)
        self.source_weights = [weight * inner for part, weight in weighted for inner in part.source_weights]
        self._first_source = [0, *accumulate(len(part.source_names) for part in parts)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def parse(self, index: int, need: Need) -> Row:
        """One row, see `Rows`."""
        part, within = find_part(self._ends, index)
        row = self._parts[part].parse(within, need)
        return row._replace(row_id=index, source=self._first_source[part] + row.source)

    def place(self, index: int) -> str:
        """Where a row stands."""
        part, within = find_part(self._ends, index)
        return self._parts[part].place(within)

    def fingerprint(self) -> str:
        """A hash of the sources and their weights."""
        parts = (f"{part.fingerprint()} {weight}" for part, weight in zip(self._parts, self._weights, strict=True))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def check(self, need: Need) -> None:
        """Check every source, see `Rows`."""
        for part in self._parts:
            part.check(need)

    def has(self, need: Need) -> bool:
        """Whether every source has what a need asks."""
        return all(part.has(need) for part in self._parts)

    def stream(self, need: Need, epoch: int = 0) -> Iterator[tuple[str, Outcome]]:
        """The sources side by side, each as often as its weight says, until all are at their end.

        `row_id` is the number within the source here: how many rows the other sources have is not known.

        Args:
            need: what for.
            epoch: fixes which rows a weight that is not a whole number picks.
        """
        parts = zip(self._parts, self._weights, self._first_source, strict=False)
        streams = [_repeat(part, weight, first, need, epoch) for part, weight, first in parts]
        turns = list(self._weights)
        credit = [0.0] * len(streams)
        live = set(range(len(streams)))
        while live:
            for part in live:
                credit[part] += turns[part]
            part = max(sorted(live), key=credit.__getitem__)
            credit[part] -= sum(turns[number] for number in live)
            item = next(streams[part], None)
            if item is None:
                live.remove(part)
            else:
                yield item


def _repeat(part: Rows, weight: float, first: int, need: Need, epoch: int) -> Iterator[tuple[str, Outcome]]:
    """Rows of one source as often as its weight says: whole passes, then one over a random share of the rows."""
    passes, share = int(weight), weight % 1
    for copy in range(passes + (share > 0)):
        for number, (place, outcome) in enumerate(part.stream(need, epoch)):
            if copy < passes or _point(first, epoch, number) < share:
                if isinstance(outcome, Row):
                    outcome = outcome._replace(source=first + outcome.source)
                yield place, outcome


def _point(first: int, epoch: int, number: int) -> float:
    """A number in [0, 1) that is fixed by source, epoch and row."""
    digest = hashlib.blake2b(f"{first} {epoch} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
