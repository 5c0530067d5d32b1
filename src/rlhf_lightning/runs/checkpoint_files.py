"""Checkpoints as they lie on disk: written so that a half one is never found, and checked before they are read.

A checkpoint of one process is a file of `torch.save`: a zip archive, whose directory holds a CRC-32 of every record, so
that a file that is moved takes its checksums along. One of DeepSpeed is a folder, which gets them in `manifest.json`.
Both are written beside their place, forced to the disk, and then renamed; the one that was there stays until then.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch.serialization import get_crc32_options, set_crc32_options

from rlhf_lightning.errors import UserError

MANIFEST = "manifest.json"
PARTIAL, OLD = ".partial", ".replaced"
"""What is appended to a checkpoint's name while it is written, and to that of a folder while it is replaced."""

_VERSION, _SAVED_AT = "pytorch-lightning_version", "saved_at"
_TO_TRAIN = ("loops", "optimizer_states", "lr_schedulers")
_CHUNK, _READERS = 1 << 20, 8
_IS_FOLDER = 0x10


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way of writing and reading a checkpoint file, so that a half or changed one is never trained on.

    The modules of this package install it in every trainer that was given no `CheckpointIO`, from the command line and
    from Python alike. A file is written beside its place, forced to the disk and renamed, without a copy of it in
    memory; before one is loaded, the checksums of all its records are compared. Loading never runs code from a file:
    `weights_only=False` is not followed. Who needs it gives the trainer another `CheckpointIO`,
    `Trainer(plugins=[TorchCheckpointIO()])`.

    The command line also finds the checkpoint to go on from. With `trainer.fit(..., ckpt_path="last")` Lightning does
    that before any module is asked: it takes the file of that name which was changed last, and where there is none it
    starts from the beginning with a warning. A broken one is then refused, and the error names one that is whole.
    Paths with a protocol, such as `s3://`, are written as Lightning writes them, and not checked.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint in the place of the one that is there.

        Args:
            checkpoint: Lightning's; the time is added to it as `saved_at`, in seconds since 1970.
            path: of the file.
            storage_options: not taken, as in the parent.

        Raises:
            UserError: the disk is full or cannot be written; what was there is as it was.
        """
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        beside = path.with_name(path.name + PARTIAL)
        checksums = get_crc32_options()
        set_crc32_options(True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(beside)
            with beside.open("wb") as file:
                torch.save({**checkpoint, _SAVED_AT: time.time()}, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(beside, path)
        except (OSError, RuntimeError) as e:
            # torch.save stumbles once more over what a failed write leaves behind.
            cause = e if isinstance(e, OSError) else e.__context__
            if not isinstance(cause, OSError):
                raise
            raise UserError(f"the checkpoint '{path}' was not written: {cause.strerror or cause}") from e
        finally:
            set_crc32_options(checksums)
            with contextlib.suppress(OSError):
                remove(beside)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint that is whole; see `check_whole`.

        Args:
            path: of the file.
            map_location: where tensors go, as in `torch.load`.
            weights_only: taken for True, whatever it is.

        Raises:
            UserError: it is not whole; names one beside it that is.
        """
        if not _is_remote(path):
            try:
                check_whole(path)
                if Path(path).is_dir():
                    raise UserError(f"'{path}' is the folder of another strategy; resume with the one that wrote it")
            except UserError as e:
                other = _first_whole([Path(path).parent], False)[0]
                raise UserError(f"{e}, such as '{other}'" if other else str(e)) from e
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        return loaded


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


# Writing.


def put_in_place(new: Path, path: Path) -> None:
    """Rename what was just written to the name that it is found by; what has that name goes when the new one is there.

    Args:
        new: a file or folder, in the same folder as `path`.
        path: may be there already; of another kind, too.
    """
    old = path.with_name(path.name + OLD)
    if new.is_dir() or path.is_dir():  # cannot be exchanged in one step
        if path.exists():
            remove(old)
            path.rename(old)
        new.rename(path)
    else:
        os.replace(new, path)
    with contextlib.suppress(OSError):  # what cannot open a folder needs no such care
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Delete what a process that was killed while it wrote a checkpoint has left beside it.

    Args:
        folders: of checkpoints, which no process writes to.
    """
    for folder in folders:
        for path in folder.glob(f"*.ckpt{PARTIAL}"):
            remove(path)
        for path in folder.glob(f"*.ckpt{OLD}"):
            if path.with_name(path.name.removesuffix(OLD)).exists():
                remove(path)


def files_of(folder: Path) -> list[str]:
    """Names of all files of a checkpoint folder but its manifest, in an order that every process finds."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file, once it is safely on the disk."""
    size = crc = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        os.fsync(opened.fileno())
    return size, crc


