"""Settings that differ from those of the run that a checkpoint is of: applied, or refused; `docs/reliability.md`."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import nn

from rlhf_lightning.algorithms.lineage import is_fitting
from rlhf_lightning.errors import UserError


def optimizer_class(make_optimizer: Any) -> str:
    """Import path of the class that an optimizer is of.

    Args:
        make_optimizer: makes it of parameter groups.
    """
    kind = type(make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}]))
    return f"{kind.__module__}.{kind.__qualname__}"


def check_settings(module: Any, state: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
    """Refuse what a resumed run cannot apply, and say in a line where the checkpoint wins.

    Args:
        module: the stage that is resumed.
        state: its own part of the checkpoint.
        hyperparameters: those of the run that was saved.

    Raises:
        UserError: another optimizer of a run that trains on, or other weights to train.
    """
    mode = (hyperparameters.get("finetune") or {}).get("mode", module.finetune.mode)
    if mode != module.finetune.mode:
        raise UserError(
            f"finetune.mode is {module.finetune.mode}, that of the checkpoint is {mode}, which trains other weights: "
            "resume with the same, or start anew from an exported model"
        )
    if not is_fitting(module):
        return  # weights are all that is taken from it
    saved, now = state.get("optimizer"), optimizer_class(module.optimizer)
    if saved not in (None, now):
        raise UserError(
            f"the optimizer is {now}, that of the checkpoint is {saved}, whose state it cannot take over: resume with "
            "the same (its arguments may change), or start anew from an exported model"
        )
    if state["seed"] != torch.initial_seed():
        rank_zero_info(f"random numbers go on with seed {state['seed']}, that of the checkpoint")
    before, kl = hyperparameters.get("kl") or {}, getattr(module, "kl", None)
    if kl is not None and kl.target is not None and before.get("coef", kl.coef) != kl.coef:
        rank_zero_info(f"the adaptive KL coefficient goes on with {state['kl_coef']:g}; kl.coef is where it starts")
