"""Opened sources: rows by number, each parsed for what it is needed for."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from rlhf_lightning.chat.messages import exact_text
from rlhf_lightning.data.rows import BadRowError, DroppedRow, LabelledRow, Need, Row
from rlhf_lightning.data.sources.raw_rows import RawRow, RawRows
from rlhf_lightning.data.sources.row_forms import SAME, RowForm
from rlhf_lightning.errors import UserError

_PARSER = 4
"""Raised with every change of what a row is parsed to, so that nothing prepared before is taken for current."""


class Rows(ABC):
    """The rows of an opened source, by number. Whatever takes a pass over them waits until it is asked for.

    Attributes:
        source_names: the name of each source of a blend; one for any other source.
        source_weights: how often each row of that source is seen in an epoch.
    """

    source_names: list[str]
    source_weights: list[float]

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows. Raises UserError if they are streamed."""

    @abstractmethod
    def parse(self, index: int, need: Need) -> Row:
        """One row.

        Args:
            index: its number.
            need: what for; `check` it first.

        Raises:
            BadRowError: a row that cannot be used.
            DroppedRow: a sound row of no use.
            UserError: the rows are streamed.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a row stands, such as `rows.jsonl line 7`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that fixes the rows: content, columns, class of source, weights; it takes no pass over them."""

    @abstractmethod
    def check(self, need: Need) -> None:
        """Check that there are rows, and that their columns hold what a need asks. Raises UserError."""

    @abstractmethod
    def has(self, need: Need) -> bool:
        """Whether the columns hold what a need asks. Raises UserError if no row can be read at all."""

    @abstractmethod
    def stream(self, need: Need, epoch: int = 0) -> Iterator[tuple[str, Row | BadRowError | DroppedRow]]:
        """Place and row, or why there is none, in order and without random access, the same each time.

        Args:
            need: what for.
            epoch: of a blend, whose weights pick other rows in each.

        Raises:
            UserError: the columns do not hold what the need asks, or pairs would have to be sought.
        """


class _Labelled(NamedTuple):
    """Rows of one prompt that wait for a partner."""

    good: deque[int]
    bad: deque[int]


class TableRows(Rows):
    """Rows of one table.

    Args:
        raw: as they are written.
        name: of the source.
        make_form: from the columns found to what reads the rows.
        identity: what besides the content fixes the rows.
        streaming: rows are to be read in order only.
    """

    def __init__(
        self,
        raw: RawRows,
        name: str,
        make_form: Callable[[Sequence[str]], RowForm],
        identity: Sequence[Any],
        streaming: bool = False,
    ) -> None:
        self.source_names, self.source_weights = [name], [1.0]
        self._raw, self._name, self._make_form = raw, name, make_form
        self._identity, self._streaming = list(identity), streaming

    def __len__(self) -> int:
        self._check_random_access()
        return len(self._raw)

    def parse(self, index: int, need: Need) -> Row:
        """One row, see `Rows`."""
        self._check_random_access()
        raw = self._raw[index]
        row = self._pair(index, raw) if self._pairs_rows(need) else self._form.read(raw, need)
        return row._replace(row_id=index)

    def place(self, index: int) -> str:
        """Where a row stands."""
        return self._raw.place(index)

    def fingerprint(self) -> str:
        """A hash of the content and of how it is read."""
        parts = json.dumps([_PARSER, self._raw.fingerprint(), *self._identity], sort_keys=True)
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def check(self, need: Need) -> None:
        """Check rows and columns, see `Rows`."""
        self._form.check(need)
        if not self._streaming and len(self._raw) == 0:
            raise self._no_rows()

    def has(self, need: Need) -> bool:
        """Whether the columns hold what a need asks."""
        return self._form.has(need)

    def stream(self, need: Need, epoch: int = 0) -> Iterator[tuple[str, Row | BadRowError | DroppedRow]]:
        """Rows in order, see `Rows`."""
        self.check(need)
        if self._pairs_rows(need):
            raise UserError(f"{self._name} has a label a row, and pairs cannot be sought in a stream; do not stream it")
        for index, (place, raw) in enumerate(self._raw.stream()):
            yield place, self._read(index, raw, need)

    def _read(self, index: int, raw: RawRow | BadRowError, need: Need) -> Row | BadRowError | DroppedRow:
        if isinstance(raw, BadRowError):
            return raw
        try:
            return self._form.read(raw, need)._replace(row_id=index)
        except (BadRowError, DroppedRow) as reason:
            return reason

    @cached_property
    def _form(self) -> RowForm:
        if self._raw.columns:
            return self._make_form(self._raw.columns)
        for place, row in self._raw.stream():
            if isinstance(row, BadRowError):
                raise UserError(f"{place}: {row}; no row of {self._name} can be read")
        raise self._no_rows()

    def _no_rows(self) -> UserError:
        return UserError(f"{self._name} has no rows; give at least one")

    def _check_random_access(self) -> None:
        if self._streaming:
            raise UserError(f"{self._name} is streamed: its rows can only be read in order; pass `streaming: false`")

    # One response a row, with a label

    def _pairs_rows(self, need: Need) -> bool:
        return need == "preference" and self._form.labelled

    def _pair(self, index: int, raw: RawRow) -> Row:
        """A good response and a bad one to the same prompt; the pair stands at the row of the good one."""
        row, good = self._form.label(raw)
        partner = self._partners.get(index)
        if partner is None:
            raise DroppedRow("no response with the other label answers the same prompt")
        if not good:
            raise LabelledRow("response is the rejected one of another row's pair")
        other, _ = self._form.label(self._raw[partner])
        if exact_text(row.responses[0]).strip() == exact_text(other.responses[0]).strip():
            raise DroppedRow(SAME)
        return row._replace(responses=row.responses + other.responses)

    @cached_property
    def _partners(self) -> dict[int, int]:
        """The number of the row each paired row goes with, both ways; first come, first paired."""
        waiting: dict[bytes, _Labelled] = defaultdict(lambda: _Labelled(deque(), deque()))
        partners = {}
        for index in range(len(self._raw)):
            try:
                row, good = self._form.label(self._raw[index])
            except BadRowError:
                continue
            same_prompt = waiting[hashlib.blake2b(repr((row.prompt, row.tools)).encode(), digest_size=16).digest()]
            own, others = same_prompt if good else reversed(same_prompt)
            if others:
                partner = others.popleft()
                partners[index], partners[partner] = partner, index
            else:
                own.append(index)
        return partners
