"""Where rows come from: local files and folders, saved datasets, Python lists, the hub."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from rlhf_lightning.errors import UserError

DataSource = str | Path | list[dict[str, Any]]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Rows(Protocol):
    """Rows by number: a list of dicts, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def source_name(data: DataSource) -> str:
    """The name of a source as error messages say it."""
    return "the list of rows" if isinstance(data, list) else str(data)


def column_names(rows: Rows) -> list[str]:
    """All columns of the rows, in order of first appearance."""
    if hasattr(rows, "column_names"):
        return list(rows.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def is_local(data: str | Path) -> bool:
    """Whether a source names something on this disk, existing or not, rather than a data set on the hub.

    Args:
        data: what the user wrote.

    Example:
        >>> [is_local(x) for x in ("rows.jsonl", "./rows", "a/b/c", "data/*.csv", "owner/name", "owner/name-v1.5:test")]
        [True, True, True, True, False, False]
    """
    text = str(data)
    if isinstance(data, Path) or Path(text).exists() or text.startswith((".", "/", "~")) or glob.has_magic(text):
        return True
    # A hub id may end in a version such as `-v1.5`, so only letters make a file suffix.
    return re.search(r"\.[A-Za-z]\w*$", text) is not None or not _HUB_ID.fullmatch(text.partition(":")[0])


def read_rows(data: DataSource, split: str = "train") -> Rows:
    """Read all rows of a source.

    Args:
        data: one of: a file (`.json`, `.jsonl`, either gzipped, `.csv`, `.parquet`); a folder or a glob of such files,
            read in order of name; a folder written by `Dataset.save_to_disk`; a list of dicts; the id of a data set on
            the hub, `owner/name` or `owner/name:split`.
        split: which split of a hub or saved data set to read, when its id does not say.

    Returns:
        The rows, numbered from 0.

    Raises:
        UserError: nothing there, an unknown kind of file, a line that is no JSON, or no rows.
    """
    rows: Rows
    if isinstance(data, list):
        rows = data
    elif is_local(data):
        rows = _read_local(Path(data).expanduser(), split)
    else:
        rows = _read_hub(str(data), split)
    if len(rows) == 0:
        raise UserError(f"{source_name(data)} has no rows; give at least one")
    return rows


def _read_hub(name: str, split: str) -> Rows:
    import datasets  # slow to import, and a local file may never need it

    repo, _, named_split = name.partition(":")
    try:
        return datasets.load_dataset(repo, split=named_split or split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(
            f"{name} is no file or folder here, and the hub gave no such data ({reason}); "
            "check the path or the id, written owner/name or owner/name:split"
        ) from error


def _read_local(path: Path, split: str) -> Rows:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, split)
    files = _files_of(path)
    if len(files) == 1:
        return _read_file(files[0])
    return [row for file in files for row in _read_file(file)]


def _read_saved(path: Path, split: str) -> Rows:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(saved)}; save the one you mean by itself")
    return saved[split]


def _files_of(path: Path) -> list[Path]:
    """The files a path, a folder or a glob stands for, sorted by name."""
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.name.endswith(SUFFIXES)]
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path)))]
    else:
        raise UserError(f"{path} does not exist; check the path")
    if not files:
        raise UserError(f"{path} holds no data files; expected {', '.join(SUFFIXES)}")
    return files


def _read_file(path: Path) -> Rows:
    if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        return _read_json(path)
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise UserError(f"{path} is of an unknown kind; expected {', '.join(SUFFIXES)}")


def _read_parquet(path: Path) -> Rows:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return _parse_json(file, path)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _parse_json(file: TextIO, path: Path) -> list[dict[str, Any]]:
    """Rows of an open file: one JSON list, or one JSON object a line."""
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    if first == "[":
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {error.lineno}: broken JSON ({error.msg})") from error
        numbered = list(enumerate(rows))
    else:
        numbered = list(_parse_lines(file, path))
    for number, row in numbered:
        if not isinstance(row, dict):
            place = f"item {number}" if first == "[" else f"line {number}"
            raise UserError(f'{path} {place}: expected an object such as {{"prompt": ...}}, found {type(row).__name__}')
    return [row for _, row in numbered]


def _parse_lines(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: broken JSON ({error.msg}); write one object a line") from error