def write_manifest(folder: Path, files: dict[str, tuple[int, int]], settings: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint folder, last of all its files.

    Args:
        folder: whose other files are there.
        files: what `checksum` says of each of `files_of(folder)`.
        settings: what must be the same to load it.
    """
    content = {_SAVED_AT: time.time(), "settings": settings, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"content": content, "crc32": _crc(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """`saved_at`, `settings` and `files` of a checkpoint folder.

    Raises:
        UserError: the folder has no manifest, or one that is not whole.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(_incomplete(folder, f"it has no {MANIFEST}"))
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content: dict[str, Any] = manifest["content"]
        if manifest["crc32"] != _crc(content):
            raise ValueError
        content["files"] = {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(_incomplete(folder, f"its {MANIFEST} is damaged")) from e


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# Reading.


def check_whole(path: str | Path, to_train: bool = False) -> None:
    """Refuse what is no checkpoint, or not as it was written; nothing of it is run.

    Args:
        path: of a file, or of a folder that DeepSpeed wrote.
        to_train: also refuse one that holds weights only.

    Raises:
        UserError: says in one line what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"the checkpoint '{path}' does not exist")
    if path.is_dir():
        _check_folder(path)
        return
    # What was found is kept: a large file is read once, though several ask.
    stat = path.stat()
    if problem := _problem_of_archive(str(path), stat.st_size, stat.st_mtime_ns):
        raise UserError(problem)
    checkpoint = load_plain(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(_foreign(path))
    if _VERSION not in checkpoint:
        raise UserError(_foreign(path))
    if to_train and (missing := [name for name in _TO_TRAIN if name not in checkpoint]):
        raise UserError(f"'{path}' holds no {missing[0]}: it was saved with save_weights_only; resume from a whole one")


def load_plain(path: Path) -> Any:
    """What a file of `torch.save` holds, its tensors left on the disk until they are read.

    Args:
        path: of the file, whole.

    Raises:
        UserError: it holds objects of classes that are not plain, which could run code, or is of another kind.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # whatever a pickle can do
        if not isinstance(e, pickle.UnpicklingError):
            raise UserError(_foreign(path)) from e
        named = re.search(r"GLOBAL (\S+)", str(e))
        what = f"an object of {named[1]}" if named else "more than tensors and plain values"
        raise UserError(f"'{path}' holds {what}, which could run code, so it is not loaded") from e


@lru_cache(maxsize=64)
def _problem_of_archive(path: str, size: int, changed_ns: int) -> str:
    """What is wrong with the archive of a file that has this size and was changed at this time; empty if nothing."""
    if size == 0:
        return _incomplete(path, "it is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                return _foreign(path)
            if not any(record.filename.endswith("/data.pkl") for record in records):
                return _foreign(path)
            # A record that is said to be a folder is read as nothing, whatever it holds.
            hidden = [record.filename for record in records if record.external_attr & _IS_FOLDER]
            broken = hidden[0] if hidden else archive.testzip()
    except Exception:  # damage anywhere: as many kinds of error as there are fields
        return _incomplete(path, "it is cut off or damaged")
    return _incomplete(path, f"its record {broken!r} is damaged") if broken else ""


def _check_folder(folder: Path) -> None:
    if not (folder / MANIFEST).exists() and not (folder / "latest").exists():  # which DeepSpeed writes last
        raise UserError(_foreign(folder))
    expected = read_manifest(folder)["files"]
    if missing := sorted(expected.keys() - set(files_of(folder))):
        raise UserError(_incomplete(folder, f"{missing[0]!r} is missing"))
    if getattr(rank_zero_only, "rank", 0) != 0:
        return  # all processes load the folder that the first one has found to be whole
    with ThreadPoolExecutor(_READERS) as readers:
        whole = readers.map(partial(_is_as_written, folder), expected, expected.values())
    for name, as_written in zip(expected, whole, strict=True):
        if not as_written:
            raise UserError(_incomplete(folder, f"{name!r} has changed"))


def _is_as_written(folder: Path, name: str, said: tuple[int, int]) -> bool:
    stat = (folder / name).stat()
    return (stat.st_size, _crc_of_file(str(folder / name), stat.st_size, stat.st_mtime_ns)) == said


@lru_cache(maxsize=4096)
def _crc_of_file(path: str, size: int, changed_ns: int) -> int:
    return checksum(Path(path))[1]


def _incomplete(path: str | Path, why: str) -> str:
    return f"'{path}' is not a complete checkpoint ({why}); resume from another one"


def _foreign(path: str | Path) -> str:
    return f"'{path}' is no Lightning checkpoint; pass one that a run wrote into its folder checkpoints"


def newest_whole(folders: Iterable[Path], to_train: bool = False) -> Path | None:
    """The checkpoint that was saved last, of those that are whole; others that are newer are named in a warning.

    Args:
        folders: where to look, not below them.
        to_train: as in `check_whole`.

    Returns:
        None if none is whole.
    """
    found, broken = _first_whole(folders, to_train)
    for error in broken:
        rank_zero_warn(f"passed over a checkpoint: {str(error).partition('; ')[0]}")
    return found


def _first_whole(folders: Iterable[Path], to_train: bool) -> tuple[Path | None, list[UserError]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer."""
    broken = []
    for path in sorted(checkpoints_in(folders), key=_saved_at, reverse=True):
        try:
            check_whole(path, to_train)
        except UserError as e:
            broken.append(e)
        else:
            return path, broken
    return None, broken


def checkpoints_in(folders: Iterable[Path]) -> list[Path]:
    """Files and folders that have the name of a checkpoint, those that were just being replaced included."""
    found = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*.ckpt"))]
    left = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob(f"*.ckpt{OLD}"))]
    return found + [path for path in left if not path.with_name(path.name.removesuffix(OLD)).exists()]


def said_time(path: Path) -> float | None:
    """When a checkpoint was saved, whenever it was copied; None where it does not say.

    Args:
        path: of a file or folder.
    """
    with contextlib.suppress(UserError, OSError):
        said = read_manifest(path) if path.is_dir() else load_plain(path)
        if isinstance(said, dict) and isinstance(said.get(_SAVED_AT), float):
            return float(said[_SAVED_AT])
    return None


def _saved_at(path: Path) -> float:
    """The same; the time of the file where it does not say."""
    if (said := said_time(path)) is not None:
        return said
    try:
        return path.stat().st_mtime
    except OSError:  # a link to what is gone
        return 0.0
