"""How much memory a piece of code takes: that of this process which no file backs."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import TracebackType

_M_MMAP_THRESHOLD = -3


def anonymous() -> int:
    """Bytes of memory that belong to this process alone; pages of mapped files, which the system takes back, do not."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


class PeakMemory:
    """The most that was taken inside a `with` block, looked at again and again by a thread.

    Attributes:
        peak: bytes above those at the beginning.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # blocks of that size go back to the system as soon as they are freed
        libc.malloc_trim(0)  # what was freed before would be taken again, and not be seen
        self._before = self.peak = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.0005):
            self.peak = max(self.peak, anonymous())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.peak -= self._before
