"""Raw rows of Parquet files, saved data sets and the hub, memory-mapped by Arrow."""

from __future__ import annotations

import hashlib
import mmap
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.gzip_files import open_seekable, scratch_file
from rlhf_lightning.data.sources.raw_rows import FileRows, RawRow, RawRows, find_part
from rlhf_lightning.errors import UserError

_ROWS_A_BATCH = 1024


class _MappedRows(RawRows):
    """Rows of Arrow batches in mapped memory."""

    @property
    @abstractmethod
    def _batches(self) -> list[pyarrow.RecordBatch]: ...

    def __getitem__(self, index: int) -> RawRow:
        part, within = find_part(self._ends, index)
        return _row(self._batches[part], within)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(batch.num_rows for batch in self._batches))


class ParquetRows(_MappedRows, FileRows):
    """Rows of a Parquet file, unpacked once into a temporary Arrow file that is mapped into memory.

    Args:
        path: the file.
        packed: whether it is gzipped as a whole.
        fingerprint: gives that of the file.
        scratch: folder for temporary files, which have no name and go with the process.

    Raises:
        UserError: it is not a Parquet file.
    """

    def __init__(self, path: Path, packed: bool, fingerprint: Callable[[], str], scratch: Path) -> None:
        super().__init__(path, packed, fingerprint)
        self._scratch = scratch
        with _damage_said(str(path), "not a Parquet file"):
            self._file = pyarrow.parquet.ParquetFile(open_seekable(path, packed, scratch))
        names = self._file.schema_arrow.names
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise UserError(f"{path} has several columns {', '.join(twice)}; rename or drop all but one")

    @cached_property
    def columns(self) -> list[str]:
        """Those of the schema."""
        return list(self._file.schema_arrow.names)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def place(self, index: int) -> str:
        """File and row, counted from 0."""
        return f"{self.path} row {index}"

    def stream(self) -> Iterator[tuple[str, RawRow | BadRowError]]:
        """Place and row, a batch in memory at a time."""
        index = 0
        for batch in self._read():
            for row in _rows(batch):
                yield self.place(index), row
                index += 1

    def _read(self) -> Iterator[pyarrow.RecordBatch]:
        """The rows as the file holds them; all that its end says there are."""
        batches, rows = self._file.iter_batches(batch_size=_ROWS_A_BATCH), 0
        while True:
            with _damage_said(str(self.path), "not a whole Parquet file"):
                batch = next(batches, None)
            if batch is None:
                break
            rows += batch.num_rows
            yield batch
        if rows != len(self):
            raise UserError(f"{self.path} is damaged: it holds {rows} rows, not {len(self)}; fetch it again")

    @cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        with scratch_file(self._scratch) as unpacked:
            with pyarrow.ipc.new_file(unpacked, self._file.schema_arrow) as writer:
                for batch in self._read():
                    writer.write_batch(batch)
            unpacked.flush()
            mapped = mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]


class DatasetRows(_MappedRows):
    """Rows of a `datasets.Dataset`, which is mapped into memory already.

    Args:
        dataset: the data set.
        name: begins the place of a row.
        hash_of_file: for data whose files may be replaced; hashes one of them.

    Raises:
        UserError: it changes its rows as they are read.
    """

    def __init__(self, dataset: Any, name: str, hash_of_file: Callable[[Path], str] | None = None) -> None:
        if dataset.format["type"] == "custom":
            raise UserError(f"{name} has a transform set, which is not applied here; apply it with `map` instead")
        self._dataset, self._name, self._hash_of_file = dataset, name, hash_of_file

    @cached_property
    def columns(self) -> list[str]:
        """Those of the data set."""
        return list(self._dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def place(self, index: int) -> str:
        """Data set and row, counted from 0."""
        return f"{self._name} row {index}"

    def fingerprint(self) -> str:
        """The one that `datasets` keeps, and the hash of each file: it does not notice that one has been replaced."""
        hash_of_file = self._hash_of_file
        hashes = [hash_of_file(Path(file["filename"])) for file in self._dataset.cache_files] if hash_of_file else []
        return " ".join([str(self._dataset._fingerprint), *hashes])

    @cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        with _damage_said(self._name, "damaged"):
            plain = self._dataset if self._dataset._indices is None else self._dataset.flatten_indices()
            batches = [batch for batch in plain.data.table.to_batches() if batch.num_rows]
            for batch in batches:  # else what is read for a row may lie outside of the file
                batch.validate(full=True)
        return batches


class StreamedDataset(RawRows):
    """Rows of a data set on the hub that is read as it arrives, without a copy on the disk."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name

    def __len__(self) -> int:
        raise self._no_random_access()

    def __getitem__(self, index: int) -> RawRow:
        raise self._no_random_access()

    def place(self, index: int) -> str:
        """Data set and row, counted from 0."""
        return f"{self._name} row {index}"

    def fingerprint(self) -> str:
        """A hash of the name: what is on the hub is not read for it."""
        return hashlib.blake2b(self._name.encode(), digest_size=16).hexdigest()

    def stream(self) -> Iterator[tuple[str, RawRow | BadRowError]]:
        """Place and row, in the order of the hub."""
        for index, row in enumerate(self._dataset):
            yield self.place(index), {name: _without_nulls(value) for name, value in row.items()}

    def _no_random_access(self) -> UserError:
        return UserError(f"{self._name} is streamed, so its rows can only be read in order; pass `streaming: false`")


def _row(batch: pyarrow.RecordBatch, index: int) -> RawRow:
    """One row; what Arrow holds without looking at it may be no text, or no date."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = _without_nulls(column[index].as_py())
        except UnicodeDecodeError:
            raise BadRowError(f"column {name} is not UTF-8 text") from None
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise BadRowError(f"column {name} cannot be read ({' '.join(str(error).split())[:100]})") from None
    return row


def _rows(batch: pyarrow.RecordBatch) -> Iterator[RawRow | BadRowError]:
    """All rows at once, which is faster, unless one of them cannot be read."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        for index in range(batch.num_rows):
            try:
                yield _row(batch, index)
            except BadRowError as error:
                yield error
        return
    for row in rows:
        yield {name: _without_nulls(value) for name, value in row.items()}


@contextmanager
def _damage_said(name: str, what: str) -> Iterator[None]:
    """One line for what Arrow says of a file that is cut off, or whose bytes are others than were written."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, IndexError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, and not what lies on it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is {what}: {reason[:300]}; fetch it again") from error


def _without_nulls(value: Any) -> Any:
    """A value whose structs have the fields that were written: Arrow gives each the fields of all others, as nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
