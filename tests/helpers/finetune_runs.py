"""Stages with adapters on one process or several; imported on both sides of `helpers.distributed`."""

from typing import Any

import torch

from helpers.stage_runs import CONSTANT, EXAMPLES, GLOBAL_BATCH, strategy
from helpers.stages import MemoryLogger, instruction_rows, preference_rows, sgd, trainer
from rlhf_lightning import FineTune, HFExport, InstructionDataModule, PreferenceDataModule, RewardModule, SFTModule


def run(stage: str, name: str, folder: str, export: str, settings: dict[str, Any]) -> list[float]:
    """Two steps, in micro-batches of 3, exported at the end.

    Args:
        stage: `sft` or `reward`.
        name: the strategy; `auto` runs on one process, everything else on two.
        folder: language model.
        export: where the export goes.
        settings: of `FineTune`.

    Returns:
        The loss of each step.
    """
    processes = 1 if name == "auto" else 2
    torch.manual_seed(5)
    options = {"micro_batch_size": 3, "finetune": FineTune(**settings), **CONSTANT}
    sizes = {"batch_size": GLOBAL_BATCH // processes, "max_length": 48}
    rows = instruction_rows(EXAMPLES) if stage == "sft" else preference_rows(EXAMPLES)
    module: Any = SFTModule(folder, sgd(0.5), **options)
    data: Any = InstructionDataModule(folder, rows, validation_data=rows[:8], **sizes)
    if stage == "reward":
        module = RewardModule(folder, optimizer=sgd(0.5), **options)
        data = PreferenceDataModule(folder, rows, validation_data=rows[:8], **sizes)
    logger = MemoryLogger()
    callbacks = [HFExport(export)]
    trainer(strategy=strategy(name), devices=processes, callbacks=callbacks, logger=logger).fit(module, data)
    return logger.series("train/loss")


def run_all(runs: list[dict[str, Any]]) -> list[list[float]]:
    """One run after the other in the same process."""
    return [run(**settings) for settings in runs]
