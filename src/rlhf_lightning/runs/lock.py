"""One run at a time in a folder, or at a file."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.errors import UserError

LOCK = ".lock"

_held: set[int] = set()
"""Descriptors that hold locks in this process."""


@contextmanager
def locked(folder: Path, option: str = "--trainer.default_root_dir", file: str = "") -> Iterator[None]:
    """Hold a run's folder for the length of a `with` block; the lock goes with the process, however that ends.

    Args:
        folder: made if it is not there.
        option: that names it, for messages.
        file: name of the file in the folder that alone is held; the folder itself if it is empty.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path = folder / (f".{file}{LOCK}" if file else LOCK)
    try:
        missing = _missing(folder)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, folder / file, option)
    except OSError as e:
        raise UserError(f"{option}: '{folder}' cannot be written ({e.strerror}); choose another folder") from e
    try:
        yield
    finally:
        if descriptor is not None:
            _held.discard(descriptor)
            # Unlinked while it is held: who opened it before sees that it is gone and makes a new one.
            path.unlink(missing_ok=True)
            os.close(descriptor)
        for made in missing:  # a run that never began leaves nothing behind
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()


def remove_left_lock(folder: Path) -> None:
    """Remove the lock that a killed run has left in its folder; one that a run holds stays.

    Args:
        folder: need not be there.
    """
    if (folder / LOCK).exists():
        with suppress(UserError), locked(folder):
            pass


def holder(folder: Path) -> str | None:
    """Who holds a folder, as its lock says; None where none does, or the disk knows no locks.

    Args:
        folder: need not be there.
    """
    try:
        return (folder / LOCK).read_text(encoding="utf-8")
    except OSError:
        return None


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _take(path: Path, held: Path, option: str) -> int | None:
    """A descriptor that holds the lock; None where the disk knows no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"'{held}' is in use by another run ({holder or 'which has just begun'}); wait until it has "
                f"ended, or choose another {option}"
            ) from e
        except OSError as e:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            rank_zero_warn(
                f"'{held}' lies on a disk without locks ({e.strerror}): nothing keeps a second run out of it"
            )
            return None
        if _is_still_there(path, descriptor):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether the file was not removed, by who held it, between opening and locking it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """In a forked process, such as a loader's worker, which may outlive this one and would keep its locks."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
