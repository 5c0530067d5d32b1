"""Stages with adapters on one process or several; imported on both sides of `helpers.distributed`."""

from typing import Any

import torch

from helpers.stage_runs import BATCH, CONSTANT, EXAMPLES, strategy
from helpers.stages import MemoryLogger, instruction_rows, preference_rows, prompt_rows, sgd, share_of_letters, trainer
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


def run(stage: str, name: str, folder: str, export: str, settings: dict[str, Any]) -> list[float]:
    """A few steps, in micro-batches of 3, exported at the end.

    Args:
        stage: `sft`, `reward` or `ppo` (against a function, so that the value model stands on the policy's base).
        name: the strategy; `auto` runs on one process, everything else on two.
        folder: language model.
        export: where the export goes.
        settings: of `FineTune`.

    Returns:
        The loss of each step, of PPO the score.
    """
    processes = 1 if name == "auto" else 2
    torch.manual_seed(5)
    options = {"micro_batch_size": 3, "finetune": FineTune(**settings), **CONSTANT}
    sizes = {"batch_size": BATCH, "max_length": 48}
    rows = instruction_rows(EXAMPLES) if stage == "sft" else preference_rows(EXAMPLES)
    module: Any = SFTModule(folder, optimizer=sgd(0.5), **options)
    data: Any = InstructionDataModule(folder, rows, validation_data=rows[:8], **sizes)
    if stage == "reward":
        module = RewardModule(folder, optimizer=sgd(0.5), **options)
        data = PreferenceDataModule(folder, rows, validation_data=rows[:8], **sizes)
    if stage == "ppo":
        module = PPOModule(
            folder,
            share_of_letters,
            sampling=Sampling(max_new_tokens=6, stop_strings=list("aeiou")),
            rollout_batch_size=BATCH,
            minibatch_size=BATCH,
            optimizer=sgd(0.3),
            max_tokens_per_batch=60,
            **{name: value for name, value in options.items() if name != "micro_batch_size"},
        )
        prompts = {"validation_data": prompt_rows(8), "max_prompt_length": 40}
        data = PromptDataModule(folder, prompt_rows(EXAMPLES), rollout_batch_size=BATCH, **prompts)
    logger = MemoryLogger()
    callbacks = [HFExport(export)]
    trainer(strategy=strategy(name), devices=processes, callbacks=callbacks, logger=logger).fit(module, data)
    return logger.series("train/score" if stage == "ppo" else "train/loss")


def run_all(runs: list[dict[str, Any]]) -> list[list[float]]:
    """One run after the other in the same process."""
    return [run(**settings) for settings in runs]
