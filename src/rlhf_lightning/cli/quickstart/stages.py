"""The stages on the embedded data, through the modules, data modules and Trainer that users get."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from rlhf_lightning.algorithms import DPOModule, GRPOModule, PPOModule, RewardModule, RLOOModule, SFTModule
from rlhf_lightning.algorithms.online.settings import KLPenalty, ScoreShaping
from rlhf_lightning.algorithms.online.stage import OnlineStage
from rlhf_lightning.callbacks import Evaluate, HFExport, SampleTexts, StageProgressBar
from rlhf_lightning.callbacks.evaluate import Judged
from rlhf_lightning.cli.quickstart.toy import ToyPaths, gold_score
from rlhf_lightning.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from rlhf_lightning.generation.sampling import Sampling

SAMPLING = Sampling(temperature=0.7, max_new_tokens=72)
MAX_LENGTH = 160

Algorithm = Literal["ppo", "rloo", "grpo", "dpo"]


class StageResult(NamedTuple):
    """What a stage leaves behind.

    Attributes:
        export: its Hugging Face folder.
        log: CSV of everything it logged.
        metrics: the last value of everything it logged.
        seconds: wall time.
    """

    export: Path
    log: Path
    metrics: dict[str, float]
    seconds: float


class GoldCurve(Callback):
    """Scores the validation answers of an online algorithm by gold, which training never sees.

    Attributes:
        points: KL to the reference (nats per response), mean reward-model score and mean gold score, one row for each
            validation.
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, float, float]] = []
        self._gold: list[float] = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Score one batch of answers."""
        self._gold += [gold_score(p, r) for p, r in zip(outputs["prompts"], outputs["responses"], strict=True)]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep the means, and log gold's as those of a judge."""
        metrics = trainer.callback_metrics
        kl, gold = float(metrics["val/kl"]), sum(self._gold) / len(self._gold)
        self.points.append((kl, float(metrics["val/score"]), gold))
        self._gold = []
        for logger in trainer.loggers:
            logger.log_metrics({"judge/score": gold, "judge/kl": kl}, step=pl_module.iteration)


def _trainer(folder: Path, callbacks: list[Callback], **options: Any) -> pl.Trainer:
    tensorboard = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=[CSVLogger(folder, name="", version=""), tensorboard],
        callbacks=[StageProgressBar(leave=True), HFExport(), *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **options,
    )


def _fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> StageResult:
    started = time.perf_counter()
    trainer.fit(module, data)
    folder = Path(trainer.default_root_dir)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return StageResult(folder / "export", folder / "metrics.csv", metrics, time.perf_counter() - started)


