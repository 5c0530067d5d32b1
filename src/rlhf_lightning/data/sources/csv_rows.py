"""Raw rows of CSV and TSV files, plain or gzipped."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.gzip_files import checked_lines, open_binary, without_bom
from rlhf_lightning.data.sources.raw_rows import LineRows, RawRow
from rlhf_lightning.errors import UserError

_DELIMITERS = ",;\t|"
_LONGEST_CSV_FIELD = 2**31 - 1
_UNDECODABLE = re.compile("[\udc80-\udcff]")


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
