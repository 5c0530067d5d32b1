"""Our side of a comparison: one stage through the public API, in a process of its own.

    python benchmarks/_ours.py JOB REPORT [SIDE]

Run by compare.py; as the peer of what ships, too.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from _rows import data_module
from measuring import Recorder, arguments_of

import rlhf_lightning
from rlhf_lightning import KLPenalty, Objective, PPOModule, RewardModule, Sampling, ScoreShaping, SFTModule

SHOWN = {
    "sft": {"loss": "train/loss"},
    "reward": {"loss": "train/loss", "accuracy": "train/accuracy"},
    "ppo": {
        "score": "train/score",
        "kl": "train/kl",
        "entropy": "train/entropy",
        "value_loss": "train/value_loss",
        "seconds_generating": "train/seconds_generating",
        "seconds_scoring": "train/seconds_scoring",
        "seconds_updating": "train/seconds_updating",
    },
}
"""Our names of what is written down of each step."""

MODULES = {"sft": "SFTModule", "reward": "RewardModule", "ppo": "PPOModule"}
"""Class of each stage, by name."""

BEST: dict[str, dict[str, Any]] = {
    "sft": {"max_tokens_per_batch": 512},
    "reward": {"prefix_sharing": True, "max_tokens_per_batch": 1024},
    "ppo": {"max_tokens_per_batch": 512},
}
"""What we choose for a CPU; an argument that a module does not have yet is left out. `--ours-options` comes on top."""


WAYS = ("micro_batch_size", "max_tokens_per_batch", "prefix_sharing", "compile_decoding", "generation_batch_size")
"""What a recipe says of the way that a step is computed, which changes time and memory alone."""


class StepClock(pl.Callback):
    """Tells the recorder of each step."""

    def __init__(self, recorder: Recorder, stage: str) -> None:
        self.recorder, self.stage = recorder, stage

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recorder.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        masks = [field for name, field in batch._asdict().items() if name in MASKS]
        self.recorder.tokens.append(int(sum(mask.sum() for mask in masks)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        logged = trainer.callback_metrics
        self.recorder.note(**{name: float(logged[key]) for name, key in SHOWN[self.stage].items() if key in logged})
        self.recorder.end_step()


MASKS = ("attention_mask", "chosen_mask", "rejected_mask", "prompt_mask")


def optimizer(job: dict[str, Any]) -> Any:
    """AdamW as the peer makes it: fused, no weight decay; or as a recipe names it."""
    way = {} if job["as_shipped"] else {"fused": True}
    return partial(torch.optim.AdamW, lr=job["learning_rate"], weight_decay=0.0, **way)


def sided(job: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """The job of a side: as its peer in our own environment we take our best options."""
    return {**job, "as_shipped": job["as_shipped"] and arguments[3:] != ["peer"]}


def shipped(stage: str) -> dict[str, Any]:
    """How a step is computed by the recipe of a stage; what it does not name stays as the module has it."""
    recipe = (Path(__file__).parents[1] / "configs" / f"{stage}.yaml").read_text(encoding="utf-8")
    arguments = yaml.safe_load(recipe)["model"]["init_args"]
    return {name: arguments[name] for name in WAYS if name in arguments}


def options(module: type, job: dict[str, Any]) -> dict[str, Any]:
    """The best settings that the module knows, or those of the recipe, then those asked for."""
    known = arguments_of(module)
    if job["as_shipped"]:
        return shipped(job["stage"]) | job["ours_options"]
    asked: dict[str, Any] = job["ours_options"]
    if unknown := set(asked) - set(known):
        sys.exit(f"{module.__name__} has no argument {sorted(unknown)[0]}")
    chosen = {name: value for name, value in BEST[job["stage"]].items() if name in known}
    if "micro_batch_size" in asked:  # the two ways to cut a batch exclude each other
        chosen.pop("max_tokens_per_batch", None)
    return chosen | asked


def variant_options(job: dict[str, Any]) -> dict[str, Any]:
    """What `--variant` means to PPO."""
    if job["variant"] == "lora":
        fine_tune = getattr(rlhf_lightning, "FineTune", None) or sys.exit("this version has no LoRA mode")
        settings = {"rank": job["lora"]["r"], "alpha": job["lora"]["lora_alpha"]}
        return {"finetune": fine_tune(mode="lora", **settings), "reward": job["reward_adapter"]}
    shared = {"value_trunk": "policy"} if job["variant"] == "shared" else {}
    return {"reward": job["reward"], **shared}


def build(job: dict[str, Any]) -> tuple[pl.LightningModule, dict[str, Any]]:
    """The module of the stage, and the settings of ours that are worth telling."""
    common: dict[str, Any] = {"optimizer": optimizer(job), "lr_schedule": "constant", "warmup_steps": 0}
    if job["stage"] == "sft":
        chosen = options(SFTModule, job)
        return SFTModule(job["model"], **common, **chosen), chosen
    if job["stage"] == "reward":
        chosen = options(RewardModule, job)
        return RewardModule(job["reward"], **common, **chosen), chosen
    new, rows = job["new_tokens"], job["rows"]
    chosen = variant_options(job) | options(PPOModule, job)
    module = PPOModule(
        job["model"],
        **common,
        gradient_clip_val=None,
        sampling=Sampling(job["temperature"], max_new_tokens=new, min_new_tokens=0 if job["eos"] == "stop" else new),
        rollout_batch_size=rows,
        minibatch_size=rows,
        ppo_epochs=1,
        kl=KLPenalty(coef=0.05),
        score=ScoreShaping(scaling=False, clip=None),
        objective=Objective(),
        **chosen,
    )
    return module, {name: str(value) for name, value in chosen.items() if name != "reward"}


def main() -> None:
    """Train for the steps of the job and report."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = sided(job, sys.argv)
    recorder = Recorder()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(job["seed"])
    module, chosen = build(job)
    trainer = pl.Trainer(
        max_steps=job["steps"],
        accelerator="gpu" if job["device"] == "cuda" else "cpu",
        devices=1,
        precision=job["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[StepClock(recorder, job["stage"])],
    )
    trainer.fit(module, datamodule=data_module(job))
    name = "rlhf_lightning" + (", as it ships" if job["as_shipped"] else "")
    recorder.write(sys.argv[2], name=name, settings=chosen)


if __name__ == "__main__":
    main()
