"""Whole stages on one process or several, told as JSON values; imported on both sides of `helpers.distributed`."""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import Strategy

from helpers.guard_runs import run_with_skips
from helpers.rankings import ranking_rows
from helpers.stages import MemoryLogger, instruction_rows, preference_rows, prompt_rows, sgd, trainer
from rlhf_lightning import (
    DeepSpeedStrategy,
    DPOModule,
    FineTune,
    FSDP2Strategy,
    GRPOModule,
    HFExport,
    InstructionDataModule,
    KLPenalty,
    Objective,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RatingDataModule,
    RewardModule,
    RLOOModule,
    Sampling,
    ScoreRegressionModule,
    ScoreShaping,
    SFTModule,
)
from rlhf_lightning.batches import PreferenceBatch, PromptBatch
from rlhf_lightning.training import consolidated_state_dict

BATCH, EXAMPLES, VALIDATED = 8, 19, 7
"""Rows of a batch on all processes, of an epoch, and of a validation; the last two do not divide by 2 or 4."""
PIECE = BATCH // 4
"""Of steps on whole batches, whose share of each of two processes is two pieces."""
CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0, "gradient_clip_val": 0.1}
LORA = FineTune("lora", rank=2, alpha=8)
Made = tuple[pl.LightningModule, Any]


