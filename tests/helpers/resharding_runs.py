"""Runs that are resumed by another number of processes than saved them; for `helpers.distributed`."""

from __future__ import annotations

import os
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from helpers import stage_runs, strategy_runs
from helpers.stages import MemoryLogger, trainer
from helpers.strategy_runs import TinyModule, ValidatedModule


class GroupsModule(TinyModule):
    """Two parameter groups that differ in learning rate and weight decay, and a buffer that counts steps."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.register_buffer("count", torch.zeros(3))

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": weights[::2], "lr": 3e-2, "weight_decay": 0.3}, {"params": weights[1::2], "lr": 1e-2}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": decay}

    def train_on(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().train_on(batch, batch_idx)
        self.count += 1
        self.seen["count"] = self.count.tolist()


class OtherModule(GroupsModule):
    """Trains one more weight."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.more = torch.nn.Linear(5, 5)

    def loss_sum(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().loss_sum(ids, mask) + self.more.weight.square().sum()


class ValidatedGroups(GroupsModule, ValidatedModule):
    pass


strategy_runs.GroupsModule = GroupsModule  # type: ignore[attr-defined]
strategy_runs.OtherModule = OtherModule  # type: ignore[attr-defined]


def world() -> int:
    """Number of processes of this run."""
    return int(os.environ["WORLD_SIZE"])


def tiny(
    name: str, folder: str, precision: Any = "32-true", module: str = "GroupsModule", **options: Any
) -> dict[str, Any]:
    """Train for two epochs; see `helpers.strategy_runs.fit`."""
    trained = {"gradient_clip_val": 0.1, "adam": True, "micro_sizes": [2, 2, 2]}
    settings = {"max_epochs": 2, "devices": world(), "precision": precision}
    return strategy_runs.fit(name, module, settings, folder=folder, **trained, **options)


def validated(name: str, folder: str, resume: str) -> dict[str, Any]:
    """Losses of the three batches with the weights of a checkpoint."""
    module = ValidatedGroups(folder, micro_sizes=[2, 2, 2])
    run = strategy_runs.trainer(name, devices=world())
    run.validate(module, strategy_runs.loader(), ckpt_path=resume, verbose=False)
    return module.seen


def stage(
    stage: str, name: str, folder: str, reward: str, checkpoints: str | None = None, resume: str | None = None
) -> dict[str, Any]:
    """Train a stage for two epochs, with a checkpoint after each.

    Args:
        stage: of `helpers.stage_runs`.
        name: the strategy.
        folder: language model.
        reward: reward model.
        checkpoints: written into this folder.
        resume: a checkpoint to go on from.
    """
    torch.manual_seed(5)
    module, data = stage_runs.STAGES[stage](folder, reward, True)
    keep, logger = stage_runs.KeepState(), MemoryLogger()
    callbacks: list[Any] = [keep]
    if checkpoints:
        callbacks.append(ModelCheckpoint(checkpoints, "{epoch}", save_top_k=-1, every_n_epochs=1))
    run = trainer(
        strategy=stage_runs.strategy(name),
        devices=world(),
        callbacks=callbacks,
        logger=logger,
        max_epochs=2,
        enable_checkpointing=bool(checkpoints),
    )
    run.fit(module, data, ckpt_path=resume)
    series = {metric: logger.series(metric) for call in logger.calls for metric in call}
    exact = {key: values for key, values in series.items() if not any(word in key for word in stage_runs.LEFT_OUT)}
    return {"state": keep.states[-1], "metrics": exact, "global_step": run.global_step, "error": ""}


def run_all(runs: list[dict[str, Any]]) -> list[Any]:
    """One run after the other in the same process."""
    tasks = {"validate": validated, "tiny": tiny, "stage": stage}
    return [tasks[run.pop("task", "stage" if "stage" in run else "tiny")](**run) for run in runs]
