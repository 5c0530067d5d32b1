"""Raw rows by number or in order, as they are written: what all formats share, lists, and files joined."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.errors import UserError

RawRow = Mapping[str, Any]

_ROWS_SAMPLED = 1000


class RawRows(ABC):
    """Rows as they are written. Opening is cheap: whatever takes a pass over the data waits until it is asked for."""

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns, in order of first appearance; where no header says them, those of the first rows."""
        rows = (row for _, row in islice(self.stream(), _ROWS_SAMPLED) if not isinstance(row, BadRowError))
        return list(dict.fromkeys(str(name) for row in rows for name in row))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> RawRow:
        """One row.

        Raises:
            BadRowError: it cannot be read.
        """

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a row stands, such as `rows.jsonl line 7`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the whole content; it takes no pass over the rows."""

    def stream(self) -> Iterator[tuple[str, RawRow | BadRowError]]:
        """Place and row, or what is wrong with it, from the first to the last, without random access."""
        for index in range(len(self)):
            try:
                yield self.place(index), self[index]
            except BadRowError as error:
                yield self.place(index), error


class FileRows(RawRows):
    """Rows of one file.

    Args:
        path: the file.
        packed: whether it is gzipped as a whole.
        fingerprint: gives that of the file.
    """

    def __init__(self, path: Path, packed: bool, fingerprint: Callable[[], str]) -> None:
        self.path, self._packed, self._fingerprint = path, packed, fingerprint

    def fingerprint(self) -> str:
        """A hash of the file."""
        return self._fingerprint()


class LineRows(FileRows):
    """Rows of one text file, each beginning on a line; streamed without an index, and unpacked on the way."""

    @abstractmethod
    def _records(self) -> Iterator[tuple[int, Any]]:
        """The line that each row begins on, counted from 1, and what is parsed."""

    @abstractmethod
    def _parse(self, record: Any) -> RawRow: ...

    def stream(self) -> Iterator[tuple[str, RawRow | BadRowError]]:
        """Place and row, or what is wrong with it."""
        for line, record in self._records():
            try:
                yield f"{self.path} line {line}", self._parse(record)
            except BadRowError as error:
                yield f"{self.path} line {line}", error


class ListRows(RawRows):
    """Rows in memory: a Python list, or the one JSON list of a file.

    Args:
        rows: the list, or what reads it when it is first needed; items that are not objects are bad rows.
        where: begins the place of a row.
        fingerprint: gives that of the file they come from; without it the rows are hashed.
    """

    def __init__(
        self, rows: list[Any] | Callable[[], list[Any]], where: str, fingerprint: Callable[[], str] | None = None
    ) -> None:
        self._given, self._where, self._fingerprint = rows, where, fingerprint

    @cached_property
    def _rows(self) -> list[Any]:
        return self._given() if callable(self._given) else self._given

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawRow:
        return check_object(self._rows[index])

    def place(self, index: int) -> str:
        """Where a row stands, counted from 0."""
        return f"{self._where} {index}"

    def fingerprint(self) -> str:
        """A hash of the file, or of the rows as JSON."""
        if self._fingerprint is not None:
            return self._fingerprint()
        digest = hashlib.blake2b(digest_size=16)
        for row in self._rows:
            digest.update(json.dumps(row, default=_as_json).encode() + b"\n")
        return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """What stands for a value that JSON does not know; the `repr` of a long array leaves most of it out."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


class JoinedRows(RawRows):
    """The rows of several files, one file after the other."""

    def __init__(self, parts: list[RawRows]) -> None:
        self._parts = parts

    @cached_property
    def columns(self) -> list[str]:
        """The columns of all parts, in order of first appearance."""
        return list(dict.fromkeys(name for part in self._parts for name in part.columns))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> RawRow:
        part, within = find_part(self._ends, index)
        return self._parts[part][within]

    def place(self, index: int) -> str:
        """Where a row stands in its file."""
        part, within = find_part(self._ends, index)
        return self._parts[part].place(within)

    def fingerprint(self) -> str:
        """A hash of the hashes of all parts."""
        joined = "\n".join(part.fingerprint() for part in self._parts)
        return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()

    def stream(self) -> Iterator[tuple[str, RawRow | BadRowError]]:
        """The rows of each part in turn."""
        for part in self._parts:
            yield from part.stream()


def find_part(ends: list[int], index: int) -> tuple[int, int]:
    """Which of several joined parts a row is in, and its number there.

    Example:
        >>> find_part([3, 3, 5], 3)
        (2, 0)
    """
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def check_object(value: Any) -> dict[str, Any]:
    """A row, if it is an object with named fields; BadRowError if not."""
    if not isinstance(value, dict):
        raise BadRowError(f'expected an object such as {{"prompt": ...}}, found {type(value).__name__}')
    return value


def column_rows(columns: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Columns as rows.

    Raises:
        UserError: columns of unequal length.
    """
    lists = {column: _plain(values) for column, values in columns.items()}
    lengths = {column: len(values) for column, values in lists.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{column} {length}" for column, length in lengths.items())
        raise UserError(
            f"the columns of {name} differ in length ({said}); give one value a row, null where there is none"
        )
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _plain(value: Any) -> Any:
    """Arrays within values as lists, as Parquet files give them to data frames."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
