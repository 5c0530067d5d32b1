"""A callback that lets one process of several fail, and what a run needs for it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rlhf_lightning.errors import UserError


class FailAt(pl.Callback):
    """Lets a process fail before a batch, and leaves the file `failed` in the working folder then.

    Args:
        how: `user` for an error of the user's, `memory` for one of memory, `killed`, `exit` for one that says nothing,
            or `hangs` for one that fails and then does not end.
        rank: which process.
        step: after how many optimizer steps.
    """

    def __init__(self, how: str, rank: int = 1, step: int = 1) -> None:
        self.how, self.rank, self.step = how, rank, step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        Path("failed").touch()
        if self.how == "memory":
            torch.empty(2**62, dtype=torch.uint8)
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit":
            os._exit(7)
        raise UserError("mend it")

    def on_exception(self, trainer: Any, *_: Any) -> None:
        if self.how == "hangs" and trainer.global_rank == self.rank:
            signal.pause()  # as where a group of processes does not let itself be ended


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward function that fails in the second process."""
    if os.environ["RANK"] == "1":
        Path("failed").touch()
        raise KeyError("no such key")
    return [0.0] * len(responses)


def end_soon() -> None:
    """Let a process that hangs wait two seconds, not 30."""
    from rlhf_lightning.runs import peers

    peers._OWN_GRACE = 2.0


class WaitAt(pl.Callback):
    """Lets a process wait before a batch, to be killed there, unless the file `go` is in the working folder.

    It writes its number and that of its parent into the pipe `waits` there.

    Args:
        step: after how many optimizer steps.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not Path("go").exists():
            with Path("waits").open("a") as pipe:
                pipe.write(f"{os.getpid()} {os.getppid()}\n")
            signal.pause()