def sft(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """Sequences of uneven length, one by one if in pieces."""
    module = SFTModule(folder, optimizer=sgd(0.5), micro_batch_size=1 if pieces else None, **CONSTANT, **options)
    rows = instruction_rows(EXAMPLES)
    return module, InstructionDataModule(
        folder, rows, validation_data=rows[:VALIDATED], batch_size=BATCH, max_length=48
    )


def checkpointing(*args: Any, **options: Any) -> Made:
    """As `sft`, activations computed again."""
    return sft(*args, gradient_checkpointing=True, **options)


class WeighedPairs(PreferenceDataModule):
    """Pairs whose margins and weights follow from their row, so that processes have unequal shares of the weight."""

    def on_after_batch_transfer(self, batch: PreferenceBatch, dataloader_idx: int) -> PreferenceBatch:
        counted = batch.row_ids >= 0
        return batch._replace(margins=0.3 * (batch.row_ids % 2), weights=(0.5 + batch.row_ids % 3) * counted)


def weighed_pairs(folder: str) -> WeighedPairs:
    rows = preference_rows(EXAMPLES)
    return WeighedPairs(folder, rows, validation_data=rows[:VALIDATED], batch_size=BATCH, max_length=48)


def reward(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """From a fresh head on weighed pairs; calibrated at the end.

    In pieces of 90 tokens, of which one process has fewer than the other.
    """
    size = 90 if pieces else None
    module = RewardModule(folder, optimizer=sgd(0.5), max_tokens_per_batch=size, **CONSTANT, **options)
    return module, weighed_pairs(folder)


def terms(*args: Any, **options: Any) -> Made:
    """As `reward`, with several heads and all that it can learn besides, by an output layer of its own."""
    return reward(*args, label_smoothing=0.1, center_coef=0.1, lm_coef=0.5, num_heads=2, **options)


def tied_terms(folder: str, *args: Any, **options: Any) -> Made:
    """The same by the input embeddings."""
    return terms(f"{folder}-tied", *args, **options)


def regression(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """Rated responses of which processes have unequal numbers of scores."""
    size = 90 if pieces else None
    module = ScoreRegressionModule(
        folder, attributes=["a", "b"], optimizer=sgd(0.05), max_tokens_per_batch=size, **CONSTANT, **options
    )
    given = [{"a": i % 5, "b": i % 3 if i % 4 else None} for i in range(EXAMPLES)]
    rows = [row | scores for row, scores in zip(instruction_rows(EXAMPLES), given, strict=True)]
    options = {"attributes": ["a", "b"], "batch_size": BATCH, "max_length": 48}
    return module, RatingDataModule(folder, rows, validation_data=rows[:VALIDATED], **options)


def dpo(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """On weighed pairs, the chosen responses' likelihood included; in pieces of 90 tokens.

    The reference is another model, where there is one: from one of its own, leads at the first step would be rounding.
    """
    other = f"{folder}-reference"
    options |= {"reference": other if Path(other).is_dir() else None, "precompute_reference": pieces}
    options |= {"sft_coef": 0.3, "max_tokens_per_batch": 90 if pieces else None}
    return DPOModule(folder, optimizer=sgd(0.5), **CONSTANT, **options), weighed_pairs(folder)


def rankings(folder: str) -> PreferenceDataModule:
    """Whole rankings, so that processes have unequally many pairs, with ties, margins and weights."""
    rows = ranking_rows([2 + i * i % 5 for i in range(EXAMPLES)], ties=True)
    return PreferenceDataModule(
        folder, rows, validation_data=rows[:VALIDATED], batch_size=BATCH, max_length=48, whole_rankings=True
    )


def reward_rankings(folder: str, *args: Any, **options: Any) -> Made:
    """As `reward terms`, of whole rankings."""
    return terms(folder, *args, **options)[0], rankings(folder)


def dpo_rankings(folder: str, *args: Any, **options: Any) -> Made:
    """As `dpo`, of whole rankings."""
    return dpo(folder, *args, **options)[0], rankings(folder)


def prompts(folder: str) -> PromptDataModule:
    """Three rollouts, and an odd number of prompts to validate with."""
    rows = prompt_rows(3 * BATCH)
    return PromptDataModule(
        folder, rows, validation_data=rows[:VALIDATED], rollout_batch_size=BATCH, max_prompt_length=40
    )


def ppo(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """Iterations of two steps, each on half of the rollout; responses drawn at temperature 1."""
    given: dict[str, Any] = {
        "sampling": Sampling(max_new_tokens=6, stop_strings=list("aeiou")),
        "rollout_batch_size": BATCH,
        "minibatch_size": BATCH // 2,
        "ppo_epochs": 1,
        "micro_batch_size": 1 if pieces else None,
        "optimizer": sgd(0.3),
        "value_lr": 0.1,
        "kl": KLPenalty(0.1, target=0.001, horizon=100),
        "score": ScoreShaping(missing_eos_penalty=0.5),
    }
    return PPOModule(folder, reward, **given | CONSTANT | options), prompts(folder)


def trunk(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """The value head on the policy's hidden states, two epochs."""
    options |= {"ppo_epochs": 2, "minibatch_size": BATCH, "micro_batch_size": PIECE if pieces else None}
    return ppo(folder, reward, pieces, value_trunk="policy", **options)


def going_on(folder: str, count: int = BATCH) -> InstructionDataModule:
    """Data for a policy to go on learning, of which an epoch is not whole batches."""
    return InstructionDataModule(folder, instruction_rows(11), validation_split=0.0, batch_size=count, max_length=48)


def switched(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """The value model first by itself, clipped apart; whitened rewards; two epochs that may end early."""
    objective = Objective(whiten_rewards="scale", clip_range_high=0.3, dual_clip=2.0, value_gae_lambda=1.0)
    options |= {"objective": objective, "value_warmup_iterations": 1, "value_gradient_clip_val": 0.05}
    options |= {"other_rewards": {"again": {"reward": reward, "weight": 0.5, "scaling": True}}}
    options |= {"pretraining": going_on(folder), "pretraining_coef": 0.2}
    decaying = partial(torch.optim.SGD, lr=2.0, weight_decay=0.01)  # which would move a policy that rests
    return ppo(folder, reward, pieces, ppo_epochs=2, max_approx_kl=0.01, optimizer=decaying, **options)


def others(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """Two reward models, and text to go on learning."""
    options |= {"pretraining": going_on(folder), "pretraining_coef": 0.2}
    return ppo(folder, reward, pieces, other_rewards={"again": {"reward": reward, "scaling": True}}, **options)


def on_policy(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """One step on the whole rollout, whose log-probabilities come from the sampler."""
    options |= {"minibatch_size": BATCH, "micro_batch_size": PIECE if pieces else None}
    return ppo(folder, reward, pieces, **options)


def groups(kind: Any, folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """Iterations of two steps, two answers to each prompt."""
    module = kind(
        folder,
        reward,
        sampling=Sampling(max_new_tokens=4),
        rollout_batch_size=BATCH,
        samples_per_prompt=2,
        minibatch_size=BATCH,
        micro_batch_size=PIECE if pieces else None,
        optimizer=sgd(0.3),
        score=ScoreShaping(scaling=False, clip=None, missing_eos_penalty=0.5),
        **options,
        **CONSTANT,
    )
    return module, prompts(folder)


def rloo(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """The KL in the reward, one ratio for each response."""
    return groups(RLOOModule, folder, reward, pieces, kl=KLPenalty(0.1, target=0.001, horizon=100), **options)


def grpo(folder: str, reward: str, pieces: bool, **options: Any) -> Made:
    """The KL in the loss, which is a mean over responses of means over tokens."""
    return groups(GRPOModule, folder, reward, pieces, loss="grpo", kl=KLPenalty(0.1, estimator="k3"), **options)


STAGES = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "ppo trunk": trunk,
    "ppo on-policy": on_policy,
    "rloo": rloo,
    "grpo": grpo,
}
MORE = {
    "sft checkpointing": checkpointing,
    "reward terms": terms,
    "reward tied terms": tied_terms,
    "reward rankings": reward_rankings,
    "dpo rankings": dpo_rankings,
    "regression": regression,
    "ppo others": others,
    "ppo switched": switched,
    "ppo trunk switched": partial(switched, value_trunk="policy"),
}
"""Of which no table is made."""
EPOCHS = {"sft": 2, "reward": 2, "reward terms": 2, "reward tied terms": 2, "dpo": 2, "ppo on-policy": 2}
EPOCHS |= {"reward rankings": 2, "dpo rankings": 2}
"""So that all make five steps or more."""
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
    """A strategy by its name.

    Args:
        name: `zero1` to `zero3`, `zero3-offload`; `zero3 alone`, which keeps no weight longer than its layer runs;
            `fsdp2`; or a name Lightning knows.
    """
    if name == "fsdp2":
        return FSDP2Strategy()
    if not name.startswith("zero"):
        return name
    offload = name.endswith("offload")
    found = DeepSpeedStrategy(stage=int(name[4]), offload_optimizer=offload, offload_parameters=offload)
    if name == "zero3 alone":
        kept = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
        found.config["zero_optimization"] |= {f"stage3_{each}": 0 for each in kept}
    return found


def run(
    stage: str,
    name: str,
    folder: str,
    reward: str,
    export: str | None = None,
    lora: bool = False,
    pieces: bool = True,
    processes: int = 2,
) -> dict[str, Any]:
    """Fit one stage.

    Args:
        stage: a key of `STAGES` or `MORE`.
        name: the strategy; `auto` runs on one process.
        folder: language model.
        reward: reward model.
        export: write a Hugging Face folder here at the end.
        lora: train adapters, else all weights.
        pieces: make each step of several micro-batches.
        processes: how many, but for `auto`.

    Returns:
        Weights before and after (empty on all but the first rank), logged metrics, optimizer steps, what was answered,
        and the calibration of a reward model.
    """
    torch.manual_seed(5)
    module, data = (STAGES | MORE)[stage](folder, reward, pieces, **({"finetune": LORA} if lora else {}))
    keep, logger, said = KeepState(), MemoryLogger(), listen(module)
    callbacks = [keep] + ([HFExport(export)] if export else [])
    options = {"devices": 1 if name == "auto" else processes, "max_epochs": EPOCHS.get(stage, 1)}
    fitted = trainer(strategy=strategy(name), callbacks=callbacks, logger=logger, **options)
    fitted.fit(module, data)
    series = {metric: logger.series(metric) for call in logger.calls for metric in call}
    exact = {metric: values for metric, values in series.items() if not any(word in metric for word in LEFT_OUT)}
    return {
        "before": keep.states[0],
        "after": keep.states[1],
        "metrics": exact,
        "steps": fitted.global_step,
        "said": said,
        "calibration": list(vars(module.scalar.calibration).values())[:2] if stage.startswith("reward") else None,
    }


def listen(module: Any) -> list[Any]:
    """What the module will answer: for each time it is asked the row and the response of each prompt."""
    said: list[Any] = []
    answer = getattr(module, "answer", None)

    def listening(prompts: PromptBatch, *args: Any, **options: Any) -> Any:
        generation, texts = answer(prompts, *args, **options)
        rows = zip(prompts.row_ids.tolist(), texts, generation.response_ids.tolist(), strict=True)
        lengths = generation.response_mask.sum(dim=1).tolist()
        heard = [[row, text, ids[:length]] for (row, text, ids), length in zip(rows, lengths, strict=True)]
        said.append([each for each in heard if each[0] >= 0])
        return generation, texts

    if answer is not None:
        module.answer = listening
    return said


def run_each(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run after the other in the same process."""
    return [run(**settings) for settings in runs]


def run_all(runs: list[dict[str, Any]], skips: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """One run after the other in the same process, and in the end, if asked for, one with a step that is skipped."""
    return [*run_each(runs), *([run_with_skips(**skips)] if skips else [])]
