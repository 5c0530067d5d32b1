"""Which Trainer and callbacks go with stages that step their optimizer themselves."""

from __future__ import annotations

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

from rlhf_lightning.errors import UserError
from rlhf_lightning.lightning_compat import save_where_passed, was_given_checkpoint_io
from rlhf_lightning.runs.checkpoint_files import WholeCheckpointIO

_ACCUMULATION = (
    "the stages accumulate by themselves; set the data's batch size to the whole batch and the module's "
    "micro_batch_size to what fits in memory"
)
_CALLBACKS: dict[type, str] = {
    GradientAccumulationScheduler: _ACCUMULATION,
    LearningRateFinder: "it changes the learning rate in automatic optimisation only; compare short runs (max_steps)",
    BatchSizeFinder: "a batch is one optimizer step here, whatever fits; bound memory with max_tokens_per_batch",
    StochasticWeightAveraging: "it trains one more epoch for its averages; use rlhf_lightning.EMA",
}
"""Lightning's callbacks that do not go with manual optimisation, and what to do instead."""


def check_trainer(trainer: Any) -> None:
    """Refuse what manual optimisation would silently leave undone.

    Args:
        trainer: Lightning's, before it fits.

    Raises:
        UserError: names the option or callback, and what to use instead.
    """
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


def keep_checkpoints_whole(trainer: pl.Trainer) -> None:
    """Let checkpoint files be written and read by `WholeCheckpointIO`, unless the trainer was given something else.

    Args:
        trainer: Lightning's, before it restores what a checkpoint holds.
    """
    if not was_given_checkpoint_io(trainer):
        trainer.strategy.checkpoint_io = WholeCheckpointIO()


def let_checkpoints_save(trainer: pl.Trainer) -> None:
    """Let `ModelCheckpoint` save by time, and at the end of each batch whose steps reach or pass a multiple.

    It has a branch for manual optimisation that never looks at `train_time_interval`, and tells at its first checkpoint
    to rewrite `training_step`. Its other branch does what is wanted here, too, save that `every_n_train_steps` looks
    for steps that are a multiple: a batch of several steps passes over some.

    Args:
        trainer: Lightning's, before it fits.
    """
    for callback in trainer.checkpoint_callbacks:
        plain = type(callback).on_train_batch_end is ModelCheckpoint.on_train_batch_end
        if isinstance(callback, ModelCheckpoint) and plain:
            saving = _Saving(callback)
            vars(callback).update(on_train_start=saving.start, on_train_batch_end=saving.end_batch)


class _Saving:
    """The hooks of a checkpoint callback, as if optimisation were automatic.

    Args:
        callback: whose.
    """

    def __init__(self, callback: ModelCheckpoint) -> None:
        self.callback, self.steps = callback, 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        type(self.callback).on_train_start(self.callback, trainer, pl_module)
        self.steps = trainer.global_step  # a resumed run begins further on

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        automatic: Any = SimpleNamespace(automatic_optimization=True)
        before, self.steps = self.steps, trainer.global_step
        ModelCheckpoint.on_train_batch_end(self.callback, trainer, automatic, *args)
        save_where_passed(self.callback, trainer, before)
