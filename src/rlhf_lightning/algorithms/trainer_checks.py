"""Which Trainer and callbacks go with stages that step their optimizer themselves."""

from __future__ import annotations

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

from rlhf_lightning.errors import UserError
from rlhf_lightning.lightning_compat import was_given_checkpoint_io
from rlhf_lightning.runs.checkpoint_files import WholeCheckpointIO

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
    """Let `ModelCheckpoint` save by time, and without asking for weights of before the step.

    It has a branch for manual optimisation that never looks at `train_time_interval`, and tells at its first checkpoint
    to rewrite `training_step`. Its other branch does what is wanted here, too.

    Args:
        trainer: Lightning's, before it fits.
    """
    for callback in trainer.checkpoint_callbacks:
        plain = type(callback).on_train_batch_end is ModelCheckpoint.on_train_batch_end
        if isinstance(callback, ModelCheckpoint) and plain:
            hook: Any = partial(_save_as_if_automatic, callback)
            callback.on_train_batch_end = hook  # type: ignore[method-assign]


def _save_as_if_automatic(callback: ModelCheckpoint, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
    ModelCheckpoint.on_train_batch_end(callback, trainer, SimpleNamespace(automatic_optimization=True), *args)  # type: ignore[arg-type]
