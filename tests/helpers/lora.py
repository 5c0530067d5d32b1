"""Tiny models with adapters."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlhf_lightning import FineTune
from rlhf_lightning.models.finetune import prepare_for_training

LORA = FineTune("lora", rank=4)


def trained(model: PreTrainedModel) -> set[str]:
    """Names of the weights that are trained."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapted(model: PreTrainedModel, finetune: FineTune = LORA, seed: int = 0) -> PreTrainedModel:
    """A model prepared for training."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        prepare_for_training(model, finetune)
    return model


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Adapters as if they had been trained."""
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
