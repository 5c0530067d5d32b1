"""The standard streams of a command, and what becomes of it when nobody reads them any more.

Whose result is what it prints ends quietly, as others in a pipe do. Whose result is in files goes on, and what it would
have said is thrown away. Nothing here is slow to import.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from contextlib import suppress
from typing import Any

UNREAD = 141
"""Exit code of a command whose reader has left: 128 and the number of SIGPIPE, as shells say it."""


class _Output(io.FileIO):
    """Standard output or error.

    Args:
        descriptor: 1 or 2, left open.
        is_needed: whether there is nothing left to do when nobody reads it.
    """

    def __init__(self, descriptor: int, is_needed: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.is_needed = is_needed
        self.ends_line = True

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write, or do without."""
        try:
            written = super().write(data)
        except OSError as e:
            is_unread = self._is_unread(e)
            if is_unread:
                throw_away(self.fileno())
                if self.is_needed:
                    raise SystemExit(UNREAD) from e
            elif self.fileno() == 1:
                raise
            return memoryview(data).nbytes  # there is no place left to say that errors cannot be said
        if written:
            self.ends_line = bytes(memoryview(data)[written - 1 : written]) in (b"\n", b"\r")
        return written

    def _is_unread(self, error: OSError) -> bool:
        """Whether the other end of a pipe was closed, or the terminal."""
        is_terminal = stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return error.errno == errno.EPIPE or (error.errno == errno.EIO and is_terminal)


def throw_away(descriptor: int) -> None:
    """Let a descriptor lead nowhere from now on.

    Args:
        descriptor: an open one.
    """
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)


def open_streams() -> None:
    """Open those that the command was started without, so that no file of a run gets their numbers."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def watch_output(is_needed: bool) -> None:
    """From now on, end quietly where nobody reads standard output any more, or go on without it.

    Streams that are none of the process's own, such as those of a notebook, are left as they are.

    Args:
        is_needed: whether there is nothing left to do then.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper or not _leads_to(stream, descriptor):
            continue
        is_unbuffered = isinstance(stream.buffer, io.FileIO)
        raw = stream.buffer if is_unbuffered else stream.buffer.raw
        if isinstance(raw, _Output):
            raw.is_needed = is_needed and descriptor == 1
            continue
        new = _Output(descriptor, is_needed and descriptor == 1)
        buffer: Any = new if is_unbuffered else io.BufferedWriter(new)
        with suppress(OSError):
            stream.flush()
        watched = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, watched)


def _leads_to(stream: io.TextIOWrapper, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def flush_output() -> None:
    """Write what was printed so far; Python would do it at its end, where nobody can say what went wrong."""
    try:
        sys.stdout.flush()
    except OSError:
        if _output(sys.stdout) is not None:
            throw_away(1)  # or Python tries once more
        raise


def begin_line() -> None:
    """End the line on which a bar, or half an answer, stands where standard error goes."""
    outputs = [output for stream in (sys.stdout, sys.stderr) if (output := _output(stream)) is not None]
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    same = [output for output in outputs if os.path.samestat(os.fstat(output.fileno()), os.fstat(2))]
    if not all(output.ends_line for output in same):
        print(file=sys.stderr)


def _output(stream: Any) -> _Output | None:
    """What a stream writes to, if it is watched."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Output) else None
