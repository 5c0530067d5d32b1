"""PPO with a held-out judge, told as JSON values; imported on both sides of `helpers.distributed`."""

from typing import Any

import torch

from helpers.stage_runs import ppo, strategy
from helpers.stages import trainer
from rlhf_lightning import Evaluate, OverOptimisation


def run(name: str, folder: str, reward: str, judge: str, best: str) -> dict[str, Any]:
    """Fit, judged before and after one iteration, on an odd number of prompts by another reward model.

    Args:
        name: the strategy; `auto` runs on one process, everything else on two.
        folder: language model.
        reward: reward model.
        judge: another one.
        best: where the best policy goes.

    Returns:
        What was found each time, and the state of the guard.
    """
    processes = 1 if name == "auto" else 2
    torch.manual_seed(5)
    module, data = ppo(folder, reward, True)
    evaluate, guard = Evaluate(judge, every_n_iterations=1, num_prompts=5), OverOptimisation(dirpath=best)
    callbacks = [evaluate, guard]
    limits = {"limit_train_batches": 1, "limit_val_batches": 0}
    trainer(strategy=strategy(name), devices=processes, callbacks=callbacks, **limits).fit(module, data)
    return {"points": [point._asdict() for point in evaluate.points], "guard": guard.state_dict()}


def run_all(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run after the other in the same process."""
    return [run(**settings) for settings in runs]
