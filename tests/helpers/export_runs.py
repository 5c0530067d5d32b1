"""Stages that are exported on several processes and leave a checkpoint; imported by `helpers.distributed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers.stage_runs import strategy
from helpers.stages import adamw, fit, instruction_rows, preference_rows
from rlhf_lightning import FineTune, HFExport, InstructionDataModule, PreferenceDataModule, RewardModule, SFTModule

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}


def run(name: str, folder: str, root: str, stage: str = "sft", precision: str = "32-true", **finetune: Any) -> None:
    """Train for two steps; the export and the last checkpoint go to `root`.

    Args:
        name: the strategy, see `helpers.stage_runs.strategy`; `auto` for one process.
        folder: of the model.
        root: of the run.
        stage: `sft` or `reward`.
        precision: as the trainer takes it.
        **finetune: settings of `FineTune`.
    """
    torch.manual_seed(5)
    settings = {"optimizer": adamw(1e-2), "finetune": FineTune(**finetune), **CONSTANT}
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
    fit(
        module,
        data,
        strategy=strategy(name),
        devices=1 if name == "auto" else 2,
        precision=precision,
        callbacks=[HFExport(str(Path(root) / "export")), keep],
        enable_checkpointing=True,
        default_root_dir=root,
        max_steps=2,
        val_check_interval=1,
    )


def run_all(runs: list[dict[str, Any]]) -> None:
    """One run after the other."""
    for settings in runs:
        run(**settings)
