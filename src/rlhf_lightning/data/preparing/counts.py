"""Where the rows of a source went, and what is said of those that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Counts:
    """The account of one source: rows = kept + other_stages + all that is dropped.

    Args:
        rows: read.
        kept: of these, the rows of which examples are made.
        other_stages: rows that `stage_split` gives to other stages.
        dropped: rows left out, by reason.
        lacking: rows kept that do not serve all they were read for, by reason.
        cut: prompts and responses cut, by which of the two.
        unused: rows kept that hold something which is not read, by what that is.
        others: what else is said of rows kept, and the examples written by kind and part.
    """

    rows: int = 0
    kept: int = 0
    other_stages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lacking: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, said: Mapping[str, int]) -> Counts:
        """Counts as `said` gave them."""
        counts = cls(said.get("rows", 0), said.get("kept", 0), said.get("other stages", 0))
        for name, count in said.items():
            group, _, what = name.partition(": ")
            if group in _GROUPS and what:
                getattr(counts, group)[what] = count
            elif name not in _TOTALS:
                counts.others[name] = count
        return counts

    def said(self) -> dict[str, int]:
        """Those that are not 0 by one name each, such as `dropped: prompt is null`; rows read and kept come first."""
        named = {f"{group}: {what}": count for group in _GROUPS for what, count in getattr(self, group).items()}
        others = {"other stages": self.other_stages, **named, **self.others}
        ordered = {"rows": self.rows, "kept": self.kept} | {name: others[name] for name in sorted(others)}
        return {name: count for name, count in ordered.items() if count}

    def check(self, total: int | None) -> None:
        """Assert that every row is accounted for.

        Args:
            total: rows that were to be read; None where that is not known.
        """
        assert self.rows == self.kept + self.dropped.total() + self.other_stages, self
        assert total in (None, self.rows), self


_TOTALS = ("rows", "kept", "other stages")
_GROUPS = ("dropped", "lacking", "cut", "unused")


def say_counts(counts: Mapping[str, int]) -> str:
    """Counts as one line: `rows 9, kept 8, dropped: prompt is null 1`."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)
