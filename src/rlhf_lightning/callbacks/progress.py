"""A progress bar that also looks inside a PPO iteration."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rlhf_lightning.arguments import check_arguments

_INNER_FIRST = (
    "_val_progress_bar",
    "_test_progress_bar",
    "_predict_progress_bar",
    "_train_progress_bar",
)
"""Lightning's bars; one that stands below another is taken away before it."""


class StageProgressBar(TQDMProgressBar):
    """Lightning's bar, plus a second one for the parts of a long step: generating, scoring, updating.

    While it is in use, what Lightning and this package log on the terminal gets lines of its own above the bars.

    Args:
        refresh_rate: batches between two updates of the bar.
        leave: keep the bar of each epoch on the screen.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        check_arguments(StageProgressBar, locals())
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._inner: Any = None
        self._redirection = ExitStack()

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What the bar shows: the names of training metrics without `train/`, so that several have room."""
        return {name.removeprefix("train/"): value for name, value in super().get_metrics(trainer, pl_module).items()}

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """Move the second bar; it shows on a terminal only, since a log file cannot take lines back."""
        if self.is_disabled or not sys.stderr.isatty():
            return
        if self._inner is None or self._inner.desc.strip(": ") != stage:
            self._close()
            self._inner = Tqdm(total=total, desc=stage, leave=False, position=(2 * self.process_position) + 2)
        self._inner.n = done
        self._inner.refresh()
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make room for what is logged."""
        super().setup(trainer, pl_module, stage)
        log = logging.getLogger("pytorch_lightning")
        streams = [getattr(handler, "stream", None) for handler in log.handlers]
        if not self.is_disabled and (sys.stderr in streams or sys.stdout in streams):
            self._redirection.enter_context(logging_redirect_tqdm([log], tqdm_class=Tqdm))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log as before."""
        self._redirection.close()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the second bar with the step."""
        self._close()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean, with the bar of the training where it stood, and log as before."""
        self._close()
        bars = [getattr(self, name) for name in _INNER_FIRST]
        for bar in (bar for bar in bars if bar is not None):
            bar.leave = bar is self._train_progress_bar
            bar.close()
        self._redirection.close()