def train_sft(base: Path, data: ToyPaths, folder: Path, seed: int) -> StageResult:
    """Fine-tune a random model on a mixture of good and bad answers.

    Args:
        base: folder of the untrained model.
        data: the embedded data.
        folder: where the run lives.
        seed: of all random numbers.
    """
    pl.seed_everything(seed, verbose=False)
    module = SFTModule(
        str(base),
        optimizer=lambda params: torch.optim.AdamW(params, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        warmup_steps=20,
        micro_batch_size=16,
        sampling=SAMPLING,
    )
    datamodule = InstructionDataModule(
        str(base), data.sft, max_length=MAX_LENGTH, validation_split=0.02, batch_size=32, eval_batch_size=128, seed=seed
    )
    samples = SampleTexts(["\n\nHuman: How do I repair my old bicycle?\n\nAssistant:"])
    return _fit(_trainer(folder, [samples], max_epochs=1, val_check_interval=0.25), module, datamodule)


def train_reward(sft: Path, data: ToyPaths, folder: Path, seed: int, **options: Any) -> StageResult:
    """Learn from noisy preferences which answer is better.

    Args:
        sft: export of the SFT stage.
        data: the embedded data.
        folder: where the run lives.
        seed: of all random numbers.
        **options: of `RewardModule`.
    """
    pl.seed_everything(seed, verbose=False)
    module = RewardModule(
        str(sft),
        optimizer=lambda params: torch.optim.AdamW(params, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        warmup_steps=20,
        micro_batch_size=16,
        **options,
    )
    datamodule = _pairs(sft, data, seed)
    return _fit(_trainer(folder, [], max_epochs=1, val_check_interval=0.5), module, datamodule)


def train_last(
    algorithm: Algorithm, sft: Path, reward: Path, data: ToyPaths, folder: Path, seed: int, **settings: Any
) -> tuple[StageResult, GoldCurve]:
    """Improve the SFT model, against the reward model or, with DPO, from the pairs that it was trained on.

    Args:
        algorithm: which.
        sft: export of the SFT stage.
        reward: export of the reward stage.
        data: the embedded data.
        folder: where the run lives.
        seed: of all random numbers.
        **settings: of the module, where they are to differ from those of the quickstart.

    Returns:
        The run, and its validations scored by gold, none for DPO.
    """
    pl.seed_everything(seed, verbose=False)
    curve = GoldCurve()
    if algorithm == "dpo":
        datamodule = _pairs(sft, data, seed)
        fitted = _trainer(folder, [], max_epochs=1, val_check_interval=0.5)
        return _fit(fitted, _dpo(sft, **settings), datamodule), curve
    module = {"ppo": _ppo, "rloo": _rloo, "grpo": _grpo}[algorithm](str(sft), str(reward), **settings)
    prompts = _prompts(sft, data, seed, module.rollout_batch_size)
    options = {"limit_train_batches": 25, "max_epochs": 1, "val_check_interval": 5, "limit_val_batches": 1}
    return _fit(_trainer(folder, [curve], **options), module, prompts), curve


def train_hard(
    sft: Path, reward: Path, data: ToyPaths, folder: Path, seed: int, kl_coef: float, iterations: int
) -> list[Judged]:
    """PPO at twice the learning rate, which never falls, judged by gold on held-out prompts.

    Args:
        sft: export of the SFT stage.
        reward: export of the reward stage.
        data: the embedded data.
        folder: where the run lives.
        seed: of all random numbers.
        kl_coef: weight of the KL penalty; 0 for none.
        iterations: how many.

    Returns:
        What the reward model and gold said, of one policy after the other.
    """
    pl.seed_everything(seed, verbose=False)
    module = _ppo(str(sft), str(reward), lr=4e-4, kl_coef=kl_coef, lr_schedule="constant")
    evaluate = Evaluate(gold, every_n_iterations=2, num_prompts=128)
    options = {"limit_train_batches": iterations, "max_epochs": 1, "limit_val_batches": 0}
    _fit(_trainer(folder, [evaluate], **options), module, _prompts(sft, data, seed, module.rollout_batch_size))
    return evaluate.points


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """The gold scores of responses, as a reward function."""
    return [gold_score(*answer) for answer in zip(prompts, responses, strict=True)]


def _prompts(sft: Path, data: ToyPaths, seed: int, rollout_batch_size: int) -> PromptDataModule:
    return PromptDataModule(
        str(sft),
        data.prompts,
        validation_data=data.prompts_heldout,
        max_prompt_length=MAX_LENGTH - SAMPLING.max_new_tokens,
        rollout_batch_size=rollout_batch_size,
        eval_batch_size=128,
        seed=seed,
    )


def _adamw(lr: float) -> Any:
    return lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-5, weight_decay=0.0, fused=True)


_ONLINE: dict[str, Any] = {"sampling": SAMPLING, "micro_batch_size": 16, "ppo_epochs": 2, "minibatch_size": 32}
_GROUP_SCORE = ScoreShaping(scaling=False, clip=None, missing_eos_penalty=1.0)
_GROUPS: dict[str, Any] = {"rollout_batch_size": 16, "samples_per_prompt": 4, "score": _GROUP_SCORE}


def _ppo(sft: str, reward: str, lr: float = 2e-4, kl_coef: float = 0.1, **options: Any) -> OnlineStage:
    settings: dict[str, Any] = {**_ONLINE, "rollout_batch_size": 64, "score": ScoreShaping(missing_eos_penalty=1.0)}
    settings |= {"optimizer": _adamw(lr), "value_lr": 3e-4, "kl": KLPenalty(coef=kl_coef), **options}
    return PPOModule(sft, reward, **settings)


def _rloo(sft: str, reward: str, **options: Any) -> OnlineStage:
    settings: dict[str, Any] = {**_ONLINE, **_GROUPS, "optimizer": _adamw(2e-4), "kl": KLPenalty(coef=0.1)}
    return RLOOModule(sft, reward, **settings | options)


def _grpo(sft: str, reward: str, **options: Any) -> OnlineStage:
    settings: dict[str, Any] = {**_ONLINE, **_GROUPS, "optimizer": _adamw(2e-4)}
    return GRPOModule(sft, reward, **settings | {"kl": KLPenalty(coef=0.1, estimator="k3")} | options)


def _dpo(sft: Path, **options: Any) -> DPOModule:
    settings: dict[str, Any] = {"beta": 0.3, "optimizer": _adamw(4e-4), "warmup_steps": 20, "micro_batch_size": 16}
    return DPOModule(str(sft), **settings | options)


def _pairs(model: Path, data: ToyPaths, seed: int) -> PreferenceDataModule:
    return PreferenceDataModule(
        str(model),
        data.preferences,
        validation_data=data.preferences_validation,
        max_length=MAX_LENGTH,
        batch_size=32,
        eval_batch_size=64,
        seed=seed,
    )


def answer(policy: Path, reward: Path, reference: Path, prompts: Path) -> list[dict[str, Any]]:
    """Answer prompts and score the answers, by the reward model and by gold.

    Args:
        policy: folder of a language model.
        reward: folder of the reward model.
        reference: folder of the model that the KL is taken to.
        prompts: file of prompts.

    Returns:
        For each prompt `prompt`, `response`, `ended`, `tokens`, `score`, `kl` and `gold`.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StageProgressBar()],
    )
    sizes: dict[str, Any] = {"rollout_batch_size": 128, "minibatch_size": 128}
    module = PPOModule(str(policy), str(reward), sampling=SAMPLING, reference=str(reference), **sizes)
    datamodule = PromptDataModule(
        str(policy),
        predict_data=prompts,
        max_prompt_length=MAX_LENGTH - SAMPLING.max_new_tokens,
        rollout_batch_size=128,
    )
    batches: Any = trainer.predict(module, datamodule)
    rows = [row for batch in batches for row in batch]
    return [{**row, "gold": gold_score(row["prompt"], row["response"])} for row in rows]


def gold_accuracy(reward: Path, pairs: Path) -> float:
    """Share of pairs that the reward model orders as gold does; pairs that gold ties do not count.

    Args:
        reward: folder of the reward model.
        pairs: file with `prompt`, `chosen` and `rejected`.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StageProgressBar()],
    )
    datamodule = PreferenceDataModule(str(reward), predict_data=pairs, max_length=MAX_LENGTH, eval_batch_size=128)
    batches: Any = trainer.predict(RewardModule(str(reward)), datamodule)
    sides: dict[int, dict[str, Any]] = {}
    for row in (row for batch in batches for row in batch):
        sides.setdefault(row["row"], {})[row["role"]] = row
    right = []
    for pair in sides.values():
        chosen, rejected = pair["chosen"], pair["rejected"]
        gold = gold_score(chosen["prompt"], chosen["response"]) - gold_score(rejected["prompt"], rejected["response"])
        if gold:
            right.append((chosen["score"] > rejected["score"]) == (gold > 0))
    return sum(right) / len(right)
