"""The peer's side of a comparison: the same stage in TRL, run by the Python of TRL's own environment.

    PYTHON benchmarks/_trl.py JOB REPORT

Run by compare.py. SFT and reward modelling need a current TRL; PPO needs one that still has it (1.12).
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import Recorder
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)

Job = dict[str, Any]

PPO_METRICS = {
    "objective/scores": "score",
    "objective/kl": "kl",
    "objective/entropy": "entropy_sum",
    "loss/value_avg": "value_loss",
}


class StepClock(TrainerCallback):
    """Tells the recorder of each step."""

    def __init__(self, recorder: Recorder, names: dict[str, str]) -> None:
        self.recorder, self.names = recorder, names

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.recorder.note(**{name: logs[key] for key, name in self.names.items() if key in (logs or {})})


def counted(collate: Callable[[Any], Any], recorder: Recorder) -> Callable[[Any], Any]:
    """A collator that also writes down the real tokens of each batch."""

    def collate_and_count(examples: list[dict[str, Any]]) -> Any:
        sides = ("input_ids", "chosen_ids", "rejected_ids")
        recorder.tokens.append(sum(len(row[side]) for row in examples for side in sides if side in row))
        return collate(examples)

    return collate_and_count


def read_rows(job: Job) -> Dataset:
    """The rows of all steps, in order."""
    lines = Path(job["rows_file"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Dataset.from_list([{name: value for name, value in row.items() if name != "row"} for row in rows])


def arguments(job: Job) -> dict[str, Any]:
    """Training arguments that make the peer do what we do; the rest stays as TRL has it."""
    checkpointing = {} if job["peer_settings"] == "default" else {"gradient_checkpointing": False}
    return {
        "output_dir": str(Path(job["work"]) / "peer"),
        "per_device_train_batch_size": job["rows"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": job["precision"] == "bf16-mixed",
        "use_cpu": job["device"] == "cpu",
        "seed": job["seed"],
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **checkpointing,
    }


def pretrained(cls: Any, name: str, **options: Any) -> Any:
    """A model in float32, as under mixed precision and at full precision."""
    return cls.from_pretrained(name, dtype=torch.float32, **options)


def sft(job: Job, recorder: Recorder) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**arguments(job), max_steps=job["steps"], max_length=job["max_length"], completion_only_loss=True)
    trainer = SFTTrainer(
        model=pretrained(AutoModelForCausalLM, job["model"]),
        args=args,
        train_dataset=read_rows(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[StepClock(recorder, {"loss": "loss"})],
    )
    trainer.data_collator = counted(trainer.data_collator, recorder)
    return trainer


def reward(job: Job, recorder: Recorder) -> Any:
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**arguments(job), max_steps=job["steps"], max_length=job["max_length"])
    trainer = RewardTrainer(
        model=pretrained(AutoModelForSequenceClassification, job["reward"], num_labels=1),
        args=args,
        train_dataset=read_rows(job),
        processing_class=AutoTokenizer.from_pretrained(job["reward"]),
        callbacks=[StepClock(recorder, {"loss": "loss", "accuracy": "accuracy"})],
    )
    trainer.data_collator = counted(trainer.data_collator, recorder)
    return trainer


def ppo(job: Job, recorder: Recorder) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        **arguments(job),
        total_episodes=job["steps"] * job["rows"],
        num_ppo_epochs=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=job["rows"],
        response_length=job["new_tokens"],
        stop_token="eos" if job["eos"] == "stop" else None,
        temperature=job["temperature"],
        kl_coef=0.05,
        num_sample_generations=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(job["reward"], padding_side="left")
    rows = read_rows(job)
    value = pretrained(AutoModelForSequenceClassification, job["reward"], num_labels=1)
    adapters: dict[str, Any] = {"ref_model": pretrained(AutoModelForCausalLM, job["model"])}
    if job["variant"] == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        adapters = {"ref_model": None, "peft_config": LoraConfig(task_type="CAUSAL_LM", **job["lora"])}
        if job["peer_value"] == "lora":
            value.requires_grad_(False)
            value = inject_adapter_in_model(LoraConfig(**job["lora"], exclude_modules=["score"]), value)
            value.score.requires_grad_(True)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=pretrained(AutoModelForCausalLM, job["model"]),
        reward_model=pretrained(AutoModelForSequenceClassification, job["reward"], num_labels=1),
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(1)),
        callbacks=[StepClock(recorder, PPO_METRICS)],
        **adapters,
    )
    collate = counted(DataCollatorWithPadding(tokenizer), recorder)
    trainer.dataloader = trainer.accelerator.prepare(DataLoader(rows, batch_size=job["rows"], collate_fn=collate))
    return trainer


def main() -> None:
    """Train for the steps of the job and report."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import trl

    if job["stage"] == "ppo":
        import trl.experimental.ppo as trainers
    else:
        import trl as trainers
    for name in ("SFTTrainer", "RewardTrainer", "PPOTrainer"):
        getattr(trainers, name, None)  # imported lazily; what is resident now counts as libraries
    recorder = Recorder()
    warnings.filterwarnings("ignore")
    trainer = {"sft": sft, "reward": reward, "ppo": ppo}[job["stage"]](job, recorder)
    trainer.train()
    args = trainer.args
    told = {name: str(getattr(args, name, None)) for name in ("gradient_checkpointing", "optim", "max_grad_norm")}
    recorder.write(sys.argv[2], name=f"TRL {trl.__version__}", settings=told)


if __name__ == "__main__":
    main()
