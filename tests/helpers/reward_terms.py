"""Reward models that learn more than leads, and the language models that they start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.models import save_folder
from helpers.stages import (
    MemoryLogger,
    disturb_random_numbers,
    fit,
    preference_rows,
    save_llama,
    sgd,
    unpadded,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import PreferenceDataModule, RewardModule
from rlhf_lightning.batches import PreferenceBatch

CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0, "gradient_clip_val": None}


def save_language_models(root: Path) -> dict[str, str]:
    """Two whose output layer is one of its own, or the input embeddings."""
    tokenizer = tiny_tokenizer(pad="eos")
    model: Any = AutoModelForCausalLM.from_pretrained(save_llama(root / "source", tokenizer))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return {"untied": save_llama(root / "untied"), "tied": save_folder(root / "tied", model, tokenizer)}


def batches(folder: str, count: int = 24, size: int = 8) -> list[PreferenceBatch]:
    """Pairs of which every other asks for a margin."""
    rows = [row | {"margin": 0.2 * (i % 2)} for i, row in enumerate(preference_rows(count))]
    data = PreferenceDataModule(folder, rows, max_length=48, validation_split=0.0, batch_size=size)
    data.setup("fit")
    return list(data.train_dataloader())


def train(
    folder: str, data: list[PreferenceBatch], lr: float = 0.1, kind: Any = RewardModule, **settings: Any
) -> tuple[Any, MemoryLogger]:
    """A module after a pass over batches by plain gradient descent, and its log; always the same fresh head."""
    disturb_random_numbers(3)
    module = kind(folder, optimizer=sgd(lr), **CONSTANT, **settings)
    return module, fit(module, DataLoader(data, batch_size=None))


def all_weights(module: Any) -> dict[str, Tensor]:
    """Of the scalar model, and of an output layer beside it."""
    parts = [part for part in (module.scalar, module.language_head) if part is not None]
    return weights(torch.nn.ModuleList(parts))


def by_hand(folder: str, module: Any, batch: PreferenceBatch) -> list[tuple[float, float, list[float]]]:
    """For each pair: scores at the last token, and log-likelihoods of the chosen response's tokens, by transformers."""
    scorer, lm = module.export_model.eval(), AutoModelForCausalLM.from_pretrained(folder)
    sides = (unpadded(*side) for side in (batch[:2], batch[2:4]))
    found = []
    with torch.no_grad():
        for chosen, rejected, prompt in zip(*sides, batch.prompt_lengths.tolist(), strict=True):
            ends = [scorer.score(scorer.base_model(ids).last_hidden_state)[0, -1].item() for ids in (chosen, rejected)]
            said = lm(chosen).logits[0, :-1].log_softmax(dim=1).gather(1, chosen[0, 1:, None])[:, 0]
            found.append((*ends, said[prompt - 1 :].tolist()))
    return found
