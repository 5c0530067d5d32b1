"""What a checkpoint of a stage holds, and how a run goes on from it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from rlhf_lightning.algorithms.export_record import export_record
from rlhf_lightning.algorithms.lineage import check_resumed, lineage_of
from rlhf_lightning.algorithms.resumed_settings import check_settings, optimizer_class
from rlhf_lightning.errors import UserError

_STATE = "rlhf_lightning"


class CheckpointedModule(pl.LightningModule):
    """A module whose checkpoints hold trained weights, the state of its run, and what it came from.

    Attributes:
        allow_mismatch: warn, where models, data and checkpoint do not fit one another, instead of stopping.
    """

    optimizer: Any
    allow_mismatch = False

    def __init__(self) -> None:
        super().__init__()
        self._lineage: dict[str, Any] | None = None
        self._run_state: dict[str, Any] = {}

    def run_state(self) -> dict[str, Any]:
        """What must be remembered besides weights: plain numbers, strings, lists and dicts."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on from what `run_state` gave.

        Args:
            state: as it was in the checkpoint.
        """

    def step_state(self) -> dict[str, Any]:
        """What steps change of `run_state`; small, as it is asked for after every batch."""
        return self.run_state()

    @property
    def lineage(self) -> dict[str, Any]:
        """What the stage comes from: versions, data, and the models it began with, each with a hash; plain values."""
        if self._lineage is None:
            self._lineage = lineage_of(self)
        return self._lineage

    @property
    def seed(self) -> int:
        """The seed of the run: that of the checkpoint it was resumed from, else torch's (`seed_everything`)."""
        return int(self._run_state.get("seed", torch.initial_seed()))

    @property
    def _algorithm(self) -> str:
        """Name of the class of this package that the stage is, or derives from."""
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("rlhf_lightning."))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights, which come from their own folders; keep the run's state under one key."""
        drop_frozen_weights(self, checkpoint)
        made_by = {"seed": self.seed, "stage": self._algorithm, "optimizer": optimizer_class(self.optimizer)}
        checkpoint[_STATE] = {**self.run_state(), **made_by, "lineage": self.lineage, "export": export_record(self)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the run that wrote the checkpoint was.

        Raises:
            UserError: the checkpoint is not of this package, or of another model or stage.
        """
        self.configure_model()
        check_trained_weights(self, checkpoint)
        if _STATE not in checkpoint:
            raise UserError("the checkpoint was not made by this package; resume from one of its own")
        made_by = checkpoint[_STATE].get("stage")
        if made_by not in (None, self._algorithm):
            raise UserError(f"the checkpoint is of {made_by}: it was made with another model or stage")
        check_resumed(self, checkpoint[_STATE].get("lineage"))
        check_settings(self, checkpoint[_STATE], checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        self._run_state = checkpoint[_STATE]
        self.load_run_state(self._run_state)


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
