"""What processes tell one another besides gradients: rows that all need, and plain objects."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from torch import Tensor


def rows_of_all_ranks(module: pl.LightningModule, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the batch that was dealt out to them; every process must call it.

    Args:
        module: attached to a running trainer.
        rows: this rank's, as many and as wide as on every other, `[B, ...]`.

    Returns:
        `[B * ranks, ...]`: the first row of each rank, then the second of each, and so on; no gradient.
    """
    if module.trainer.world_size == 1:
        return rows
    everyone: Tensor = module.all_gather(rows)  # type: ignore[assignment]  # [ranks, B, ...]
    return everyone.transpose(0, 1).flatten(0, 1)


def gather_objects(trainer: pl.Trainer, mine: Any) -> list[Any]:
    """What each process has, by rank; every process must call it.

    Args:
        trainer: a running one.
        mine: plain values.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, mine)
    return everyone
