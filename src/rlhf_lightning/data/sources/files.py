"""Opening what the user names: files, folders, globs, saved data sets, and data sets on the hub."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.caches import cache_root
from rlhf_lightning.data.sources.csv_rows import CsvRows
from rlhf_lightning.data.sources.gzip_files import head_of, looks_like_html, packed_twice
from rlhf_lightning.data.sources.json_rows import JsonLines, is_one_object, read_json
from rlhf_lightning.data.sources.python_rows import names_paths, open_object
from rlhf_lightning.data.sources.raw_rows import JoinedRows, ListRows, RawRows
from rlhf_lightning.errors import UserError

_KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
SUFFIXES = (*_KINDS, *(f"{kind}.gz" for kind in _KINDS))
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")
"""JSON files that lie beside data and hold none."""
PARTS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The parts of data, and what splits and files of each are called (the words of the hub's `datasets`)."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BYTES_REMEMBERED = 8 * 2**20
_SECONDS_AT_REST = 2
_FILES_REMEMBERED = 1000


def is_local(data: str | Path) -> bool:
    """Whether a source names something on this disk, existing or not, rather than a data set on the hub.

    Example:
        >>> [is_local(x) for x in ("rows.jsonl", "./rows", "a/b/c", "data/*.csv", "owner/name", "owner/name-v1.5:test")]
        [True, True, True, True, False, False]
    """
    text = str(data)
    if isinstance(data, Path) or Path(text).exists() or text.startswith((".", "/", "~")) or glob.has_magic(text):
        return True
    # A hub id may end in a version such as `-v1.5`, so only letters make a file suffix.
    return re.search(r"\.[A-Za-z]\w*$", text) is not None or not _HUB_ID.fullmatch(text.partition(":")[0])


def open_parts(
    data: Any, split: str | None = None, streaming: bool = False, subset: str | None = None
) -> dict[str, RawRows]:
    """Open the raw rows of a source by part; what takes a pass over them waits until it is asked for.

    Args:
        data: one of: a file (`.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`, each possibly `.gz`); a list of files; a
            folder or a glob of such files, read in order of name; a folder written by `save_to_disk`; the id of a data
            set on the hub, `owner/name` or `owner/name:split`; or what `open_object` takes.
        split: the only split to read, where the data have several.
        streaming: read a hub data set as it arrives, in order only, instead of fetching it whole.
        subset: folder within a hub data set.

    Returns:
        `train`; and `validation` and `test` where the data have such splits and none is named.

    Raises:
        UserError: nothing there, or a file that cannot be read at all.
    """
    if names_paths(data):
        return {"train": open_files([path for name in data for path in data_files(Path(name).expanduser())])}
    if not isinstance(data, str | Path):
        return open_object(data, partial(choose_splits, split=split), file_fingerprint)
    if not is_local(data):
        return _open_hub(str(data), split, streaming, subset)
    if not str(data):  # which a path would take for the working folder
        raise UserError("the data have an empty name; pass a file, a folder or a hub id")
    path = Path(data).expanduser()
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _open_saved(path, split)
    files = data_files(path)
    if len(files) == 1:
        return {"train": open_files(files)}
    parts = _files_by_part(files, path)
    chosen = choose_splits(parts, str(path), split if len(parts) > 1 else None)
    return {part: open_files(parts[name]) for part, name in chosen.items()}


def open_files(paths: list[Path]) -> RawRows:
    """The rows of files, one file after the other.

    Raises:
        UserError: a file that cannot be read at all.
    """
    files = [_open_file(path) for path in paths]
    if len(files) == 1:
        return files[0]
    if empty := [str(path) for path in paths if _is_empty(path)]:
        rank_zero_warn(f"no rows come from {', '.join(empty)}: there is nothing inside")
    return JoinedRows(files)


def data_files(path: Path) -> list[Path]:
    """The files that a path, a folder or a glob stands for, sorted by name.

    A folder without data files of its own stands for those of its folders, as the hub lays data sets out.

    Raises:
        UserError: nothing there, or data that are compressed in a way that is not read.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if not file.name.startswith(".") and file.name not in _NO_ROWS]
        inner = [file for folder in found if folder.is_dir() for file in sorted(folder.iterdir()) if _is_data(file)]
        files = [file for file in found if _is_data(file)]
        left = [file for file in found if file.is_file() and file not in files] + (inner if files else [])
        _check_left(path, left, files or inner)
        files = files or inner
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    else:
        raise UserError(f"{path} does not exist; check the path")
    if not files:
        raise UserError(f"{path} holds no data files; expected {', '.join(SUFFIXES)}")
    return files


def _is_data(file: Path) -> bool:
    return file.is_file() and file.name.lower().endswith(SUFFIXES) and file.name not in _NO_ROWS


def _check_left(folder: Path, left: list[Path], files: list[Path]) -> None:
    """Say which files of a folder are not read; refuse to leave out what holds rows by its name."""
    for file in left:
        if any(suffix.lower() in _KINDS for suffix in file.suffixes) and not _is_data(file):
            raise UserError(f"{file} is compressed in a way that is not read here; unpack it, or pack it with gzip")
    names = [str(file.relative_to(folder)) for file in left if not file.stem.isupper()]  # README, LICENSE
    if files and names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        rank_zero_warn(f"{folder}: {len(files)} files are read, but not {', '.join(names[:5])}{more}")


