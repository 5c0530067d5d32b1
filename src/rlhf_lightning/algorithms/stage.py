"""What all stages are inside Lightning: which Trainer and batches they go with, and that checkpoints are saved."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from rlhf_lightning.errors import UserError
from rlhf_lightning.warning_filters import filter_warnings

_ACCUMULATION = (
    "the stages accumulate by themselves; set the data's batch size to the whole batch and the module's "
    "micro_batch_size to what fits in memory"
)
_CALLBACKS: dict[type, str] = {
    GradientAccumulationScheduler: _ACCUMULATION,
    LearningRateFinder: "it changes the learning rate in automatic optimisation only; compare short runs (max_steps)",
    BatchSizeFinder: "a batch is one optimizer step here, whatever fits; bound memory with max_tokens_per_batch",
    StochasticWeightAveraging: "it trains one more epoch for its averages; use EMAWeightAveraging of the same package",
}
"""Lightning's callbacks that do not go with manual optimisation, and what to do instead."""


class Stage(pl.LightningModule):
    """A module that steps its optimizer itself, as the one for each stage does."""

    def __init__(self) -> None:
        super().__init__()
        filter_warnings()
        self.automatic_optimization = False
        if "lightning.pytorch" in sys.modules:
            rank_zero_warn(
                "the package lightning is imported, whose Trainer refuses modules of pytorch_lightning, such as "
                f"{type(self).__name__}: write import pytorch_lightning as L in place of import lightning as L"
            )

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add none, and see to those of the trainer.

        Raises:
            UserError: a callback, or another option of the trainer, does not go with manual optimisation.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            _check_trainer(self.trainer)
            _let_checkpoints_save(self.trainer)
        return []

    def check_batch(self, batch: Any, kind: type, data: str) -> None:
        """Refuse a batch of another kind of data.

        Args:
            batch: as the loader gave it.
            kind: the NamedTuple whose fields are needed; a batch may be of another class with the same fields.
            data: name of the data module that gives such batches.

        Raises:
            UserError: names a field that is missing.
        """
        needed = [name for name in kind._fields if name not in kind._field_defaults]  # type: ignore[attr-defined]
        missing = [name for name in needed if not hasattr(batch, name)]
        if missing:
            raise UserError(
                f"{type(self).__name__} takes batches like rlhf_lightning.batches.{kind.__name__}, which {data} makes; "
                f"this {type(batch).__name__} has no attribute {missing[0]}"
            )

    def on_fit_end(self) -> None:
        """Say why a run ended before the number of steps that it was given."""
        trainer = self.trainer
        if not 0 < trainer.global_step < trainer.max_steps or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        reached = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
        limit = f"max_epochs {trainer.max_epochs}, which can be raised," if reached else "a callback or max_time"
        rank_zero_info(f"{limit} ended the run after {trainer.global_step} of max_steps {trainer.max_steps}")


def _check_trainer(trainer: Any) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise UserError(f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): {_ACCUMULATION}")
    if trainer.gradient_clip_val is not None:
        raise UserError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): the stages clip by themselves; set the module's "
            "gradient_clip_val instead"
        )
    for callback in trainer.callbacks:
        for kind, advice in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} does not go with these modules: {advice}")


def _let_checkpoints_save(trainer: pl.Trainer) -> None:
    """Let `ModelCheckpoint` save by time, and without asking for weights of before the step.

    It has a branch for manual optimisation that never looks at `train_time_interval`, and tells at its first checkpoint
    to rewrite `training_step`. Its other branch does what is wanted here, too.
    """
    for callback in trainer.checkpoint_callbacks:
        plain = type(callback).on_train_batch_end is ModelCheckpoint.on_train_batch_end
        if isinstance(callback, ModelCheckpoint) and plain:
            hook: Any = partial(_save_as_if_automatic, callback)
            callback.on_train_batch_end = hook  # type: ignore[method-assign]


def _save_as_if_automatic(callback: ModelCheckpoint, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
    ModelCheckpoint.on_train_batch_end(callback, trainer, SimpleNamespace(automatic_optimization=True), *args)  # type: ignore[arg-type]
