"""How a process of several ends: what is known of it, and how one that is gone without a word is noticed."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple


class Failure(NamedTuple):
    """The end of a process that ends the others.

    Attributes:
        rank: of the process.
        line: what it said, or what is said of it.
        code: the exit code of all.
        at: when, in seconds since 1970.
        is_told: whether the process itself said it.
        is_stop: whether it was asked to stop.
    """

    rank: int
    line: str
    code: int
    at: float
    is_told: bool = True
    is_stop: bool = False

    def sentence(self) -> str:
        """What the other processes say of it."""
        return f"rank {self.rank} {'was' if self.is_stop else 'failed:'} {self.line}; this process ends with it"

    def written(self) -> str:
        """For the others to read."""
        return json.dumps(self)

    @staticmethod
    def read(text: bytes | str) -> Failure:
        """What another process has written."""
        return Failure(*json.loads(text))


def write_error_file(failure: Failure, rank: int) -> None:
    """Tell torchrun, whose summary then shows the first failure of all.

    Args:
        failure: the first one of the run.
        rank: of this process. In the summary the earliest counts, and of those of one second any.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = f"rank {failure.rank}: {failure.line}"
        more = {"py_callstack": said, "timestamp": str(int(failure.at) + (failure.rank != rank))}
        Path(path).write_text(json.dumps({"message": {"message": said, "extraInfo": more}}), encoding="utf-8")


def how_it_ended(code: int) -> str:
    """How a process ended.

    Args:
        code: as `subprocess` gives it, minus the number of a signal.

    Example:
        >>> how_it_ended(7), how_it_ended(-15)
        ('ended with exit code 7', 'was ended by SIGTERM')
    """
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, f'signal {-code}')}" + (", perhaps as memory ran out" if code == -9 else "")


class Processes:
    """The processes of a run that share a host with this one, by their numbers there.

    Only where Linux shows them; elsewhere none is known, and none is found to be gone.

    Args:
        store: that all share.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._known: dict[int, tuple[int, str]] = {}
        try:
            # Containers of one host may not see each other's processes, and number theirs alike.
            self._key = f"processes/{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
        except OSError:
            self._key = ""

    def add(self, rank: int) -> None:
        """Let the others know this one."""
        if self._key and (started := _started(os.getpid())):
            self._store.append(self._key, f"{rank} {os.getpid()} {started}\n")

    def refresh(self) -> None:
        """Learn which there are."""
        if self._key and self._store.check([self._key]):
            lines = [line.split() for line in self._store.get(self._key).decode().splitlines()]
            self._known = {int(rank): (int(number), started) for rank, number, started in lines}

    def ranks(self) -> list[int]:
        """Of those that are known."""
        return sorted(self._known)

    def gone(self) -> list[tuple[int, int]]:
        """Rank and process number of those that have ended, however."""
        return [(rank, number) for rank, (number, started) in self._known.items() if _started(number) != started]


def _started(number: int) -> str:
    """When a process was started, by the clock of the system; empty if it has ended."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # proc(5): the state is field 3, the start field 22
    return "" if fields[0] in "ZX" else fields[19]
