"""An exponential moving average of what is trained, exported beside the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.arguments import SHARE_BELOW_1, check_arguments
from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.errors import UserError
from rlhf_lightning.training.sharded import is_sharded

FOLDER = "ema_export"
"""Where the averaged model lies in a run's folder."""


class EMA(Callback):
    """Averages the trained weights of the model that is exported, and exports the average, too, at the end of `fit`.

    `average = decay * average + (1 - decay) * weights` after each batch, in PPO, RLOO and GRPO after each iteration
    (Ouyang et al. 2022, appendix C.4, with 0.992). It begins with the weights that training starts from. Training goes
    on with its own weights, which `HFExport` exports; frozen weights, and the value, reference and reward models, are
    not copied, so that with LoRA the average is as small as the adapters. Lightning's `EMAWeightAveraging` copies the
    whole module.

    Not for weights of which each process holds a part (ZeRO-3, FSDP2), and not for reward models, which are calibrated
    as they are at last.

    Args:
        decay: share of the average that a batch leaves.
        dirpath: where the averaged model goes, a Hugging Face folder as `HFExport` writes it; by default `ema_export`
            in the trainer's `default_root_dir`.

    Attributes:
        average: by the name of each trained weight, float32.
    """

    def __init__(self, decay: float = 0.992, dirpath: str | None = None) -> None:
        check_arguments(EMA, locals(), {"decay": SHARE_BELOW_1})
        self.decay, self.dirpath = decay, dirpath
        self.average: dict[str, Tensor] = {}
        self._steps = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin the average, or go on with that of the checkpoint.

        Raises:
            UserError: the weights are in parts, are a reward model's, are others than those of the checkpoint, or
                something else lies where the average is to go.
        """
        if isinstance(pl_module, RewardModule):
            raise UserError(
                "EMA is for models that answer: a reward model's calibration is that of its last weights; leave it out"
            )
        self._export(trainer).on_fit_start(trainer, pl_module)
        if is_sharded(pl_module.export_model):
            raise UserError("EMA cannot average weights of which each process holds a part: leave it out, or use ddp")
        trained = _trained(pl_module.export_model)
        if self.average and self.average.keys() != trained.keys():
            raise UserError("EMA: other weights are trained than in the checkpoint: resume with the same finetune")
        begun = self.average or {name: weight.detach().float().clone() for name, weight in trained.items()}
        self.average = {name: begun[name].to(weight.device) for name, weight in trained.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Take the weights in, if they were moved."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        for name, weight in _trained(pl_module.export_model).items():
            self.average[name].lerp_(weight.float(), 1 - self.decay)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Export the average; a `fast_dev_run` leaves nothing behind."""
        if trainer.fast_dev_run or not self._steps:  # type: ignore[attr-defined]
            return
        export = self._export(trainer)
        with self.used(pl_module.export_model):
            export.export(trainer, pl_module, export.target(trainer))
        rank_zero_info(f"the average of the weights was exported to '{export.target(trainer)}'")

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Let a model have the averaged weights in a `with` block, in the type of its own.

        Args:
            model: the one that is averaged.
        """
        own = {name: weight.data for name, weight in _trained(model).items()}
        try:
            for name, weight in _trained(model).items():
                weight.data = self.average[name].to(weight.dtype)
            yield
        finally:
            for name, weight in _trained(model).items():
                weight.data = own[name]

    def state_dict(self) -> dict[str, Any]:
        """The average, and the step that it was last moved at."""
        return {"average": self.average, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.average, self._steps = dict(state_dict["average"]), state_dict["steps"]

    def _export(self, trainer: pl.Trainer) -> HFExport:
        return HFExport(self.dirpath or str(Path(trainer.default_root_dir) / FOLDER))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
