"""Signals that ask a run to stop: of schedulers, of a keyboard, of a terminal that hangs up, of SLURM before its limit.

A run is left at once where nothing is lost by it. Where weights change it is asked, and leaves when it can.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143, "SIGHUP": 129}
"""Exit codes of a run that was stopped and can be resumed, by the signal that stopped it."""

_active: list[SignalWatch] = []


class Stopped(SystemExit):
    """Ends a run that was asked to stop; uncaught, it ends the process with the right exit code and no traceback.

    Args:
        name: the signal, such as `SIGTERM`.

    Attributes:
        name: the signal.
        explained: whether somebody has said how to go on.
        agreed: whether all processes of the run stop here, or it was complete.
    """

    def __init__(self, name: str) -> None:
        super().__init__(EXIT_CODES[name])
        self.name = name
        self.explained = False
        self.agreed = False


class SignalWatch:
    """Takes signals in the place of the handlers that are there, until it is left; a context manager.

    In a thread other than the main one, where Python allows no handlers, it takes none.

    Attributes:
        received: name of the first signal that came; None before.
        deferred: whether signals are only noted down, for who asks for `received`. Otherwise the first one raises
            `Stopped` wherever the process is. The second Ctrl-C raises `KeyboardInterrupt` in any case.
        note: what is said when a signal is noted down; nothing if it is empty.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = False
        self.note = ""
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @staticmethod
    def active() -> SignalWatch | None:
        """The one that takes signals now, if any."""
        return _active[-1] if _active else None

    def __enter__(self) -> SignalWatch:
        """Take signals from now on, except those that this process was started to ignore."""
        if threading.current_thread() is threading.main_thread():
            for number in _numbers():
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put back the handlers that were there."""
        _active.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._receive_in_child(number)
            return
        is_first, name = self.received is None, signal.Signals(number).name
        if is_first:
            self.received = name
            if not self.deferred:
                raise Stopped(name)
            if self.note:
                # Not print, which must not be called while it is running already, as it may be here.
                with suppress(OSError):  # Ctrl-C ends the reader of a pipe, too
                    os.write(2, f"{name}: {self.note}\n".encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _receive_in_child(self, number: int) -> None:
        """In a forked process, such as a worker of a loader: it ends with its parent, not before."""
        if number != signal.SIGTERM:
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _numbers() -> list[signal.Signals]:
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP"):
        numbers.append(signal.SIGHUP)
    if "SLURM_JOB_ID" in os.environ and hasattr(signal, "SIGUSR1"):
        numbers.append(signal.SIGUSR1)
    return numbers
