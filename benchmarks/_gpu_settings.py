"""What all parts of gpu.py share: what was asked for, the models they take, a clock of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _synthetic import SHAPES, TINY_SHAPES, Shape
from measuring import GIB, between, synchronize

Result = dict[str, Any]
Hook = Callable[[int], None]
"""Told the number of a step."""


class Settings(NamedTuple):
    """What was asked for.

    Attributes:
        device: `cuda` or `cpu`.
        tiny: models of a few thousand weights, to try the scripts.
        precision: Lightning's, of training.
        steps: of training.
        warmup: first steps that do not count.
        folder: holds a folder with models for each shape.
    """

    device: str
    tiny: bool
    precision: str
    steps: int
    warmup: int
    folder: str

    def shape(self, name: str = "0.5B") -> Shape:
        """The model and what it is fed, by the name of `SHAPES`."""
        return (TINY_SHAPES if self.tiny else SHAPES)[name]

    def models(self, name: str = "0.5B") -> Path:
        """The folder with models of a shape."""
        return Path(self.folder, name)

    def policy(self, name: str = "0.5B") -> str:
        """The language model."""
        return str(self.models(name) / "policy")

    @property
    def fewer_steps(self) -> int:
        """Of what takes seconds: half of those that count."""
        return self.warmup + max(1, (self.steps - self.warmup) // 2)

    @property
    def product_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16

    @property
    def weight_dtype(self) -> torch.dtype:
        """What weights are held in."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """As a trainer of this precision computes."""
        mixed = self.precision == "bf16-mixed"
        return torch.autocast(self.device, torch.bfloat16) if mixed else nullcontext()


class Part(NamedTuple):
    """Something that is measured in a process of its own.

    Attributes:
        run: measures it, given its name.
        shapes: whose models it needs.
    """

    run: Callable[[str, Settings], Result]
    shapes: tuple[str, ...] = ("0.5B",)


def fit(
    module: Any, batches: list[Any], settings: Settings, before: Hook | None = None, after: Hook | None = None
) -> tuple[list[float], list[dict[str, float]]]:
    """Train on batches, one step each.

    Args:
        module: of a stage.
        batches: what its data module would hand to it.
        settings: of device and precision.
        before: called before each step.
        after: called after it, when the device has done its work.

    Returns:
        Seconds of each step, and what it logged.
    """
    import pytorch_lightning as pl

    ends: list[float] = []
    logged: list[dict[str, float]] = []

    class Clock(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ends.append(time.perf_counter())

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if before is not None:
                before(batch_idx)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            synchronize()
            if after is not None:
                after(batch_idx)
            ends.append(time.perf_counter())

    trainer = pl.Trainer(
        max_steps=len(batches),
        accelerator="gpu" if settings.device == "cuda" else "cpu",
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return between(ends), logged


def best_seconds(work: Callable[[], Any], times: int = 4) -> float:
    """The quickest of several runs; the first of them warms up."""
    found = []
    for _ in range(times):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def memory_text(result: Result) -> str:
    """The peak of a part: of the device, or of its process where there is none."""
    return f"{(result['device_peak'] or result['peak']) / GIB:.2f} GiB"
