"""Whole stages on one process or several, told as JSON values; imported on both sides of `helpers.distributed`."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import Strategy

from helpers.guard_runs import run_with_skips
from helpers.stages import MemoryLogger, instruction_rows, preference_rows, prompt_rows, sgd, trainer
from rlhf_lightning import (
    DeepSpeedStrategy,
    DPOModule,
    GRPOModule,
    HFExport,
    InstructionDataModule,
    KLPenalty,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    RLOOModule,
    Sampling,
    ScoreShaping,
    SFTModule,
)
from rlhf_lightning.batches import PreferenceBatch, PromptBatch
from rlhf_lightning.generation.engine import Generation, decode_responses
from rlhf_lightning.training import consolidated_state_dict

GLOBAL_BATCH, EXAMPLES = 8, 16
CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0, "gradient_clip_val": 0.1}


def sft(folder: str, processes: int, reward: str) -> tuple[pl.LightningModule, Any]:
    """Two steps on sequences of uneven length, in micro-batches of 3."""
    module = SFTModule(folder, optimizer=sgd(0.5), micro_batch_size=3, **CONSTANT)
    rows = instruction_rows(EXAMPLES)
    data = InstructionDataModule(
        folder, rows, validation_data=rows[:8], batch_size=GLOBAL_BATCH // processes, max_length=48
    )
    return module, data


class WeighedPairs(PreferenceDataModule):
    """Pairs whose margins and weights follow from their row, so that processes have unequal shares of the weight."""

    def on_after_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        return batch._replace(margins=0.3 * (batch.row_ids % 2), weights=0.5 + batch.row_ids % 3)


def reward(folder: str, processes: int, reward: str) -> tuple[pl.LightningModule, Any]:
    """Two steps from a fresh head on weighed pairs; calibrated at the end.

    Of two processes one has fewer micro-batches of 90 tokens than the other.
    """
    module = RewardModule(folder, optimizer=sgd(0.5), max_tokens_per_batch=90, **CONSTANT)
    rows = preference_rows(EXAMPLES)
    data = WeighedPairs(folder, rows, validation_data=rows[:8], batch_size=GLOBAL_BATCH // processes, max_length=48)
    return module, data


def dpo(folder: str, processes: int, reward: str) -> tuple[pl.LightningModule, Any]:
    """Two steps on weighed pairs, the chosen responses' likelihood included, in micro-batches of 90 tokens.

    The reference is another model, where there is one: from one of its own, leads at the first step would be rounding.
    """
    options = {"sft_coef": 0.3, "precompute_reference": processes > 1, "max_tokens_per_batch": 90}
    other = f"{folder}-reference"
    reference = other if Path(other).is_dir() else None
    module = DPOModule(folder, reference=reference, optimizer=sgd(0.5), **options, **CONSTANT)
    rows = preference_rows(EXAMPLES)
    data = WeighedPairs(folder, rows, validation_data=rows[:8], batch_size=GLOBAL_BATCH // processes, max_length=48)
    return module, data


def ppo(folder: str, processes: int, reward: str) -> tuple[pl.LightningModule, Any]:
    """Two iterations of two steps over the whole rollout.

    Only the likeliest token is ever drawn, so that responses do not depend on the process that draws them.
    """
    share = GLOBAL_BATCH // processes
    module = PPOModule(
        folder,
        reward,
        sampling=Sampling(top_k=1, max_new_tokens=6, stop_strings=list("aeiou")),
        rollout_batch_size=share,
        minibatch_size=share,
        micro_batch_size=2,
        optimizer=sgd(0.3),
        value_lr=0.1,
        kl=KLPenalty(0.1, target=0.001, horizon=100),
        score=ScoreShaping(missing_eos_penalty=0.5),
        **CONSTANT,
    )
    rows = prompt_rows(EXAMPLES)
    data = PromptDataModule(folder, rows, validation_data=rows[:8], rollout_batch_size=share, max_prompt_length=40)
    return module, data


class Told:
    """Answers each row in the same way, whichever process asks; every sample in a way of its own."""

    def answer(self: Any, prompts: PromptBatch, random: Any, with_logprobs: bool = False) -> Any:
        places = torch.cat([torch.zeros(1), prompts.row_ids.diff() == 0]).long()  # 1 for a prompt's second answer
        lengths = 1 + (prompts.row_ids + places) % 4
        step = torch.arange(4)
        ids = 40 + (7 * prompts.row_ids + 3 * places).unsqueeze(1) % 11 + step
        mask = step < lengths.unsqueeze(1)
        generation = Generation(torch.where(mask, ids, 0), mask, lengths < 4)
        return generation, decode_responses(self.tokenizer, generation)


class ToldRLOO(Told, RLOOModule):
    pass


class ToldGRPO(Told, GRPOModule):
    pass


def groups(kind: Any, folder: str, processes: int, reward: str, **options: Any) -> tuple[pl.LightningModule, Any]:
    """Two iterations of two steps each over the whole rollout, two answers to each prompt."""
    share = GLOBAL_BATCH // processes
    module = kind(
        folder,
        reward,
        sampling=Sampling(max_new_tokens=4),
        rollout_batch_size=share,
        samples_per_prompt=2,
        minibatch_size=2 * share,
        micro_batch_size=4,
        ppo_epochs=2,
        optimizer=sgd(0.3),
        score=ScoreShaping(scaling=False, clip=None, missing_eos_penalty=0.5),
        **options,
        **CONSTANT,
    )
    rows = prompt_rows(EXAMPLES)
    data = PromptDataModule(folder, rows, validation_data=rows[:8], rollout_batch_size=share, max_prompt_length=40)
    return module, data


def rloo(folder: str, processes: int, reward: str) -> tuple[pl.LightningModule, Any]:
    """The KL in the reward, one ratio for each response."""
    return groups(ToldRLOO, folder, processes, reward, kl=KLPenalty(0.1, target=0.001, horizon=100))


def grpo(folder: str, processes: int, reward: str) -> tuple[pl.LightningModule, Any]:
    """The KL in the loss, which is a mean over responses of means over tokens."""
    return groups(ToldGRPO, folder, processes, reward, loss="grpo", kl=KLPenalty(0.1, estimator="k3"))


STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "rloo": rloo, "grpo": grpo}
LEFT_OUT = "seconds", "tokens_per_second", "padding_share", "memory_gib"
"""Metrics that depend on the clock and the machine, or on how the examples fall into batches."""


class KeepState(pl.Callback):
    """Copies the trained model at the start and the end of training."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.keep(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.keep(pl_module)

    def keep(self, module: Any) -> None:
        parts = [module.export_model] + ([module.value] if isinstance(module, PPOModule) else [])
        states = [consolidated_state_dict(module, part) for part in parts]
        whole = [
            {f"{number} {name}": tensor.double().tolist() for name, tensor in state.items()}
            for number, state in enumerate(states)
            if state is not None
        ]
        self.states.append({name: tensor for state in whole for name, tensor in state.items()})


