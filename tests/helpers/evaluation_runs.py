"""Validation, testing and prediction, told as JSON values; imported on both sides of `helpers.distributed`."""

from pathlib import Path
from typing import Any

import torch

from helpers.stage_runs import CONSTANT, strategy
from helpers.stages import instruction_rows, preference_rows, prompt_rows, trainer
from rlhf_lightning import (
    DPOModule,
    InstructionDataModule,
    PPOModule,
    PredictionWriter,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
)

STAGES = ("sft", "reward", "dpo", "ppo")


def make(stage: str, folder: str, reward: str, count: int) -> tuple[Any, Any]:
    """A module, and data whose every part has `count` rows; two of them in a batch."""
    sampling = Sampling(max_new_tokens=5)
    kinds: dict[str, Any] = {
        "sft": (SFTModule(folder, sampling=sampling), InstructionDataModule, instruction_rows),
        "reward": (RewardModule(reward), PreferenceDataModule, preference_rows),
        "dpo": (DPOModule(folder, reference=f"{folder}-reference"), PreferenceDataModule, preference_rows),
        "ppo": (
            PPOModule(folder, reward, sampling=sampling, rollout_batch_size=2, minibatch_size=2, **CONSTANT),
            PromptDataModule,
            prompt_rows,
        ),
    }
    module, kind, rows = kinds[stage]
    size = {"max_prompt_length": 40, "rollout_batch_size": 2} if stage == "ppo" else {"max_length": 48, "batch_size": 2}
    held = rows(count)
    parts = {"validation_data": held, "test_data": held, "predict_data": held}
    return module, kind(folder, rows(4), **parts, **size, eval_batch_size=2)


def run(stage: str, name: str, folder: str, reward: str, count: int, root: str) -> dict[str, Any]:
    """Validate, test and predict.

    Args:
        stage: one of `STAGES`.
        name: the strategy; `auto` runs on one process, everything else on two.
        folder: language model.
        reward: reward model.
        count: rows of each part.
        root: every process has a folder of its own below it, as where each has a disk of its own.

    Returns:
        The metrics of validation and test, and the text of the predictions, where this process wrote them.
    """
    torch.manual_seed(5)
    processes, found = 1 if name == "auto" else 2, {}
    for task in ("validate", "test", "predict"):
        module, data = make(stage, folder, reward, count)
        rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
        place = Path(root) / f"{stage} {name} {count} {rank}"
        place.mkdir(parents=True, exist_ok=True)
        writer = PredictionWriter(str(place / "predictions.jsonl"))
        fitted = trainer(strategy=strategy(name), devices=processes, callbacks=[writer], default_root_dir=str(place))
        if task != "predict":
            getattr(fitted, task)(module, data, verbose=False)
            found[task] = {metric: float(value) for metric, value in fitted.callback_metrics.items()}
        elif stage != "dpo":
            fitted.predict(module, data, return_predictions=False)
            files = [file.read_text(encoding="utf-8") for file in sorted(place.iterdir())]
            found[task] = files[0] if files else None
    return found


def run_each(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run after the other in the same process."""
    return [run(**settings) for settings in runs]
