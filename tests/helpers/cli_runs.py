"""What the command line needs to run: tiny model folders, files of dialogues, and options that make a run short."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.forked import Finished, run_forked
from helpers.forked import environment as environment
from helpers.tokenizers import tiny_tokenizer

QUESTIONS = ["bake bread", "repair a bicycle", "plant a tree", "learn to swim", "write a letter", "cook some rice"]
CONTEXT = 96


def save_model(folder: Path, *, chat_template: bool = False, seed: int = 0) -> Path:
    """Write a language model of about 14,000 parameters with tied weights, and its tokenizer."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    return folder


def dialogue(i: int, answer: str) -> str:
    """Question `i` and an answer, in Human and Assistant turns."""
    question = QUESTIONS[i % len(QUESTIONS)]
    return f"\n\nHuman: how do i {question} {i}?\n\nAssistant: {answer}"


def save_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_pairs(path: Path, count: int = 24) -> Path:
    """Write preference pairs, whole dialogues; every stage can read them."""
    rows = [{"chosen": dialogue(i, "Happy to help!"), "rejected": dialogue(i, "No.")} for i in range(count)]
    return save_rows(path, rows)


def short(model: Path | str, data: Path | str, root: Path | str, steps: int = 2, report: bool = False) -> list[str]:
    """Options of any stage: tiny sizes, no bar, and the run folder."""
    return [
        f"--model.model_name_or_path={model}",
        f"--data.data={data}",
        "--data.validation_split=0.25",
        f"--trainer.default_root_dir={root}",
        f"--trainer.max_steps={steps}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        *([] if report else ["--report=false"]),
    ]


SFT = ["--config=sft.yaml", "--data.max_length=64", "--data.batch_size=4", "--model.sampling.max_new_tokens=4"]
REWARD = ["--config=reward.yaml", "--data.max_length=64", "--data.batch_size=4"]
PPO = [
    "--config=ppo.yaml",
    "--data.max_prompt_length=48",
    "--model.sampling.max_new_tokens=4",
    "--model.rollout_batch_size=4",
    "--model.minibatch_size=2",
    "--model.micro_batch_size=2",
    "--trainer.val_check_interval=1",
]


def command(*args: str) -> list[str]:
    """The words that start the command line in a process of its own."""
    return [sys.executable, "-m", "rlhf_lightning", *args]


def run(*args: str, cwd: Path | None = None) -> Finished:
    """Run the command line in a process of its own, forked from one that has imported everything."""
    return run_forked(args, cwd or Path.cwd(), timeout=600)


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Be in a folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Announce(pl.Callback):
    """Prints a word once a checkpoint of this run is there, and lets the run go on."""

    def __init__(self) -> None:
        self.said = False

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.said and list(Path(trainer.default_root_dir).glob("checkpoints/*.ckpt")):
            self.said = True
            print("checkpoint written", flush=True)