def strategy(name: str) -> str | Strategy:
    """`zero2`, `zero3`, or a name Lightning knows."""
    if not name.startswith("zero"):
        return name
    found = DeepSpeedStrategy(stage=int(name[4:]))
    if name == "zero3":
        # At each weight DeepSpeed looks a billion weights ahead: in a tiny model through all modules of all steps.
        found.config["zero_optimization"]["stage3_max_reuse_distance"] = 10_000
    return found


def run(stage: str, name: str, folder: str, reward: str, export: str | None = None) -> dict[str, Any]:
    """Fit one stage.

    Args:
        stage: a key of `STAGES`.
        name: the strategy; `auto` runs on one process, everything else on two.
        folder: language model.
        reward: reward model.
        export: write a Hugging Face folder here at the end.

    Returns:
        Weights before and after (empty on all but the first rank), logged metrics, optimizer steps.
    """
    processes = 1 if name == "auto" else 2
    torch.manual_seed(5)
    module, data = STAGES[stage](folder, processes, reward)
    keep, logger = KeepState(), MemoryLogger()
    callbacks = [keep] + ([HFExport(export)] if export else [])
    fitted = trainer(strategy=strategy(name), devices=processes, callbacks=callbacks, logger=logger)
    fitted.fit(module, data)
    series = {metric: logger.series(metric) for call in logger.calls for metric in call}
    exact = {metric: values for metric, values in series.items() if not any(word in metric for word in LEFT_OUT)}
    return {
        "before": keep.states[0],
        "after": keep.states[1],
        "metrics": exact,
        "steps": fitted.global_step,
    }


def run_all(runs: list[dict[str, Any]], skips: dict[str, str]) -> list[dict[str, Any]]:
    """One run after the other in the same process, and in the end one with a step that is skipped."""
    return [*(run(**settings) for settings in runs), run_with_skips(**skips)]