def _files_by_part(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the part that the words of their names say; all to train on where none says that, or nothing else."""
    parts: dict[str, list[Path]] = {}
    for file in files:
        name = str(file.relative_to(root)) if root.is_dir() else file.name
        words = set(re.split("[^a-z]+", name.lower()))
        said = [part for part, known in PARTS.items() if words & set(known)]
        parts.setdefault(said[0] if len(said) == 1 else "train", []).append(file)
    if "train" not in parts:
        return {"train": files}
    return {part: parts[part] for part in PARTS if part in parts}


def choose_splits(splits: Iterable[str], name: str, split: str | None) -> dict[str, str]:
    """Which split of a data set is read for each part.

    Args:
        splits: their names.
        name: of the data set.
        split: the only one to read; None for those of each part.

    Returns:
        Names of splits: that of `train`, and those of `validation` and `test` where there are such.

    Raises:
        UserError: there is no such split, or none to train on.
    """
    if (split or "train") not in splits:
        raise UserError(f"{name} has no split {split or 'train'!r}; it has {', '.join(splits)}; name one in `split`")
    if split is not None:
        return {"train": split}
    named = {part: next((word for word in words if word in splits), None) for part, words in PARTS.items()}
    if left := [word for word in splits if word not in named.values()]:
        rank_zero_info(f"{name}: split {', '.join(left)} is not read; name it in `split` to read it")
    return {part: word for part, word in named.items() if word is not None}


def _is_empty(path: Path) -> bool:
    """Whether a file certainly holds no row: nothing, an empty list, or a header."""
    kind, packed = _kind(path)
    if kind == ".parquet":
        return False
    head = head_of(path, packed).strip()
    return not head or re.fullmatch(rb"\[\s*\]", head) is not None or (kind in (".csv", ".tsv") and b"\n" not in head)


def _kind(path: Path) -> tuple[str, bool]:
    """The kind of a file, and whether it is gzipped."""
    packed = path.suffix.lower() == ".gz"
    return (Path(path.stem).suffix if packed else path.suffix).lower(), packed


def _open_file(path: Path) -> RawRows:
    kind, packed = _kind(path)
    if kind not in _KINDS:
        raise UserError(f"{path} is of an unknown kind; expected {', '.join(SUFFIXES)}")
    fingerprint = partial(file_fingerprint, path)
    if looks_like_html(head_of(path, packed=False)):
        # Line by line, so that its lines are counted as the bad rows they are.
        return JsonLines(path, False, fingerprint, cache_root(), is_html=True)
    if kind == ".parquet":
        from rlhf_lightning.data.sources.arrow_rows import ParquetRows  # slow to import, and often not needed

        return ParquetRows(path, packed, fingerprint, cache_root())
    head = head_of(path, packed)
    if wrong := packed_twice(head):
        raise UserError(f"{path} {wrong}")
    if kind in (".csv", ".tsv"):
        return CsvRows(path, packed, fingerprint, "\t" if kind == ".tsv" else ",")
    if head.startswith(b"[") or is_one_object(path, packed):
        return ListRows(partial(read_json, path, packed), f"{path} item", fingerprint)
    return JsonLines(path, packed, fingerprint, cache_root(), is_html=looks_like_html(head))


def _open_saved(path: Path, split: str | None) -> dict[str, RawRows]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged file makes of it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a whole data set as `save_to_disk` writes it ({reason[:300]}); save it again"
        ) from error
    for part in found.values() if isinstance(found, dict) else [found]:
        for file in part.cache_files:
            if Path(os.path.abspath(path)) not in Path(os.path.abspath(file["filename"])).parents:
                raise UserError(f"{path} names a file outside of itself ({file['filename']}); it is not read")
    return open_object(found, partial(choose_splits, split=split), file_fingerprint, str(path))


def _open_hub(name: str, split: str | None, streaming: bool, subset: str | None) -> dict[str, RawRows]:
    import datasets

    from rlhf_lightning.data.sources.arrow_rows import DatasetRows, StreamedDataset

    repo, _, named_split = name.partition(":")
    split = named_split or split
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    if split is not None:
        options["split"] = split
    if subset is not None:
        options["data_dir"] = subset
    try:
        found = datasets.load_dataset(repo, **options)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(
            f"{name} is not a file or folder here, and the hub gave no such data ({reason}); "
            "check the path or the id, written owner/name or owner/name:split"
        ) from error
    place = " ".join(part for part in (repo, subset) if part)
    by_split = {split: found} if split is not None else found
    make: Callable[[Any, str], RawRows] = StreamedDataset if streaming else DatasetRows
    parts = choose_splits(by_split, place, split)
    return {part: make(by_split[name], f"{place} {name}") for part, name in parts.items()}


def file_fingerprint(path: Path) -> str:
    """A hash of a file's content; that of a large file at rest is remembered in the cache."""
    state = path.stat()
    # A file written a moment ago may be written again within the resolution of its time.
    remembered = state.st_size > _BYTES_REMEMBERED and time.time() - state.st_mtime > _SECONDS_AT_REST
    # A copy may bring the time of its original along, but not the time of its own change.
    key, stamp = str(path.resolve()), [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    if remembered and (known := _read_memory().get(key)) and known[:-1] == stamp:
        return str(known[-1])
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if remembered:
        _remember(key, [*stamp, digest.hexdigest()])
    return digest.hexdigest()


def _read_memory() -> dict[str, list[Any]]:
    try:
        said = json.loads((cache_root() / "fingerprints.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    known = said.items() if isinstance(said, dict) else ()
    return {path: entry for path, entry in known if isinstance(entry, list) and len(entry) == 4}


def _remember(key: str, entry: list[Any]) -> None:
    """Write the memory anew, where that can be; what is forgotten, as one of two at once, is read once more."""
    memory = _read_memory()
    memory.pop(key, None)
    kept = dict([*memory.items(), (key, entry)][-_FILES_REMEMBERED:])
    with contextlib.suppress(OSError):
        cache_root().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=cache_root(), delete=False) as file:
            json.dump(kept, file)
        os.replace(file.name, cache_root() / "fingerprints.json")
