"""A reward model calibrated over answers of a policy, on one process or several; imported on both sides."""

from typing import Any

import torch

from helpers.stage_runs import strategy
from helpers.stages import MemoryLogger, preference_rows, sgd, trainer
from rlhf_lightning import PreferenceDataModule, RewardModule, Sampling

CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0}


def run(folder: str, name: str, processes: int = 1) -> dict[str, Any]:
    """Fit a reward model whose samples do not divide by the processes.

    Args:
        folder: language model.
        name: the strategy.
        processes: how many.

    Returns:
        The samples, the calibration, and what was logged of them.
    """
    torch.manual_seed(5)
    sampling = Sampling(max_new_tokens=6)
    module = RewardModule(folder, optimizer=sgd(0.2), calibration_samples=5, sampling=sampling, **CONSTANT)
    rows, logger = preference_rows(16), MemoryLogger()
    data = PreferenceDataModule(folder, rows[:8], validation_data=rows[9:], batch_size=4, max_length=48)
    trainer(strategy=strategy(name), devices=processes, logger=logger).fit(module, data)
    assert module._samples is not None
    return {
        "samples": [ids.tolist() for ids in module._samples.sequences],
        "calibration": [module.scalar.calibration.mean, module.scalar.calibration.std],
        "over": module.scalar.calibration.over,
        "logged": logger.series("val/policy_score") + logger.series("val/policy_score_std"),
    }


def run_each(folder: str, names: list[str]) -> list[dict[str, Any]]:
    """One run after the other on two processes."""
    return [run(folder, name, processes=2) for name in names]
