"""Raw rows of JSON files, plain or gzipped: an object a line, or one list or table."""

from __future__ import annotations

import io
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.gzip_files import (
    BOM,
    GZIP_ERRORS,
    checked_lines,
    gzip_error,
    open_binary,
    open_seekable,
    without_bom,
)
from rlhf_lightning.data.sources.raw_rows import LineRows, RawRow, check_object, column_rows
from rlhf_lightning.errors import UserError


class JsonLines(LineRows):
    """One JSON object a line, found by an index of where the lines begin; blank lines do not count as rows.

    Lines are read, not mapped: mapped pages would count as memory of the process.

    Args:
        path: the file.
        packed: whether it is gzipped.
        fingerprint: gives that of the file.
        scratch: folder for the unpacked form, which has no name and goes with the process.
        is_html: whether the file is a web page, in which no line is a row.
    """

    def __init__(
        self, path: Path, packed: bool, fingerprint: Callable[[], str], scratch: Path, is_html: bool = False
    ) -> None:
        super().__init__(path, packed, fingerprint)
        self._scratch, self._is_html = scratch, is_html

    def __len__(self) -> int:
        return len(self._index[0]) - 1

    def __getitem__(self, index: int) -> RawRow:
        starts, _ = self._index
        start = starts[index]
        self._file.seek(start)
        return self._parse(self._file.read(starts[index + 1] - start))

    def place(self, index: int) -> str:
        """File and line, counted from 1."""
        return f"{self.path} line {index + 1 + bisect_right(self._index[1], index)}"

    def _records(self) -> Iterator[tuple[int, bytes]]:
        with open_binary(self.path, self._packed) as file:
            for number, line in enumerate(checked_lines(file, self.path), start=1):
                if not line.isspace():
                    yield number, line

    @cached_property
    def _file(self) -> BinaryIO:
        return open_seekable(self.path, self._packed, self._scratch)

    @cached_property
    def _index(self) -> tuple[array[int], array[int]]:
        """Where rows begin, the end of the file last; and for each blank line the number of rows before it."""
        starts, blanks, position = array("q"), array("q"), 0
        self._file.seek(0)
        for line in self._file:
            if line.isspace():
                blanks.append(len(starts))
            else:
                starts.append(position)
            position += len(line)
        starts.append(position)
        return starts, blanks

    def _parse(self, record: bytes) -> RawRow:
        if self._is_html:
            raise BadRowError("broken JSON (this looks like an HTML page)")
        try:
            value = json.loads(record.removeprefix(BOM).decode().strip())
        except UnicodeDecodeError:
            raise BadRowError("not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise BadRowError(f"broken JSON ({error.msg})") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of nested brackets
            raise BadRowError("broken JSON (beyond what can be parsed)") from None
        return check_object(value)


def read_json(path: Path, packed: bool) -> list[Any]:
    """The rows of a file that is one JSON value: a list, an object of columns, or an object with a list inside.

    Raises:
        UserError: broken JSON, with its line, not UTF-8, or an object that is not a table.
    """
    with open_binary(path, packed) as file:
        try:
            value = json.load(io.TextIOWrapper(file, encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {error.lineno}: broken JSON ({error.msg}); fix the list") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
        except GZIP_ERRORS as error:
            raise gzip_error(path, error) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
            raise UserError(f"{path}: broken JSON (beyond what can be parsed); fix the file") from error
    return value if isinstance(value, list) else _rows_of_object(value, path)


def _rows_of_object(value: dict[str, Any], path: Path) -> list[Any]:
    if not _holds_lists(value):
        return [value]
    objects = [name for name, items in value.items() if all(isinstance(item, dict) for item in items)]
    if len(value) == 1 and objects:
        return list(value[objects[0]])
    if len(objects) == len(value):
        names = ", ".join(objects)
        raise UserError(f"{path} is one object with several lists of rows ({names}); give each list a file of its own")
    return column_rows(value, str(path))


def _holds_lists(value: Any) -> bool:
    """Whether an object holds lists only, of which none is a dialogue, so that it is not a row."""
    if not isinstance(value, dict) or not value or not all(isinstance(items, list) for items in value.values()):
        return False
    return not any(
        items and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)
        for items in value.values()
    )


def is_one_object(path: Path, packed: bool) -> bool:
    """Whether a file is one JSON object that is a table, or is written over several lines, instead of a row a line."""
    with open_binary(path, packed) as file:
        lines = (line for line in checked_lines(file, path) if not line.isspace())
        first, more = next(without_bom(lines), b""), next(lines, None)
        try:
            value = json.loads(first)
        except json.JSONDecodeError as error:
            if error.pos < len(error.doc.rstrip()):  # broken within the line, which does not just go on in the next
                return False
        except (ValueError, RecursionError):
            return False
        else:
            return more is None and _holds_lists(value)
    try:
        read_json(path, packed)
    except (UserError, ValueError, RecursionError):
        return False
    return True
