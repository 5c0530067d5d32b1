"""Ends a run that is asked to stop where nothing is lost, and keeps its last state on the disk meanwhile."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.arguments import POSITIVE, check_arguments
from rlhf_lightning.data.resuming import ends_epoch
from rlhf_lightning.errors import UserError
from rlhf_lightning.lightning_compat import last_path, leave_signals_alone, optimizer_steps_begun, save_last
from rlhf_lightning.runs.signals import EXIT_CODES, SignalWatch, Stopped
from rlhf_lightning.runs.space import check_space, free_space
from rlhf_lightning.training import is_single_device, sum_over_ranks
from rlhf_lightning.training.checkpoint_size import checkpoint_size

_COMPLETING = "training is done, completing the run; Ctrl-C once more ends it at once"


class Stopping(Callback):
    """Lets a run be stopped at any time without losing a step, and saves it every few minutes in case it is killed.

    After SIGTERM, SIGINT (Ctrl-C), SIGHUP of a terminal, or SIGUSR1 in a job of SLURM, training finishes its batch, in
    PPO the iteration; all processes agree on which one, wherever the signal came. Then the `last` checkpoint of the
    run's own `ModelCheckpoint` is written and the process ends with code 143, after Ctrl-C 130, after SIGHUP 129. A
    validation is broken off, and run once more in full by who resumes. Before training, and outside of `fit`, a signal
    ends the run at once. When the last batch is done, the run is completed first. A second Ctrl-C ends it at once,
    without saving.

    An exception that leaves weights as the last batch left them ends a run on one process with a checkpoint, too.

    Args:
        every_minutes: also write `last` so often; None for as the `ModelCheckpoint` does alone.
    """

    def __init__(self, every_minutes: float | None = 15.0) -> None:
        check_arguments(Stopping, locals(), {"every_minutes": POSITIVE})
        self.every_minutes = every_minutes
        self._watch = SignalWatch()
        self._is_ours = False
        self._asked: str | None = None
        self._is_over = False
        self._validation_batches = 0.0
        self._saved_at = 0.0
        self._after_batch: Any = None
        self._saved: Any = None

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the place of Lightning's signal handlers, and be called after what saves checkpoints."""
        trainer.callbacks = [*(other for other in trainer.callbacks if other is not self), self]
        leave_signals_alone(trainer)
        self._asked, self._is_over, self._after_batch = None, False, None
        watch = SignalWatch.active()
        self._is_ours = watch is None
        self._watch = SignalWatch().__enter__() if watch is None else watch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for room for the checkpoints, and at where the run goes on.

        Raises:
            UserError: there is none, or the checkpoint was written in the middle of a step.
        """
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).name.startswith("hpc_ckpt_"):
            raise UserError(
                f"'{trainer.ckpt_path}' was written by Lightning's handler of SLURM's signal, in the middle of a step, "
                "and a run cannot go on exactly from there; move it away and resume with --ckpt_path auto"
            )
        callback = self._checkpoints(trainer)
        if callback is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(callback.dirpath or trainer.default_root_dir)
        size = checkpoint_size(pl_module)
        there, free = trainer.strategy.broadcast((len([*folder.glob("*.ckpt")]), free_space(folder)))
        check_space(folder, size, max(_kept(trainer, callback) + 1 - there, 1), free)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on a signal waits for the end of a batch."""
        callback = self._checkpoints(trainer)
        if callback is not None and trainer.ckpt_path is not None and not callback.last_model_path:
            # The checkpoint that the run goes on from was written before its `last`, which is to be replaced.
            path = last_path(callback)
            callback.last_model_path = path if callback.file_exists(path, trainer) else ""
        self._saved_at = time.monotonic()
        self._after_batch, self._saved = _learnt(trainer, pl_module), _progress(trainer, pl_module)
        self._note(trainer, "finishing the batch, then saving; Ctrl-C once more ends the run at once")
        self._watch.deferred = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other processes on whether to stop here, and save if so, or if it is time."""
        self._after_batch = _learnt(trainer, pl_module)
        asked, is_time = self._agree(trainer, pl_module)
        self._is_over = _is_last_of_run(trainer, batch_idx)
        if self._is_over:
            self._note(trainer, _COMPLETING)
        else:
            self._asked = asked
        if asked or is_time:
            self._save(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, now that all of the last batch is logged."""
        self._leave(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop between two epochs, with what the end of the first one has changed."""
        if self._asked:
            self._save(trainer, pl_module)
        self._leave(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before a validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._leave(trainer)
        # Processes may have different numbers of batches, and agree as long as all have one.
        batches = torch.tensor(float(sum(trainer.num_val_batches)), device=pl_module.device)
        self._validation_batches = -float(trainer.strategy.reduce(-batches, reduce_op="max"))

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Break off a validation during training, which will be run once more."""
        in_training = self._watch.deferred and trainer.state.fn == "fit"
        if not in_training or self._is_over or batch_idx + 1 >= self._validation_batches:
            return
        self._asked, _ = self._agree(trainer, pl_module)
        if self._asked:
            for callback in trainer.callbacks:
                if isinstance(callback, WeightAveraging):  # it validates other weights than it trains
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._save(trainer, pl_module)
        self._leave(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Count the minutes from here."""
        self._saved_at = time.monotonic()
        self._saved = _progress(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the run be completed."""
        self._note(trainer, _COMPLETING)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back all handlers; a signal that is still to be heeded, as the run is complete, goes to them."""
        self._put_back(trainer)
        if self._is_ours and self._watch.received is not None:
            signal.raise_signal(signal.Signals[self._watch.received])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say how to go on, and put back all handlers."""
        if isinstance(exception, Stopped):
            if not exception.agreed:  # the other processes do not know
                _pass_on(trainer)
            elif is_launched(trainer):
                exception.code = 0
            exception.explained = True
        if isinstance(exception, Stopped | KeyboardInterrupt):
            _explain(trainer, exception)
        elif isinstance(exception, Exception) and self._can_save(trainer, pl_module):
            try:
                self._save(trainer, pl_module)
            except Exception as e:  # the first one is what there is to say
                rank_zero_warn(f"the state after the last batch could not be saved: {type(e).__name__}: {e}")
        self._put_back(trainer)

    def _note(self, trainer: pl.Trainer, note: str) -> None:
        self._watch.note = note if trainer.is_global_zero else ""

    def _put_back(self, trainer: pl.Trainer) -> None:
        leave_signals_alone(trainer, False)
        if self._is_ours and SignalWatch.active() is self._watch:
            self._watch.__exit__(None, None, None)

    def _agree(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[str | None, bool]:
        """The signal that any process has received, and whether the first one finds that it is time to save."""
        minutes = (time.monotonic() - self._saved_at) / 60
        is_time = trainer.is_global_zero and self.every_minutes is not None and minutes >= self.every_minutes
        said = torch.tensor([*(float(self._watch.received == name) for name in EXIT_CODES), float(is_time)])
        if trainer.world_size > 1:
            said = sum_over_ranks(pl_module, said.to(pl_module.device))
        *signals, due = said.tolist()
        return next((name for name, count in zip(EXIT_CODES, signals, strict=True) if count), None), due > 0

    def _checkpoints(self, trainer: pl.Trainer) -> ModelCheckpoint | None:
        """Whose `last` is written: the first one that has one, or could have."""
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        return min(callbacks, key=lambda callback: (not callback.save_last, callback.save_weights_only), default=None)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callback = self._checkpoints(trainer)
        if callback is None or self._saved == _progress(trainer, pl_module):
            return
        save_last(callback, trainer)

    def _can_save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether all that a checkpoint holds is as the last batch left it."""
        return (
            trainer.state.fn == "fit"
            and self._watch.deferred
            and is_single_device(trainer)
            and not pl_module.automatic_optimization
            and self._after_batch == _learnt(trainer, pl_module)
        )

    def _leave(self, trainer: pl.Trainer) -> None:
        if self._asked is None:
            return
        if self._asked == "SIGUSR1" and trainer.is_global_zero:
            _requeue()
        stopped = Stopped(self._asked)
        stopped.agreed = True
        raise stopped


def _kept(trainer: pl.Trainer, last: ModelCheckpoint) -> int:
    """How many checkpoints lie there at a time."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return sum(abs(callback.save_top_k) + (bool(callback.save_last) or callback is last) for callback in callbacks)


def _is_last_of_run(trainer: Any, batch_idx: int) -> bool:
    """Whether nothing but validation and export is to come after a batch."""
    is_last = ends_epoch(trainer, batch_idx) and 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch + 1
    return is_last or 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop


def _learnt(trainer: pl.Trainer, pl_module: Any) -> tuple[int, Any]:
    """What tells whether a batch has changed anything yet: optimizer steps, and what a stage keeps beside weights."""
    kept = pl_module.step_state() if hasattr(pl_module, "step_state") else 0
    return optimizer_steps_begun(trainer), copy.deepcopy(kept)


def _progress(trainer: Any, pl_module: pl.LightningModule) -> tuple[Any, ...]:
    """What tells one state of a run from another."""
    return (*_learnt(trainer, pl_module), getattr(trainer.datamodule, "place", None))


def is_launched(trainer: pl.Trainer) -> bool:
    """Whether another process of this run has started this one, and takes any exit code but 0 for a crash.

    Args:
        trainer: whose strategy is set up.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and not trainer.is_global_zero


def _pass_on(trainer: pl.Trainer) -> None:
    """Stop the processes that this one has started."""
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        process.send_signal(signal.SIGTERM)


def _explain(trainer: pl.Trainer, exception: BaseException) -> None:
    """Say that the run was stopped, and how to go on."""
    if not trainer.is_global_zero or trainer.state.fn is None:
        return
    name = exception.name if isinstance(exception, Stopped) else "SIGINT, at once"
    said = f"stopped by {name}"
    if trainer.state.fn == "fit":
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        paths = {path for callback in callbacks if callback.dirpath for path in Path(callback.dirpath).glob("*.ckpt")}
        said += f" after {trainer.global_step} optimizer steps; "
        if paths:
            newest = max(paths, key=lambda path: path.stat().st_mtime)
            said += f"go on from '{newest}' by adding --ckpt_path auto to the same command"
        else:
            said += "no checkpoint was saved, so start it again"
    print(f"\n{said}", file=sys.stderr)


def _requeue() -> None:
    """Ask SLURM to run this job once more."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        reason = (getattr(e, "stderr", "") or str(e)).strip()
        rank_zero_warn(f"SLURM has not taken job {job} into its queue again: {reason}; submit it once more")
