"""Stages that are exported on several processes and leave a checkpoint; imported by `helpers.distributed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers.memory import PeakMemory
from helpers.stage_runs import strategy
from helpers.stages import fit, instruction_rows, preference_rows, prompt_rows, sgd
from rlhf_lightning import (
    FineTune,
    HFExport,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
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


class PPOWithExportedValue(PPOModule):
    """Can show its value model as what it exports."""

    shows_value = False

    @property
    def export_model(self) -> Any:
        return self.value.model if self.shows_value else super().export_model


class ExportWithValue(WatchedExport):
    """Also writes the value model, beside the export; its config is that of the run, probe and pad token included."""

    def export(self, trainer: Any, pl_module: Any, folder: Path) -> None:
        super().export(trainer, pl_module, folder)
        pl_module.shows_value = True
        super().export(trainer, pl_module, folder.with_name("value"))
        pl_module.shows_value = False


def ppo(folder: str, reward: Any, **settings: Any) -> tuple[Any, Any]:
    """Two rollouts of two prompts."""
    sizes = {"rollout_batch_size": 2, "minibatch_size": 2, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    module = PPOWithExportedValue(folder, reward, **sizes, **settings)
    return module, PromptDataModule(folder, prompt_rows(4), rollout_batch_size=2, max_prompt_length=40)


def run(
    name: str,
    folder: str,
    root: str,
    stage: str = "sft",
    precision: str = "32-true",
    reward: Any = None,
    options: dict[str, Any] | None = None,
    **finetune: Any,
) -> int:
    """Train for two steps; the export and the last checkpoint go to `root`.

    Args:
        name: the strategy, see `helpers.stage_runs.strategy`; `auto` for one process.
        folder: of the model.
        root: of the run.
        stage: `sft`, `reward` or `ppo`, which also writes its value model, to `value`.
        precision: as the trainer takes it.
        reward: what PPO is rewarded by.
        options: of PPO.
        **finetune: settings of `FineTune`.

    Returns:
        Bytes that the export took on this process.
    """
    torch.manual_seed(5)
    module: Any
    data: Any
    settings: dict[str, Any] = {"optimizer": sgd(0.1), "finetune": FineTune(**finetune), **CONSTANT}
    if stage == "ppo":
        module, data = ppo(folder, reward, **settings, **(options or {}))
    elif stage == "sft":
        rows = instruction_rows(12)
        data = InstructionDataModule(folder, rows, rows[:2], batch_size=2, max_length=48)
        module = SFTModule(folder, **settings)
    else:
        rows = preference_rows(12)
        data = PreferenceDataModule(folder, rows, rows[:4], batch_size=2, max_length=48)
        module = RewardModule(folder, **settings)
    # After validation, which calibrates a reward model.
    keep = ModelCheckpoint(Path(root) / "checkpoints", save_last=True, save_on_train_epoch_end=False)
    has_value = stage == "ppo" and module.value_trunk == "own"
    watched = (ExportWithValue if has_value else WatchedExport)(str(Path(root) / "export"))
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
        val_check_interval=1 if stage != "ppo" else None,
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
