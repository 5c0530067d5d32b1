"""Checkpoint folders that all processes write and read together, as DeepSpeed does, made as safe as a file is.

Its engine writes each file where it will stay, and unpickles what it finds. Here a folder is written beside its place
and renamed by one process when all have finished, with a manifest; and before one is loaded its manifest is compared,
and each file must hold tensors, plain values, and the three classes of DeepSpeed that its own files hold.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.serialization import safe_globals

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import (
    check_whole,
    checksum,
    files_of,
    load_plain,
    put_in_place,
    read_manifest,
    remove,
    write_manifest,
)

_LATE = 90.0
"""Seconds that a network file system is given to show what another process has written; NFS looks again after 60."""
_shared = set[Path]()
"""Folders that all processes are known to see."""
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def finish_together(partial: Path, path: Path, settings: dict[str, Any]) -> None:
    """Give a folder that all processes have written its manifest and its name. Every process must call it.

    Args:
        partial: the folder as it was written, beside its place.
        path: its place.
        settings: of the run, which must be the same to train on from it.

    Raises:
        UserError: a process does not see what others have written, so that none could go on from it.
    """
    # A network file system may show late what other processes wrote, so each is asked for what it sees.
    seen = _gather(files_of(partial))
    names = set().union(*seen)
    if path.parent not in _shared:
        try:
            agree(lambda: _check_seen(partial, path, names))
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)  # each on its own disk
            raise
        _shared.add(path.parent)
    mine = {}
    for number, name in enumerate(sorted(names)):
        witnesses = [rank for rank, names in enumerate(seen) if name in names]
        if witnesses[number % len(witnesses)] == dist.get_rank():
            mine[name] = checksum(partial / name)
    parts = _gather(mine)
    if dist.get_rank() == 0:
        write_manifest(partial, {name: part[name] for part in parts for name in part}, settings)
        put_in_place(partial, path)
    dist.barrier()


def _check_seen(partial: Path, path: Path, names: set[str]) -> None:
    """See that all files are here, those of others too."""
    deadline = time.monotonic() + _LATE
    while lacking := sorted(names.difference(files_of(partial))):
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {dist.get_rank()} on {socket.gethostname()} does not see '{lacking[0]}' of the checkpoint "
                f"'{path}', which another process wrote: nothing could be resumed from it; use a "
                "--trainer.default_root_dir that all nodes share"
            )
        time.sleep(0.1)


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """A folder for the length of a `with` block, which all processes write and read. Every process must call it.

    Args:
        folder: made anew, and removed again.
    """
    if dist.get_rank() == 0:
        remove(folder)
        folder.mkdir()
    dist.barrier()
    try:
        yield
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            remove(folder)


def check_together(
    path: Path,
    settings: dict[str, Any] | None,
    loading: Callable[[], AbstractContextManager[None]] | None = None,
    check: Callable[[Path], Any] = lambda path: None,
) -> None:
    """Refuse a folder on all processes if there is anything wrong with it. Every process must call it.

    Args:
        path: the same on every process.
        settings: of this run, to be compared with those it was saved with; None where they may differ.
        loading: in what its files of tensors are tried; None for `plain_loading`.
        check: raises on the first process what else is wrong with it.

    Raises:
        UserError: it is not whole, holds what could run code, or does not fit.
    """
    agree(lambda: _check_folder(path, settings) if dist.get_rank() == 0 else None)
    agree(lambda: check(path) if dist.get_rank() == 0 else None)
    names = [name for name in files_of(path) if name.endswith(".pt")]
    mine = [path / name for name in names[dist.get_rank() :: dist.get_world_size()]]
    agree(lambda: _check_plain(mine, loading or plain_loading))


def _check_folder(path: Path, settings: dict[str, Any] | None) -> None:
    if path.is_file():
        raise UserError(f"'{path}' is a checkpoint of another strategy; resume with the one that wrote it")
    check_whole(path)
    saved = read_manifest(path)["settings"]
    for name, value in (settings or {}).items():
        if saved.get(name) != value:
            raise UserError(
                f"'{path}' was saved with {name} {saved.get(name)}, now it is {value}; resume with the same"
            )


def _check_plain(files: list[Path], loading: Callable[[], AbstractContextManager[None]]) -> None:
    with loading():
        for file in files:
            load_plain(file)


@contextmanager
def plain_loading() -> Iterator[None]:
    """Let `torch.load`, whoever calls it and however, take nothing but tensors, plain values and what is known here."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with safe_globals([LossScaler, ZeroStageEnum, fragment_address, (_member, "builtins.getattr")]):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _member(kind: Any, name: Any) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 write a member of an enum, and of nothing else."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError("GLOBAL getattr")
    return ZeroStageEnum[name]


def agree(check: Callable[[], Any]) -> None:
    """Raise on every process what a check raises on any. Every process must call it.

    Args:
        check: may raise a `UserError`.
    """
    error = ""
    try:
        check()
    except UserError as e:
        error = str(e)
    if errors := [each for each in _gather(error) if each]:
        raise UserError(errors[0])


def _gather(mine: Any) -> list[Any]:
    """What each process has, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
