"""What `torch.compile` generates, kept for the next run.

torch keeps it in the temporary folder, which is another on each node and for each job of a cluster, and empty after a
restart. Here it goes to the user's caches. That folder may be one of many machines, and torch asks neither which
processor code was generated for nor against which libraries, so each kind of machine has a folder of its own in it.
Several processes may use it at once: torch locks what it builds, and puts whole files into place.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from rlhf_lightning.caches import cache_root

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable of the folder, under torch's name for it."""


def keep_generated_code() -> None:
    """Let torch keep it in the user's caches from now on, in the processes that this one starts, too.

    Whoever has named a folder is left alone, and so is a process that has compiled before, for torch has named one
    then. Where nothing can be written the temporary folder is as good.
    """
    if FOLDER in os.environ:
        return
    folder = cache_root() / "compiled" / _kind_of_machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ[FOLDER] = str(folder)


def _kind_of_machine() -> str:
    """The same word wherever generated code runs."""
    told = [platform.machine(), platform.processor(), *platform.libc_ver()]
    for file, names in (("/proc/cpuinfo", ("flags", "Features")), ("/etc/os-release", ("ID", "VERSION_ID"))):
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # not Linux
            continue
        told += sorted({line for line in lines if line.startswith(names)})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
