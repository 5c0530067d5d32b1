"""Locks of extensions that are compiled when they are first needed, as DeepSpeed's are, and that a killed build leaves.

torch waits for a `lock` file to go, in silence and for ever. Who builds holds it open.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.cpp_extension import get_default_build_root

_OLD = 3600.0
"""Seconds after which nobody builds any more, on whatever machine."""


def see_to_locks() -> None:
    """Say of each lock who holds it, and remove those that were left behind."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with contextlib.suppress(OSError):
            _see_to(lock)


def _see_to(lock: Path) -> None:
    age = time.time() - lock.stat().st_mtime
    holders = _holders(lock)
    if holders:
        rank_zero_warn(f"process {holders[0]} compiles {lock.parent.name}: who needs it waits for '{lock}' to go")
    elif age > _OLD:
        lock.unlink()
        rank_zero_warn(f"removed '{lock}', which a killed build had left: every start would have waited for it")
    else:
        rank_zero_warn(
            f"no process of this machine holds '{lock}', for which this start may wait for ever: "
            "remove it, unless another machine compiles there"
        )


def _holders(file: Path) -> list[int]:
    """Processes of this machine that hold a file open, as far as they may be asked."""
    found, wanted = [], file.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held = descriptor.stat()
            if (held.st_dev, held.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(int(descriptor.parts[2]))
    return found
