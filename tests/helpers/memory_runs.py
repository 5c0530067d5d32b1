"""What one of several processes holds while it trains, counted in tensors; for `helpers.distributed`."""

from __future__ import annotations

import gc
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.strategy_runs import TinyModule, loader, trainer
from helpers.strategy_runs import strategy as strategy_of
from rlhf_lightning import DeepSpeedStrategy

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
"""Of 3.5 million weights: many times the least that a buffer holds."""


def save_wide_model(folder: Any) -> str:
    """Write the model that these runs start from."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return str(folder)


def storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of Python's refers to, by address; of those above 1 KiB."""
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (each, each.grad if each.is_leaf else None, getattr(each, "ds_tensor", None)):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 1024:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


class Count(pl.Callback):
    """Counts at the start of training, and before the second step of the optimizer."""

    def __init__(self) -> None:
        gc.collect()
        self.before = storages()  # of earlier runs
        self.held: dict[str, Any] = {}

    def count(self, name: str) -> None:
        gc.collect()
        found = {place: size for place, size in storages().items() if self.before.get(place) != size}
        self.held[name] = {"sum": sum(found.values()), "largest": max(found.values())}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count("loaded")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.count("held")


def held(name: str, folder: str, options: dict[str, Any] | None = None, precision: Any = "32-true") -> dict[str, Any]:
    """Two steps of AdamW.

    Args:
        name: the strategy, as in `helpers.strategy_runs`.
        folder: of the model.
        options: of DeepSpeed's strategy.
        precision: the Trainer's.

    Returns:
        `loaded` and `held`, each the `sum` and the `largest` in bytes; `weights`, and the sizes of DeepSpeed.
    """
    count = Count()
    module = TinyModule(folder, micro_sizes=[4, 4, 4], adam=True)
    strategy = DeepSpeedStrategy(stage=int(name[4]), **options) if options else strategy_of(name)
    run = trainer(name, strategy=strategy, callbacks=[count], precision=precision, max_steps=2)
    run.fit(module, loader())
    config = getattr(run.strategy, "config", {}).get("zero_optimization", {})
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    sizes = {key: value for key, value in config.items() if isinstance(value, int)}
    return count.held | {"weights": weights, "sizes": sizes}


def run_all(runs: list[dict[str, Any]]) -> list[Any]:
    """One run after the other in the same process."""
    return [held(**run) for run in runs]
