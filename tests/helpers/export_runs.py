"""Stages that are exported on several processes and leave a checkpoint; imported by `helpers.distributed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers.memory import PeakMemory
from helpers.stage_runs import strategy
from helpers.stages import fit, instruction_rows, preference_rows, sgd
from rlhf_lightning import (
    FineTune,
    HFExport,
    InstructionDataModule,
    PreferenceDataModule,
    RewardModule,
    SFTModule,
)
from rlhf_lightning.cli.export import export

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}


class WatchedExport(HFExport):
    """Remembers how much memory it took."""

    peak = 0

    def export(self, *args: Any) -> None:
        with PeakMemory() as memory:
            super().export(*args)
        self.peak = memory.peak


def run(name: str, folder: str, root: str, stage: str = "sft", precision: str = "32-true", **finetune: Any) -> int:
    """Train for two steps; the export and the last checkpoint go to `root`.

    Args:
        name: the strategy, see `helpers.stage_runs.strategy`; `auto` for one process.
        folder: of the model.
        root: of the run.
        stage: `sft` or `reward`.
        precision: as the trainer takes it.
        **finetune: settings of `FineTune`.

    Returns:
        Bytes that the export took on this process.
    """
    torch.manual_seed(5)
    settings = {"optimizer": sgd(0.1), "finetune": FineTune(**finetune), **CONSTANT}
    if stage == "sft":
        rows = instruction_rows(12)
        data: Any = InstructionDataModule(folder, rows, rows[:2], batch_size=2, max_length=48)
        module: Any = SFTModule(folder, **settings)
    else:
        rows = preference_rows(12)
        data = PreferenceDataModule(folder, rows, rows[:4], batch_size=2, max_length=48)
        module = RewardModule(folder, **settings)
    # After validation, which calibrates a reward model.
    keep = ModelCheckpoint(Path(root) / "checkpoints", save_last=True, save_on_train_epoch_end=False)
    watched = WatchedExport(str(Path(root) / "export"))
    fit(
        module,
        data,
        strategy=strategy(name),
        devices=1 if name == "auto" else 2,
        precision=precision,
        callbacks=[watched, keep],
        enable_checkpointing=True,
        default_root_dir=root,
        max_steps=2,
        val_check_interval=1,
    )
    return watched.peak


def run_all(runs: list[dict[str, Any]]) -> list[int]:
    """One run after the other."""
    return [run(**settings) for settings in runs]


def export_all(exports: list[dict[str, Any]]) -> list[int]:
    """One `rlhf export` after the other, and the bytes that each took."""
    peaks = []
    for settings in exports:
        with PeakMemory() as memory:
            export(**settings)
        peaks.append(memory.peak)
    return peaks
