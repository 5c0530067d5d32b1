"""Memory of the host: that what a process frees goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3): blocks of this size get pages of their own
_SMALL, _LARGE = 1 << 17, 1 << 25
"""The threshold that glibc begins with, and that which it comes to by itself once a large block has been freed."""


def free_at_once(on: bool) -> None:
    """Give freed tensors back to the system at once; on Linux with glibc, elsewhere nothing is changed.

    Left alone, glibc takes blocks of up to 32 MiB from one heap as soon as one of them has been freed. Where each
    weight is loaded or gathered whole, cut, and freed but for this process's part, the parts lie scattered over all
    that was ever there, and the heap keeps it: each of two was measured to hold 2.7 times its half of the weights.

    Args:
        on: from now on; False for glibc's own way again.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(_THRESHOLD, _SMALL if on else _LARGE)
        libc.malloc_trim(0)
