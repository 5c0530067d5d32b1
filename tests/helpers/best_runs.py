"""SFT whose best model by a reward is kept, told as JSON values; imported on both sides of `helpers.distributed`."""

from typing import Any

import torch

from helpers.stage_runs import sft, strategy
from helpers.stages import MemoryLogger, trainer
from rlhf_lightning import KeepBestByReward, Sampling


def run(name: str, folder: str, reward: str, best: str) -> dict[str, Any]:
    """Fit two steps, each validated, answering an odd number of prompts.

    Args:
        name: the strategy; `auto` runs on one process, everything else on two.
        folder: language model.
        reward: reward model.
        best: where the best model goes.

    Returns:
        What was logged, and the state of the callback.
    """
    torch.manual_seed(5)
    module, data = sft(folder, reward, True)
    keep = KeepBestByReward(reward, num_prompts=5, sampling=Sampling(max_new_tokens=6), dirpath=best)
    logger = MemoryLogger()
    processes = 1 if name == "auto" else 2
    options: dict[str, Any] = {"callbacks": [keep], "max_steps": 2, "val_check_interval": 1, "logger": logger}
    trainer(strategy=strategy(name), devices=processes, **options).fit(module, data)
    return {"scores": logger.series("val/reward_score"), "state": keep.state_dict()}


def run_all(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run after the other in the same process."""
    return [run(**settings) for settings in runs]
