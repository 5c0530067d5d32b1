"""Callbacks that stop a run where a test wants it stopped: they send this process a signal there."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import pytorch_lightning as pl

from rlhf_lightning.errors import UserError


class SignalAt(pl.Callback):
    """Sends a signal in a hook of Lightning's.

    Args:
        hook: its name, such as `on_train_batch_start`.
        step: after how many optimizer steps.
        names: signals, one after the other.
        rank: the process that receives them; None for all.
    """

    def __init__(self, hook: str, step: int = 0, names: list[str] | None = None, rank: int | None = None) -> None:
        self.numbers = [signal.Signals[name] for name in names or ["SIGTERM"]]
        self.step, self.rank = step, rank
        setattr(self, hook, self._send)

    def _send(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            while self.numbers:
                os.kill(os.getpid(), self.numbers.pop(0))


class FullDisk(pl.Callback):
    """Lets no file grow beyond a size after some optimizer steps; who uses it puts `RLIMIT_FSIZE` back."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Fails(pl.Callback):
    """Fails after some optimizer steps, by something the user can fix."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise UserError("no more")
