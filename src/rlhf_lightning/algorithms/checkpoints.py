"""Which weights of a stage a checkpoint holds."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from rlhf_lightning.errors import UserError


def drop_frozen_weights(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Take frozen weights out of a checkpoint: they are loaded from their own folders.

    Args:
        module: the stage.
        checkpoint: Lightning's; DeepSpeed keeps weights elsewhere and leaves them out itself.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    weights = checkpoint.get("state_dict", {})
    for name in frozen & weights.keys():
        del weights[name]


def check_trained_weights(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks trained weights; without strict loading they would silently stay as they are.

    Args:
        module: the stage, its models loaded.
        checkpoint: Lightning's.

    Raises:
        UserError: names a weight that is missing, unknown or of another shape.
    """
    weights = checkpoint.get("state_dict")
    if not weights:
        return
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    known = module.state_dict()
    reason = "it was made with another model or stage"
    if missing := sorted(trained - weights.keys()):
        raise UserError(f"the checkpoint has no weight '{missing[0]}': {reason}")
    if unknown := sorted(weights.keys() - known.keys()):
        raise UserError(f"the checkpoint's weight '{unknown[0]}' is unknown: {reason}")
    for name in sorted(trained):
        if weights[name].shape != known[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(known[name].shape)}"
            raise UserError(f"the checkpoint's weight '{name}' has the shape {shapes}: {reason}")
