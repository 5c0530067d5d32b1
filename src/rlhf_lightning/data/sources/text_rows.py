"""Raw rows of JSON, CSV and TSV files, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.raw_rows import LineRows, RawRow, check_object, column_rows
from rlhf_lightning.errors import UserError

_DELIMITERS = ",;\t|"
_LONGEST_CSV_FIELD = 2**31 - 1
_BOM = b"\xef\xbb\xbf"
_HTML = re.compile(rb"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)


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
            value = json.loads(record.removeprefix(_BOM).decode().strip())
        except UnicodeDecodeError:
            raise BadRowError("not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise BadRowError(f"broken JSON ({error.msg})") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of nested brackets
            raise BadRowError("broken JSON (beyond what can be parsed)") from None
        return check_object(value)


class CsvRows(LineRows):
    """Rows of a CSV file with a header, in memory; blank lines do not count as rows.

    Args:
        path: the file.
        packed: whether it is gzipped.
        fingerprint: gives that of the file.
        usual: what stands between the fields of such files; another mark is taken, and said, where it parts the header
            into more columns.
    """

    def __init__(self, path: Path, packed: bool, fingerprint: Callable[[], str], usual: str = ",") -> None:
        super().__init__(path, packed, fingerprint)
        self._usual = usual

    @cached_property
    def columns(self) -> list[str]:
        """The header."""
        header = self._header(self._delimiter)
        if isinstance(header, BadRowError):
            raise UserError(f"{self.path} line 1: {header}; fix the header")
        names = [name.strip() for name in header]
        if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            raise UserError(f"{self.path} line 1: column {', '.join(twice)} stands there twice; fix the header")
        return names

    @cached_property
    def _delimiter(self) -> str:
        headers = {mark: self._header(mark) for mark in (self._usual, *_DELIMITERS)}
        widths = {mark: len(header) for mark, header in headers.items() if not isinstance(header, BadRowError)}
        best = max(widths, key=widths.__getitem__, default=self._usual)
        if best != self._usual:
            rank_zero_info(f"{self.path}: fields are taken to be parted by {best!r}, as the header is")
        return best

    def _header(self, delimiter: str) -> list[str] | BadRowError:
        with open_binary(self.path, self._packed) as file:
            return self._next(self._reader(file, delimiter)) or []

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> RawRow:
        return self._parse(self._table[index][1])

    def place(self, index: int) -> str:
        """File and the first line of the row, counted from 1."""
        return f"{self.path} line {self._table[index][0]}"

    @cached_property
    def _table(self) -> list[tuple[int, list[str] | BadRowError]]:
        return list(self._records())

    def _records(self) -> Iterator[tuple[int, list[str] | BadRowError]]:
        """First line and fields of each row after the header."""
        with open_binary(self.path, self._packed) as file:
            reader = self._reader(file, self._delimiter)
            self._next(reader)  # the header
            while True:
                line, fields = reader.line_num + 1, self._next(reader)
                if fields is None:
                    return
                if isinstance(fields, BadRowError) and reader.line_num > line:
                    # A quote that is never closed takes all lines up to the next quote, which is not to be overlooked.
                    fields = BadRowError(f"{fields}, which cost {reader.line_num - line + 1} lines")
                if fields:
                    yield line, fields

    def _reader(self, file: BinaryIO, delimiter: str) -> Any:
        csv.field_size_limit(_LONGEST_CSV_FIELD)
        lines = checked_lines(file, self.path)
        # strict: a quote that is never closed would otherwise take the rest of the file into one field.
        texts = (line.decode("utf-8", "surrogateescape") for line in without_bom(lines))
        return csv.reader(texts, delimiter=delimiter, strict=True)

    def _next(self, reader: Any) -> list[str] | BadRowError | None:
        try:
            return cast("list[str] | None", next(reader, None))
        except csv.Error as error:
            return BadRowError(f"broken CSV ({error})")

    def _parse(self, record: list[str] | BadRowError) -> RawRow:
        if isinstance(record, BadRowError):
            raise record
        fields = record
        if len(fields) != len(self.columns):
            raise BadRowError(f"{len(fields)} fields where the header has {len(self.columns)}")
        if any(not field.isascii() and _UNDECODABLE.search(field) for field in fields):
            raise BadRowError("not UTF-8 text")
        return dict(zip(self.columns, fields, strict=True))


def looks_like_html(head: bytes) -> bool:
    """Whether a file that begins so is a web page, such as the page of an error or a login, saved by mistake."""
    return _HTML.match(head) is not None


def without_bom(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines, the first without the mark that some programs write at the beginning of UTF-8."""
    for line in lines:
        yield line.removeprefix(_BOM)
        break
    yield from lines


def open_binary(path: Path, packed: bool) -> BinaryIO:
    """A file to be read once from its beginning, unpacked on the way if it is gzipped."""
    return cast("BinaryIO", gzip.open(path)) if packed else path.open("rb")


def checked_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file, with one clear line for a gzip file that breaks off."""
    try:
        yield from file
    except _GZIP_ERRORS as error:
        raise gzip_error(path, error) from error


def open_seekable(path: Path, packed: bool, scratch: Path) -> BinaryIO:
    """A file to be read anywhere.

    Args:
        path: the file.
        packed: whether it is gzipped and to be unpacked.
        scratch: folder for the unpacked form, made if missing; the file has no name there and goes with the process.

    Raises:
        UserError: broken gzip, or a folder that cannot be written.
    """
    if not packed:
        return path.open("rb")
    unpacked = scratch_file(scratch, buffering=0)
    try:
        with gzip.open(path) as file:
            shutil.copyfileobj(file, unpacked, 1 << 20)
    except _GZIP_ERRORS as error:
        raise gzip_error(path, error) from error
    unpacked.seek(0)
    return io.BufferedReader(unpacked)


def scratch_file(folder: Path, buffering: int = -1) -> Any:
    """A temporary file to unpack into; UserError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder, buffering=buffering)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written ({error.strerror}), and data are unpacked there; set another in "
            "$RLHF_LIGHTNING_CACHE"
        ) from error


def gzip_error(path: Path, error: Exception) -> UserError:
    """What to say of a gzip file that breaks off, or is not one."""
    return UserError(f"{path} is not a complete gzip file: {error}; fetch it again")


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
        except _GZIP_ERRORS as error:
            raise gzip_error(path, error) from error
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


def packed_twice(head: bytes) -> str:
    """What is wrong with a text file that begins so, if it is not one: compressed once more, or in UTF-16."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16 text; save it as UTF-8"
    kinds = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
    found = next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)
    return f"is compressed by {found}, which its name does not say; unpack it" if found else ""


def head_of(path: Path, packed: bool) -> bytes:
    """The beginning of a file, unpacked, without white space and marks before it; empty if there is nothing else."""
    with open_binary(path, packed) as file:
        try:
            return file.read(1 << 16).removeprefix(_BOM).lstrip()[:1024]
        except _GZIP_ERRORS as error:
            raise gzip_error(path, error) from error
