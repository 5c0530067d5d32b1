"""What the command line says of an error that nothing foresaw: one line, and an exit code.

Nothing here is slow to import.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from rlhf_lightning.errors import RankError, UserError

DEBUG = "--debug"
"""The word that shows tracebacks, wherever it stands."""
_VARIABLE = "RLHF_DEBUG"

_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, or write to another disk"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may use, or change its permissions"
    ),
    errno.EEXIST: "choose another place, or move away what is there",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG), "check the path"),
}
"""What to do where a path or its disk is to blame, by what the system says."""
_FAILED = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT)
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory", "malloc of size")
_LONGEST = 300  # characters of a path, or of another library's message


def take_debug(words: list[str]) -> list[str]:
    """The words of a command line without the one that asks for tracebacks, which processes started from here inherit.

    Args:
        words: of the command line.
    """
    if DEBUG in words:
        os.environ[_VARIABLE] = "1"
    return [word for word in words if word != DEBUG]


def wants_traceback() -> bool:
    """Whether tracebacks are asked for, by word or by `RLHF_DEBUG=1`."""
    return os.environ.get(_VARIABLE, "") not in ("", "0")


def said_of(error: Exception) -> tuple[str, int]:
    """One line for any error, and the exit code: 2 for what the user can fix, 1 for anything else.

    Args:
        error: as it reached the command line.

    Example:
        >>> said_of(KeyError("x"))
        ("KeyError: 'x'; this was not foreseen, add --debug to see where it comes from", 1)
        >>> said_of(OSError(28, "No space left on device", "runs/a.ckpt"))
        ('runs/a.ckpt: No space left on device; make room, or write to another disk', 2)
    """
    if isinstance(error, RankError):
        return str(error), error.code
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return _worker_line(str(cause)), 2
        if found := _of_disk(cause) or _of_memory(cause) or _of_loader(cause):
            return found
    text = _worker_line(str(error)).strip()
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    said = ": ".join(part for part in (type(error).__name__, _short(line)) if part)
    return f"{said}; this was not foreseen, add {DEBUG} to see where it comes from", 1


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _worker_line(text: str) -> str:
    """A message without the traceback that PyTorch puts before it when it comes from another process."""
    if "Original Traceback" not in text:
        return text
    last = text.strip().splitlines()[-1]
    return re.sub(r"^([\w.]*\.)?UserError: ", "", last)


def _of_disk(error: BaseException) -> tuple[str, int] | None:
    where = getattr(error, "filename", None)
    place = f"{_short(str(where))}: " if where is not None else ""
    for words in _NO_ROOM:  # as safetensors and PyTorch pass it on
        if words in str(error):
            return f"{place}{words}; {_HINTS[errno.ENOSPC]}", 2
    number = error.errno if isinstance(error, OSError) else None
    if number in _FAILED:
        return f"{place}{os.strerror(number)}; the disk, or the way to it, failed", 1
    if number in _HINTS and place:
        return f"{place}{os.strerror(number)}; {_HINTS[number]}", 2
    return None


def _of_memory(error: BaseException) -> tuple[str, int] | None:
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
        return None
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"memory ran out ({_short(line)}); smaller batches, lengths or models need less", 2


def _of_loader(error: BaseException) -> tuple[str, int] | None:
    if not str(error).startswith("DataLoader worker"):
        return None
    line = str(error).strip().splitlines()[0].rstrip(".")
    return f"{line}; a process that loads data died, perhaps as memory ran out, see --data.num_workers", 1


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
