"""Tiny models with adapters."""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel

from rlhf_lightning import FineTune, PPOModule, SFTModule
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


def import_by_need(folder: str) -> None:
    """Adapters need PEFT, and four bits bitsandbytes; for a process that has not imported bitsandbytes."""
    assert "bitsandbytes" not in sys.modules
    SFTModule(folder, finetune=FineTune(mode="lora", rank=2, use_dora=True)).configure_model()
    assert "peft" in sys.modules
    assert "bitsandbytes" not in sys.modules

    import peft.import_utils

    assert peft.import_utils.is_bnb_available()  # whoever asks from outside

    from peft.tuners.lora.bnb import Linear4bit

    adapter = FineTune(mode="lora", rank=2, export="adapter")
    module = PPOModule(folder, reward=_lengths, frozen_dtype="nf4", finetune=adapter)
    module.configure_model()
    assert module.policy is not None
    assert any(isinstance(layer, Linear4bit) for layer in module.policy.modules())


def _lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]
