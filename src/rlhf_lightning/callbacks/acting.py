"""What callbacks do about a run that goes wrong: lower its learning rates, or end it."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rlhf_lightning.errors import UserError

Action = Literal["warn", "lower_lr", "stop"]


class ActingCallback(Callback):
    """A callback that may lower learning rates, which a resumed run goes on with, or end the run.

    Attributes:
        action: `warn`, `lower_lr` or `stop`.
        factor: what learning rates are multiplied by.
        lr_factor: what they were multiplied by so far; a subclass keeps it in its state.
        has_stopped: whether the run was ended; kept there, too, so that a run that was killed before its end is not
            trained on when it is resumed.
    """

    action: Action
    factor: float
    lr_factor = 1.0
    has_stopped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Go on with the learning rates as they were lowered; a schedule itself begins with those of its settings.

        Raises:
            UserError: the module's schedule cannot be lowered.
        """
        if self.action == "lower_lr" and not hasattr(pl_module.lr_schedulers(), "scale"):
            raise UserError(
                f"{type(self).__name__}: action lower_lr needs a module of this package, whose schedule can be lowered"
            )
        if self.lr_factor != 1:
            pl_module.lr_schedulers().scale(self.lr_factor)

    def act(self, trainer: pl.Trainer, pl_module: Any) -> str:
        """Do it.

        Args:
            trainer: of the run.
            pl_module: a stage; every process must call this.

        Returns:
            What was done, for a message.
        """
        if self.action == "stop":
            trainer.should_stop = self.has_stopped = True
            return "the run ends here"
        if self.action == "warn":
            return "the run goes on"
        pl_module.lr_schedulers().scale(self.factor)
        self.lr_factor *= self.factor
        return f"learning rates are now {self.lr_factor:g} of those of the settings"
