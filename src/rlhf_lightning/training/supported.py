"""What a strategy or precision cannot do, refused before it trains."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy

from rlhf_lightning.errors import UserError
from rlhf_lightning.training.deepspeed import DeepSpeedStrategy
from rlhf_lightning.training.fsdp2 import FSDP2Strategy


def refuse_unsupported(trainer: pl.Trainer) -> None:
    """Refuse strategies and precisions under which a step would not be what it is on one process.

    Args:
        trainer: Lightning's.

    Raises:
        UserError: says what to set instead.
    """
    strategy, ours = trainer.strategy, "rlhf_lightning.DeepSpeedStrategy"
    sharded = "rlhf_lightning.FSDP2Strategy"
    if trainer.precision in ("16-mixed", "16-true"):
        raise UserError(f"precision {trainer.precision} is not supported: set trainer.precision to bf16-mixed.")
    if isinstance(strategy, LightningDeepSpeedStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        raise UserError(f"Lightning's DeepSpeed strategy loses gradients here: set trainer.strategy to {ours}.")
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy):
        raise UserError(f"Lightning's ModelParallelStrategy shards nothing here: set trainer.strategy to {sharded}.")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | DeepSpeedStrategy | FSDP2Strategy):
        name = type(strategy).__name__
        raise UserError(f"strategy {name} is not supported: set trainer.strategy to auto, ddp, {ours} or {sharded}.")


def check_skipping(trainer: pl.Trainer) -> None:
    """Refuse to skip steps where a gradient cannot be forgotten.

    Args:
        trainer: Lightning's, before it trains.

    Raises:
        UserError: the strategy keeps parts of gradients to itself.
    """
    if isinstance(trainer.strategy, LightningDeepSpeedStrategy):
        raise UserError(
            "steps cannot be skipped on DeepSpeed, whose engine keeps a gradient to itself: leave out SkipNonFinite; a "
            "number that is not finite stops the run before the weights change"
        )


def check_parts_apart(trainer: pl.Trainer, option: str) -> None:
    """Refuse to treat the parts that an optimizer moves each by itself where the gradient is kept in one piece.

    Args:
        trainer: Lightning's, before it trains.
        option: that asks for it.

    Raises:
        UserError: the strategy keeps the gradient to itself.
    """
    if isinstance(trainer.strategy, LightningDeepSpeedStrategy):
        raise UserError(
            f"{option} cannot be had on DeepSpeed, whose engine keeps the gradient of policy and value model in one "
            "piece: leave it out, or use ddp or rlhf_lightning.FSDP2Strategy"
        )
