"""What a module tells the outside besides numbers: texts for the loggers, and where it is inside a long step."""

from __future__ import annotations

import sys
import time
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CometLogger, MLFlowLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_info


@runtime_checkable
class ProgressListener(Protocol):
    """A callback that wants to know how far a long step has come."""

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Receive `done` of `total` parts of `stage`, for instance `generating`."""


def report_progress(module: pl.LightningModule, stage: str, done: int, total: int) -> None:
    """Tell every callback that listens how far the current step has come.

    Args:
        module: a module attached to a trainer.
        stage: name of the part of the step, for instance `generating`.
        done: finished parts.
        total: all parts.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ProgressListener):
            callback.on_progress(stage, done, total)


class Patience:
    """Tells when somebody who waits has waited long enough for a word.

    Args:
        seconds: between two words.
    """

    def __init__(self, seconds: float = 4.0) -> None:
        self.seconds = seconds
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """Whether it is time for a word; then the waiting begins anew."""
        now = time.monotonic()
        if now - self._since < self.seconds:
            return False
        self._since = now
        return True


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has held so far, GiB, as `memory_gib`; nothing where that cannot be asked.

    Args:
        device: of tensors on a GPU, there; else all that the process holds in main memory.
    """
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB elsewhere
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def log_text(module: pl.LightningModule, key: str, text: str, step: int) -> None:
    """Write a text to every logger that takes one: TensorBoard, MLflow (a file), W&B (a table) and Comet.

    Any other logger whose `experiment` has TensorBoard's `add_text` gets it too; for the rest one line says that texts
    are left out.

    Args:
        module: a module attached to a trainer.
        key: name of the text.
        text: Markdown.
        step: optimizer steps done.
    """
    if not module.trainer.is_global_zero:
        return
    loggers: list[Any] = module.trainer.loggers
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)  # a logger of the user need not have one
        if hasattr(experiment, "add_text"):
            experiment.add_text(key, text, step)
        elif isinstance(logger, MLFlowLogger):
            experiment.log_text(logger.run_id, text, f"{key}/step={step:08d}.md")
        elif isinstance(logger, WandbLogger):
            logger.log_text(key, columns=["text"], data=[[text]], step=step)
        elif isinstance(logger, CometLogger):
            experiment.log_text(text, step=step, metadata={"key": key})
        else:
            _say_left_out(type(logger).__name__)


@lru_cache
def _say_left_out(logger: str) -> None:
    rank_zero_info(f"{logger} takes no texts: sampled answers are left out of it")
