"""Gradients that two processes sum over many micro-batches on DeepSpeed in bfloat16; for `helpers.distributed`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from helpers.strategy_runs import CONFIG, LENGTH, TinyModule, trainer
from rlhf_lightning import DeepSpeedStrategy
from rlhf_lightning.training import GradientAccumulation

PROCESSES, MICRO_BATCHES = 2, 64


class ManyRows(Dataset):
    """One batch, of a row for each micro-batch of each process."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, CONFIG.vocab_size, (PROCESSES * MICRO_BATCHES, LENGTH), generator=generator)
        return ids, torch.ones_like(ids, dtype=torch.bool)


class MeasuredModule(TinyModule):
    """One step of SGD at a rate of 1, so that the float32 weights move by the gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        before = self.float32_weights()
        ids, mask = (field[self.global_rank :: PROCESSES] for field in batch)
        accumulation = GradientAccumulation(self, len(ids))
        for row in range(len(ids)):
            accumulation.backward(self.loss_sum(ids[row : row + 1], mask[row : row + 1]) / len(batch[0]))
        self.seen["norms"].append(accumulation.step().item())
        after = self.float32_weights()
        self.seen["gradient"] = {name: (before[name] - after[name]).tolist() for name in before}

    def float32_weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return {name: safe_get_full_fp32_param(p).double().clone() for name, p in named}


def reference(folder: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradient of one process, of each micro-batch in `dtype`, and their sum in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    module = TinyModule(folder, micro_sizes=[1])
    module.model = model
    ids, mask = ManyRows()[0]
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for row in range(len(ids)):
        model.zero_grad()
        (module.loss_sum(ids[row : row + 1], mask[row : row + 1]) / len(ids)).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.double()
    return total


def measured(stage: int, gradient_dtype: str, folder: str, precision: str = "bf16-mixed") -> dict[str, Any]:
    """Run one step; the gradient by the weights' names, and what DeepSpeed was told."""
    module = MeasuredModule(folder, micro_sizes=[1])
    strategy = DeepSpeedStrategy(stage=stage, gradient_dtype=gradient_dtype)
    run = trainer("ddp", strategy=strategy, precision=precision, callbacks=[])
    run.fit(module, DataLoader(ManyRows(), batch_size=None))
    told = {key: strategy.config.get(key) for key in ("data_types", "communication_data_type")}
    return {"gradient": module.seen["gradient"], "norm": module.seen["norms"][0], "told": told}


def run_all(runs: list[dict[str, Any]]) -> list[Any]:
    """One run after the other in the same process."""
    return [measured(**run) for run in runs]
