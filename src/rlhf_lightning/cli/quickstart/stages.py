"""The stages on the embedded data, through the modules, data modules and Trainer that users get.

Their settings are those of the pipeline `configs/quickstart.yaml` and of the recipes that its steps name: what is here
is done by commands with `rlhf pipeline --config quickstart.yaml`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from rlhf_lightning.algorithms import PPOModule, RewardModule
from rlhf_lightning.callbacks import Evaluate, HFExport, SampleTexts, StageProgressBar
from rlhf_lightning.callbacks.evaluate import Judged
from rlhf_lightning.cli.errors import find_class
from rlhf_lightning.cli.pipeline.steps import read_pipeline
from rlhf_lightning.cli.quickstart.toy import ToyPaths, gold_score
from rlhf_lightning.cli.recipes import RECIPES, read_config
from rlhf_lightning.data import PreferenceDataModule, PromptDataModule
from rlhf_lightning.generation.sampling import Sampling

SAMPLING = Sampling(temperature=0.7, max_new_tokens=72)
MAX_LENGTH = 160
_PARTS = ("model", "data", "trainer")

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


class Settings(NamedTuple):
    """What a step of the pipeline sets, on top of its recipe.

    Attributes:
        classes: of module and data module, by `model` and `data`.
        model: arguments of the module.
        data: arguments of the data module.
        trainer: arguments of the Trainer.
    """

    classes: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]


def settings_of(name: str, seed: int, *others: str) -> Settings:
    """Settings of a stage.

    Args:
        name: of the step.
        seed: of all random numbers.
        *others: recipes that are stacked on `quickstart.yaml`.
    """
    # The package's own, whatever files of these names lie in the working folder.
    recipes = [str(RECIPES / recipe) for recipe in ("quickstart.yaml", *others)]
    (step,) = (step for step in read_pipeline(recipes, [f"seed={seed}"], None).steps if step.name == name)
    said = read_config(str(RECIPES / Path(step.configs[0]).name))
    parts: dict[str, dict[str, Any]] = {part: said[part].get("init_args", said[part]) for part in _PARTS}
    for key, value in step.options.items():
        part, _, argument = key.partition(".")
        if argument:
            parts[part] = merged(parts[part], {argument: seed if value == "{seed}" else value})
    for ours in ("default_root_dir", "callbacks"):
        parts["trainer"].pop(ours)
    return Settings({part: find_class(said[part]["class_path"]) for part in ("model", "data")}, **parts)


def merged(settings: Any, changes: Any) -> Any:
    """Settings with changes, group by group, as later options of the command line go over those of a recipe.

    Example:
        >>> merged({"lr": 1, "kl": {"coef": 0.1, "target": 6}}, {"kl": {"coef": 0.2}})
        {'lr': 1, 'kl': {'coef': 0.2, 'target': 6}}
    """
    if not isinstance(settings, dict) or not isinstance(changes, dict):
        return changes
    both = {name: merged(settings.get(name), value) for name, value in changes.items()}
    return {**settings, **both}


def _trainer(folder: Path, callbacks: list[Callback], settings: dict[str, Any]) -> pl.Trainer:
    tensorboard = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    return pl.Trainer(
        default_root_dir=folder,
        logger=[CSVLogger(folder, name="", version=""), tensorboard],
        callbacks=[StageProgressBar(leave=True), HFExport(), *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
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
    settings = settings_of("sft", seed)
    samples = SampleTexts(["\n\nHuman: How do I repair my old bicycle?\n\nAssistant:"])
    return _run(settings, {"model_name_or_path": base}, {"data": data.sft}, folder, seed, [samples])


def train_reward(sft: Path, data: ToyPaths, folder: Path, seed: int, **options: Any) -> StageResult:
    """Learn from noisy preferences which answer is better.

    Args:
        sft: export of the SFT stage.
        data: the embedded data.
        folder: where the run lives.
        seed: of all random numbers.
        **options: of `RewardModule`.
    """
    settings = settings_of("reward", seed)
    return _run(settings, {"model_name_or_path": sft, **options}, _pairs(data), folder, seed)


def train_last(
    algorithm: Algorithm, sft: Path, reward: Path | str, data: ToyPaths, folder: Path, seed: int, **settings: Any
) -> tuple[StageResult, GoldCurve]:
    """Improve the SFT model, against the reward model or, with DPO, from the pairs that it was trained on.

    Args:
        algorithm: which.
        sft: export of the SFT stage.
        reward: export of the reward stage, or the import path of a function.
        data: the embedded data.
        folder: where the run lives.
        seed: of all random numbers.
        **settings: of the module, where they are to differ from those of the quickstart.

    Returns:
        The run, and its validations scored by gold, none for DPO.
    """
    curve = GoldCurve()
    others = () if algorithm == "ppo" else (f"quickstart/{algorithm}.yaml",)
    chosen = settings_of("policy", seed, *others)
    if algorithm == "dpo":
        return _run(chosen, {"model_name_or_path": sft, **settings}, _pairs(data), folder, seed), curve
    models = {"model_name_or_path": sft, "reward": reward}
    return _run(chosen, {**models, **settings}, _prompts(data), folder, seed, [curve]), curve


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
    settings = settings_of("policy", seed)
    limits = {"limit_train_batches": iterations, "limit_val_batches": 0}
    settings = settings._replace(trainer=merged(settings.trainer, limits))
    changes = {
        "model_name_or_path": sft,
        "reward": reward,
        "optimizer": {"init_args": {"lr": 4e-4}},
        "kl": {"coef": kl_coef},
        "lr_schedule": "constant",
    }
    evaluate = Evaluate(gold, every_n_iterations=2, num_prompts=128)
    _run(settings, changes, _prompts(data), folder, seed, [evaluate])
    return evaluate.points


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """The gold scores of responses, as a reward function."""
    return [gold_score(*answer) for answer in zip(prompts, responses, strict=True)]


def _run(
    settings: Settings,
    model: dict[str, Any],
    data: dict[str, Any],
    folder: Path,
    seed: int,
    callbacks: Sequence[Callback] = (),
) -> StageResult:
    """Train a stage with the settings of its step, changed by arguments of its module and of its data module."""
    pl.seed_everything(seed, verbose=False)
    arguments = merged(settings.model, {name: _plain(value) for name, value in model.items()})
    module = settings.classes["model"](**arguments)
    links = {"tokenizer": arguments["model_name_or_path"]}
    if "rollout_batch_size" in arguments:
        links["rollout_batch_size"] = arguments["rollout_batch_size"]
    datamodule = settings.classes["data"](**merged(settings.data, {**links, **data}))
    return _fit(_trainer(folder, [*callbacks], settings.trainer), module, datamodule)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _pairs(data: ToyPaths) -> dict[str, Any]:
    return {"data": data.preferences, "validation_data": data.preferences_validation}


def _prompts(data: ToyPaths) -> dict[str, Any]:
    return {"data": data.prompts, "validation_data": data.prompts_heldout}


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
