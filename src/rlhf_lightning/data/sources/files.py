"""Opening what the user names: a file, a folder, a glob, a saved data set, a list, or a data set on the hub."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_lightning.data.sources.raw_rows import JoinedRows, ListRows, RawRows
from rlhf_lightning.data.sources.text_rows import CsvRows, JsonLines, head_of, looks_like_html, read_json_list
from rlhf_lightning.errors import UserError

Data = str | Path | list[dict[str, Any]]

_KINDS = (".json", ".jsonl", ".csv", ".parquet")
SUFFIXES = (*_KINDS, *(f"{kind}.gz" for kind in _KINDS))
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BYTES_REMEMBERED = 8 * 2**20
_SECONDS_AT_REST = 2
_FILES_REMEMBERED = 1000


def cache_root() -> Path:
    """The folder of all caches: `$RLHF_LIGHTNING_CACHE`, or `~/.cache/rlhf_lightning`; it need not exist."""
    return Path(os.environ.get("RLHF_LIGHTNING_CACHE") or "~/.cache/rlhf_lightning").expanduser()


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


def open_rows(data: Data, split: str = "train", streaming: bool = False, subset: str | None = None) -> RawRows:
    """Open the raw rows of a source; what takes a pass over them waits until it is asked for.

    Args:
        data: one of: a file (`.json`, `.jsonl`, `.csv`, `.parquet`, each possibly `.gz`); a folder or a glob of such
            files, read in order of name; a folder written by `save_to_disk`; a list of dicts; the id of a data set on
            the hub, `owner/name` or `owner/name:split`.
        split: which split of a hub or saved data set to read, when its id does not say.
        streaming: read a hub data set as it arrives, in order only, instead of fetching it whole.
        subset: folder within a hub data set.

    Raises:
        UserError: nothing there, or a file that cannot be read at all.
    """
    if isinstance(data, list):
        return ListRows(data, "the list of rows row")
    if not is_local(data):
        return _open_hub(str(data), split, streaming, subset)
    path = Path(data).expanduser()
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _open_saved(path, split)
    return open_files(data_files(path))


def open_files(paths: list[Path]) -> RawRows:
    """The rows of files, one file after the other.

    Args:
        paths: at least one.

    Raises:
        UserError: a file that cannot be read at all.
    """
    files = [_open_file(path) for path in paths]
    return files[0] if len(files) == 1 else JoinedRows(files)


def data_files(path: Path) -> list[Path]:
    """The files that a path, a folder or a glob stands for, sorted by name.

    Raises:
        UserError: nothing there.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.name.endswith(SUFFIXES)]
    elif glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    else:
        raise UserError(f"{path} does not exist; check the path")
    if not files:
        raise UserError(f"{path} holds no data files; expected {', '.join(SUFFIXES)}")
    return files


def _open_file(path: Path) -> RawRows:
    packed = path.suffix == ".gz"
    kind = Path(path.stem).suffix if packed else path.suffix
    if kind not in _KINDS:
        raise UserError(f"{path} is of an unknown kind; expected {', '.join(SUFFIXES)}")
    fingerprint = partial(file_fingerprint, path)
    if looks_like_html(head_of(path, packed=False)):
        # Line by line, so that its lines are counted as the bad rows they are.
        return JsonLines(path, False, cache_root(), fingerprint, is_html=True)
    if kind == ".csv":
        return CsvRows(path, packed, fingerprint)
    if kind == ".parquet":
        from rlhf_lightning.data.sources.arrow_rows import ParquetRows  # slow to import, and often not needed

        return ParquetRows(path, packed, cache_root(), fingerprint)
    head = head_of(path, packed)
    if head.startswith(b"["):
        return ListRows(partial(read_json_list, path, packed), f"{path} item", fingerprint)
    return JsonLines(path, packed, cache_root(), fingerprint, is_html=looks_like_html(head))


def _open_saved(path: Path, split: str) -> RawRows:
    import datasets

    from rlhf_lightning.data.sources.arrow_rows import DatasetRows

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return DatasetRows(saved, str(path), file_fingerprint)
    if split not in saved:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(saved)}; name one of these in `split`")
    return DatasetRows(saved[split], f"{path} {split}", file_fingerprint)


def _open_hub(name: str, split: str, streaming: bool, subset: str | None) -> RawRows:
    import datasets

    from rlhf_lightning.data.sources.arrow_rows import DatasetRows, StreamedDataset

    repo, _, named_split = name.partition(":")
    split = named_split or split
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    if subset is not None:
        options["data_dir"] = subset
    try:
        dataset = datasets.load_dataset(repo, split=split, **options)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(
            f"{name} is no file or folder here, and the hub gave no such data ({reason}); "
            "check the path or the id, written owner/name or owner/name:split"
        ) from error
    place = " ".join(part for part in (repo, subset, split) if part)
    return StreamedDataset(dataset, place) if streaming else DatasetRows(dataset, place)


def file_fingerprint(path: Path) -> str:
    """A hash of a file's content; that of a large file at rest is remembered in the cache.

    Args:
        path: the file.
    """
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
        return dict(json.loads((cache_root() / "fingerprints.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


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
