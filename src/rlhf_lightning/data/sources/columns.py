"""What the columns of a source say: which of them hold a prompt, answers, or what stands beside these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.raw_rows import RawRow
from rlhf_lightning.errors import UserError

CHOICE = ("output_1", "output_2", "preference")
BESIDE = ("system", "history", "tools")
NUMBERS = ("margin", "weight")
TIE_MARGIN = "tie_margin"
"""A number, too, but of rankings alone."""
RATING = "rating"
"""Read only where each rating has a margin."""
OF_PAIRS = (*NUMBERS, TIE_MARGIN, RATING)
"""What only preferences have a use for."""
NAMES = (
    *("prompt", "response", "chosen", "rejected", "messages"),
    *("conversations", "instruction", "input", "output", "completion"),
    *("label", "responses", "ranks", "scores", *NUMBERS, TIE_MARGIN, RATING, *BESIDE),
    *(*CHOICE, "text"),
)
_SPELLINGS = {"system": "system_prompt", "tools": "functions"}


class Columns:
    """The columns of a source by our names.

    Args:
        found: those of the source.
        names: our column name to the source's, for those that differ.
        source: its name, for error messages.
        rated: ratings are read.
        attributes: names of the scores that responses are given, each a column.

    Attributes:
        found: as given.
        used: those that are read for one kind of example or another.
        used_alone: those of them that are read where no pair is made.

    Raises:
        UserError: `names` says a name of ours or a column that does not exist.
    """

    def __init__(
        self,
        found: Sequence[str],
        names: Mapping[str, str],
        source: str,
        attributes: Sequence[str] = (),
        rated: bool = False,
    ) -> None:
        self.found, self._source, self._rated = list(found), source, rated
        self.attributes = tuple(attributes)
        if taken := sorted({*attributes} & {*NAMES}):
            raise UserError(f"attributes: '{taken[0]}' is the name of a column with a meaning of its own; use another")
        # Rows that are only to be scored lack what others were rated; `has` says so where it is asked for.
        names = {ours: theirs for ours, theirs in names.items() if ours not in self.attributes or theirs in self.found}
        self._check_names(names)
        free = set(self.found) - set(names.values())
        self._theirs = {ours: ours for ours in (*NAMES, *self.attributes) if ours in free} | dict(names)
        self._theirs |= {o: other for o, other in _SPELLINGS.items() if o not in self._theirs and other in free}
        # What a row may hold or not is read also where the first rows, which say the columns, do not hold it.
        optional = (name for name in (*NUMBERS, TIE_MARGIN, RATING, *BESIDE, "input") if name not in names.values())
        self._optional = {name: name for name in optional} | self._theirs
        read = [name for name in self._names_read() if name in self._optional]
        self.used = frozenset(self._optional[name] for name in read)
        self.used_alone = frozenset(self._optional[name] for name in read if name not in OF_PAIRS)

    def has(self, *names: str) -> bool:
        """Whether there are columns for all these names of ours."""
        return all(name in self._theirs for name in names)

    def name(self, ours: str) -> str:
        """What the source calls one of our columns, for reasons too."""
        return self._optional.get(ours, ours)

    @cached_property
    def answer(self) -> str | None:
        """The column of a single response, where another says what it answers."""
        if not self.has("prompt") and not self.has("instruction"):
            return None
        return next((name for name in ("response", "output", "completion") if self.has(name)), None)

    @cached_property
    def turns(self) -> str | None:
        """The column of a dialogue."""
        return next((name for name in ("messages", "conversations") if self.has(name)), None)

    @cached_property
    def asks(self) -> str | None:
        """The column that says what is answered, where that is not the answer's."""
        return next((name for name in ("prompt", "instruction", self.turns) if name and self.has(name)), None)

    @cached_property
    def ranked(self) -> bool:
        """Whether the rows hold several responses and say which is better."""
        given = self.has("responses") and (self.has("ranks") or self.has("scores"))
        return self.asks is not None and (given or self.has(*CHOICE))

    @cached_property
    def only_turns(self) -> bool:
        """Whether the last turn is the answer."""
        return self.turns is not None and not (self.answer or self.ranked or self.has("chosen"))

    @cached_property
    def only_text(self) -> bool:
        """Whether the rows are whole texts."""
        return self.has("text") and self.asks is None and not self.has("chosen")

    @cached_property
    def labelled(self) -> bool:
        """Whether the rows hold one response each, with a label."""
        one = self.answer is not None or self.only_turns
        return one and self.has("label") and not self.has("chosen", "rejected")

    def _names_read(self) -> list[str]:
        """Our names of the columns that are read for one kind of example or another."""
        if self.only_text:
            return ["text", *NUMBERS]
        names = [
            *NUMBERS,
            *([RATING] if self._rated else []),
            *BESIDE,
            *self.attributes,
            self.turns if self.only_turns else self.asks,
            self.answer,
        ]
        if self.asks == "instruction":
            names.append("input")
        if self.answer or self.labelled:
            names.append("label")
        if self.has("chosen"):
            names += ["chosen", "rejected"]
        elif self.ranked:
            names += [*self.ranking_names, TIE_MARGIN]
        return [name for name in names if name]

    @cached_property
    def ranking_names(self) -> tuple[str, ...]:
        """The columns of a ranking: the responses, and what says their order."""
        by = next((name for name in ("ranks", "scores") if self.has(name)), None)
        return ("responses", by) if by and self.has("responses") else CHOICE

    def beside(self, raw: RawRow, name: str) -> Any:
        """What stands in a column that a row may hold or not."""
        return raw.get(self._optional[name]) if name in self._optional else None

    def get(self, raw: RawRow, name: str) -> Any:
        """A field; BadRowError if there is none of this name."""
        column = self._theirs[name]
        try:
            return raw[column]
        except KeyError:
            known = set(self._theirs.values())
            others = [repr(other)[:40] for other in raw if other not in known][:3]
            raise BadRowError(
                f"{column} is missing" + (f"; unknown column {', '.join(others)}" if others else "")
            ) from None

    def _check_names(self, names: Mapping[str, str]) -> None:
        for ours, theirs in names.items():
            if ours not in NAMES and ours not in self.attributes:
                raise UserError(f"columns: {ours!r} is not one of {', '.join(NAMES)}; write our name first, then yours")
            if theirs not in self.found:
                raise UserError(
                    f"{self._source} has no column {theirs!r}; it has {', '.join(self.found)}; fix `columns`"
                )
