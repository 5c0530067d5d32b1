"""Logs of a resumed run as those of one that was never stopped: no step twice, none missing."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from rlhf_lightning import lightning_compat
from rlhf_lightning.runs.log_files import LogPlaces, go_back, open_csv

_STATE = "rlhf_lightning_logs"


def keep_logs(trainer: Any) -> None:
    """Let checkpoints remember the place in the logs, and a resumed fit go on from it.

    Args:
        trainer: Lightning's, before it fits.
    """
    others = [callback for callback in trainer.callbacks if not isinstance(callback, _LogKeeper)]
    trainer.callbacks = [_LogKeeper(), *others]  # first: before what logs
    _open_tables(trainer)


@rank_zero_only
def _open_tables(trainer: Any) -> None:
    """Keep `CSVLogger` from removing the file that a resumed run goes on with, as it does once it is looked at."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            open_csv(logger)


class _LogKeeper(pl.Callback):
    """Remembers in each checkpoint where the logs stand, and what they have yet to be given of the step that it is of.

    Checkpoints are saved at the end of a batch, before Lightning hands its numbers to the loggers: those of that step
    would be lost with a process that is killed right after it has saved. The last values of all metrics are remembered,
    too: callbacks that watch one, and the model card, find them after a resume as before.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}
        self._places = LogPlaces()
        self._before_batch: list[dict[str, Any]] = []
        self._ends_epoch = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what the checkpoint remembers."""
        self._saved = checkpoint.get(_STATE, {})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take back what was logged after the checkpoint, then log what it had yet to log."""
        saved, self._saved = self._saved, {}
        trainer.callback_metrics.update(saved.get("metrics", {}))
        trainer.logged_metrics.update(saved.get("logged", {}))
        if not trainer.is_global_zero:
            return
        go_back(trainer.loggers, saved.get("places", [{"rows": 0}] * len(trainer.loggers)))
        if saved.get("to_log"):
            for logger in trainer.loggers:
                logger.log_metrics(saved["to_log"], step=saved["step"])
                logger.save()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Remember the place: if the batch fails it is run again, and whatever it logs is logged again."""
        self._ends_epoch = False
        if trainer.is_global_zero:
            self._before_batch = self._places(trainer.loggers)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is logged once an epoch is handed over after this hook."""
        self._ends_epoch = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything has been handed over."""
        self._ends_epoch = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember all that; called on every process."""
        to_log, step = lightning_compat.metrics_to_log(trainer, self._ends_epoch)
        state: dict[str, Any] = {"to_log": to_log, "step": step}
        state["metrics"] = _copied(trainer.callback_metrics)
        state["logged"] = _copied(trainer.logged_metrics)
        if trainer.is_global_zero:
            within = lightning_compat.is_within_batch(trainer)
            state["places"] = self._before_batch if within else self._places(trainer.loggers)
        checkpoint[_STATE] = state


def _copied(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu().clone() if isinstance(value, Tensor) else value for name, value in metrics.items()}
