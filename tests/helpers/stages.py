"""Tiny model folders, data and trainers on which whole stages run in a second."""

import itertools
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.algorithms import logged, pairs
from rlhf_lightning.algorithms import sft as sft_stage
from rlhf_lightning.algorithms.online import stage as online_stage
from rlhf_lightning.models.scalar_lm import Calibration, new_scalar_lm

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
disable_progress_bar()

CONTEXT = 64
LETTERS = set("abcdefghijklmnopqrstuvwxyz")
_WORDS = ["bread", "water", "salt", "yeast", "chain", "bicycle", "happy", "politely", "small", "repair", "bake"]


def save_llama(
    folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, hidden_size: int = 32, layers: int = 2
) -> str:
    """A Llama of about 35,000 parameters with its tokenizer; always the same weights.

    On ZeRO-3 a pass costs by the layer, whatever its size.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(LlamaForCausalLM, config, tokenizer, folder)


def save_gpt2(folder: Path, dropout: float, layers: int = 2) -> str:
    """A GPT-2, whose config asks for dropout in three places."""
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=layers,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.1,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _save(GPT2LMHeadModel, config, tokenizer, folder)


def _save(kind: Any, config: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, base: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A reward model on `base` with a random head, calibrated to mean 0.5 and standard deviation 2, and a probe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        scalar = new_scalar_lm(base)
    probe = torch.tensor([[5, 6, 7, 8]])
    score = scalar.raw(probe, torch.ones_like(probe).bool())[0, -1].item()
    scalar.calibration = Calibration(0.5, 2.0, probe[0].tolist(), score)
    scalar.model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def words(count: int, seed: int) -> str:
    """The same `count` words for the same seed."""
    return " ".join(random.Random(seed).choices(_WORDS, k=count))


def instruction_rows(count: int) -> list[dict[str, str]]:
    """Prompts and responses of 1 to 6 words."""
    return [{"prompt": f"{i}: {words(1 + i % 4, i)}", "response": words(1 + i % 6, 100 + i)} for i in range(count)]


def preference_rows(count: int) -> list[dict[str, str]]:
    """Pairs that differ in length and in one telling word."""
    return [
        {
            "prompt": f"{i}: {words(1 + i % 3, i)}",
            "chosen": f"happy {words(1 + i % 5, 200 + i)}",
            "rejected": f"salt {words(1 + (i + 2) % 4, 300 + i)}",
        }
        for i in range(count)
    ]


def prompt_rows(count: int) -> list[dict[str, str]]:
    """Different prompts of 1 to 4 words."""
    return [{"prompt": f"{i}: {words(1 + i % 4, i)}"} for i in range(count)]


def share_of_letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward: the share of lower-case letters in each response."""
    return [sum(c in LETTERS for c in text) / max(len(text), 1) for text in responses]


class MemoryLogger(Logger):
    """Keeps what is logged, one dict per call."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def series(self, name: str) -> list[float]:
        """All values of one metric, in order."""
        return [call[name] for call in self.calls if name in call]

    def names(self, stage: str) -> set[str]:
        """Names logged under `stage/`, without it."""
        return {name.removeprefix(f"{stage}/") for call in self.calls for name in call if name.startswith(f"{stage}/")}


def trainer(**settings: Any) -> pl.Trainer:
    """A silent trainer on one CPU process that keeps nothing, unless told otherwise."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**quiet | settings)


def fit(module: pl.LightningModule, data: Any, **settings: Any) -> MemoryLogger:
    """Train and return what was logged; `ckpt_path` resumes."""
    logger, checkpoint = MemoryLogger(), settings.pop("ckpt_path", None)
    trainer(logger=logger, **settings).fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return logger


def weights(model: nn.Module | None) -> dict[str, Tensor]:
    """A copy of all weights."""
    assert model is not None
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit; NaN equals NaN."""
    return a.keys() == b.keys() and all(
        bool(((a[name] == b[name]) | (a[name].isnan() & b[name].isnan())).all()) for name in a
    )


def assert_close_weights(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every weight agrees to an absolute tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def disturb_random_numbers(seed: int) -> None:
    """Leave every global generator in a state that no run expects."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stages see a clock of which each look is two seconds after the one before."""
    looks = SimpleNamespace(perf_counter=itertools.count(step=2).__next__)
    for module in (logged, sft_stage, pairs, online_stage):
        monkeypatch.setattr(module, "time", looks)


def sgd(lr: float) -> Any:
    """Plain gradient descent, which shows a wrong scale of the gradient best."""
    return lambda groups: torch.optim.SGD(groups, lr=lr)


def adamw(lr: float) -> Any:
    """AdamW without weight decay."""
    return lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


def unpadded(ids: Tensor, mask: Tensor) -> Iterable[Tensor]:
    """Each row of a padded batch as `[1, length]`."""
    return [row[keep].unsqueeze(0) for row, keep in zip(ids, mask, strict=True)]
