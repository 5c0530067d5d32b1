"""How much memory there is for what could also be done without."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytorch_lightning as pl
import torch

_SHARE = 0.5
"""Of the free memory, what may be taken: activations and caches come on top."""


def available_memory(device: torch.device) -> int:
    """Bytes that could still be allocated.

    Args:
        device: of tensors; a GPU's own memory, else the main memory, as far as the process may use it.

    Returns:
        0 where nothing tells.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" if it has no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        limits.append(limit - used)
    return max(0, min(limits, default=0))


def has_room(module: pl.LightningModule, size: int) -> bool:
    """Whether every process has the memory for something besides what it holds; all must call it.

    Args:
        module: attached to a trainer.
        size: bytes that each process would allocate.
    """
    device = module.device
    # Main memory is shared by the processes of a machine, each of which would allocate as much.
    share = 1 if device.type == "cuda" else module.trainer.num_devices
    fits = torch.tensor(size * share <= _SHARE * available_memory(device), device=device)
    return bool(module.all_gather(fits).all())  # type: ignore[union-attr]
