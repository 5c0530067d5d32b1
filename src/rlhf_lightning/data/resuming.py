"""The place in the training data that a checkpoint remembers, so that a resumed run sees the batches it would have.

Lightning has counters of its own for epochs and batches. What they say depends on the hook that a checkpoint was saved
in: after the end of training the epoch counts as finished, wherever it was stopped; after a resume at an epoch's last
batch one of them stays behind for good. So the data module keeps the place itself, and a resumed run's counters are
written anew from it. The place includes what follows on a batch: a run that was killed in a validation, or before the
hooks of an epoch's end, does them when it is resumed.
"""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch.distributed
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning import lightning_compat
from rlhf_lightning.arguments import per_process
from rlhf_lightning.data.sampler import ResumableSampler
from rlhf_lightning.data.streaming import StreamedExamples
from rlhf_lightning.errors import UserError


class ResumableDataModule(pl.LightningDataModule):
    """A data module whose training order is fixed by a sampler, or by what streams the examples.

    Attributes:
        batch_size: examples in a training batch, on all processes together.
        packing: whether examples share rows.
        whole_rankings: whether all pairs of a row are one example.
        place: the epoch of the running fit, from 0, and how many batches of it are used up.
        ended: all of them are, but the hooks of the epoch's end are yet to run.
        done: what has come after the last batch: nothing (`batch`), the validation, or the hooks of an epoch's end,
            which also run where training stops within one.
    """

    batch_size: int
    batch_size_name = "batch_size"
    packing = False
    whole_rankings = False
    ended: bool
    done: Literal["batch", "validation", "epoch"]

    def __init__(self) -> None:
        super().__init__()
        self._sampler: ResumableSampler | StreamedExamples | None = None
        self._begin()

    def _begin(self) -> None:
        self.place, self.ended, self.done = (0, 0), False, "epoch"

    def _keep_place(self) -> None:
        """Begin at the beginning, and let the trainer tell how far the run has come."""
        self._begin()
        trainer: Any = self.trainer
        if trainer is not None:
            others = [callback for callback in trainer.callbacks if not isinstance(callback, _PlaceKeeper)]
            trainer.callbacks = [_PlaceKeeper(self), *others]  # first: before what saves checkpoints

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def share(self) -> int:
        """Examples in a training batch of this process."""
        return per_process(self.batch_size_name, self.batch_size, self.rank_and_world[1])

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data: the epoch, and how many batches of it are used up."""
        if self._sampler is None or self.trainer is None:
            return {}
        epoch, batches = self.place
        return {"epoch": epoch, "batches": batches, "ended": self.ended, "done": self.done, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place that `state_dict` gave.

        Raises:
            UserError: the checkpoint stands in the middle of an epoch over other data, or in other batches.
        """
        if self._sampler is None:
            return
        epoch, batches = self.place = state_dict["epoch"], state_dict["batches"]
        # Version 0.1 did not say so, and took the validation for done.
        self.ended, self.done = state_dict.get("ended", False), state_dict.get("done", "validation")
        if batches > 0 and not self.ended:
            self._check_order(state_dict["order"])
        self._sampler.resume(*((epoch + 1, 0) if self.ended else (epoch, batches * self.share)))

    def _order(self) -> dict[str, Any]:
        """Everything that, with the epoch, fixes which example is in which batch."""
        assert self._sampler is not None
        names = {"examples": "packed rows" if self.packing else "training examples"}
        order = {names.get(name, name): value for name, value in self._sampler.order().items()}
        return {"batch_size": self.batch_size, **order}

    def _check_order(self, saved: dict[str, Any]) -> None:
        now, saved = self._order(), {**saved}
        if processes := saved.pop("processes", None):  # up to version 0.1 batches counted per process
            saved["batch_size"] *= processes
            if "length-grouped batches of" in saved and saved.get("examples", 0) % processes == 0:
                saved["length-grouped batches of"] *= processes
        for name in {**now, **saved}:
            if saved.get(name) != now.get(name):
                raise UserError(
                    f"the checkpoint was saved in the middle of an epoch with {name} {saved.get(name)}, now it is "
                    f"{now.get(name)}; resume with the same, or from a checkpoint of an epoch's end"
                )


def ends_epoch(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a training batch is the last one of its epoch; how many a stream has is known only then.

    Args:
        trainer: in `on_train_batch_end`.
        batch_idx: the number of the batch in its epoch, from 0.
    """
    return trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches


class _PlaceKeeper(pl.Callback):
    """Counts the batches of a fit for its data module, and makes Lightning count from there in a resumed one."""

    def __init__(self, data: ResumableDataModule) -> None:
        self._data = data
        self._resumed = False
        self._max_steps: int | None = None
        self._is_over = False
        self._is_stopped = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Replace Lightning's counters, which it reads from the checkpoint later."""
        if trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        name = type(self._data).__qualname__
        if name not in checkpoint:
            raise UserError(
                f"the checkpoint does not say which batches of {name} were used; resume with the data it was saved with"
            )
        self._resumed = True
        self._is_over = 0 < trainer.max_steps <= checkpoint["global_step"]
        # Of every batch comes one optimizer step for Lightning's loggers, unless it steps by itself.
        counters = checkpoint["loops"]["fit_loop"]
        batches = counters["epoch_loop.batch_progress"]["total"]["processed"]
        steps = checkpoint["global_step"] if pl_module.automatic_optimization else batches
        accumulates = self._data.place[1] % trainer.accumulate_grad_batches != 0
        _count_from(self._data, counters, batches, steps, accumulates, trainer.max_epochs)
        if trainer.strategy.restore_checkpoint_after_setup:  # after the hook below
            self._raise_limit(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the hooks run that come after the last step; Lightning would leave at once."""
        if self._resumed:
            self._raise_limit(trainer)

    def _raise_limit(self, trainer: pl.Trainer) -> None:
        if self._is_over:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = -1

    def _end(self, trainer: pl.Trainer) -> None:
        """Let the trainer see again what ends the run."""
        self._put_limit_back(trainer)
        if self._is_stopped:
            lightning_compat.put_advance_back(trainer)
            trainer.should_stop, self._is_stopped = True, False

    def _put_limit_back(self, trainer: pl.Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new epoch as such: with `max_steps` set, Lightning takes every resumed epoch for a started one."""
        if not self._resumed:
            return
        epoch, batches = self._data.place
        self._stop_again(trainer)
        if self._is_over and (batches == 0 or self._data.done == "epoch"):
            self._end(trainer)
            if batches > 0:
                lightning_compat.count_epoch(trainer)
        elif batches == 0:
            trainer.fit_loop.epoch_loop.restarting = False
        elif not self._data.ended and batches >= trainer.num_training_batches:
            raise UserError(
                f"the checkpoint stands after batch {batches} of epoch {epoch}, which now has only "
                f"{trainer.num_training_batches} batches; resume with the same trainer.limit_train_batches"
            )
        else:
            lightning_compat.go_on_after_batch(trainer, self._data.done == "batch", self._is_over)
            if self._is_stopped:
                lightning_compat.stop_with_validation(trainer)
                trainer.should_stop = False

    def _stop_again(self, trainer: pl.Trainer) -> None:
        """Let stand what a callback had decided, whose state has been loaded by now."""
        if (stopper := _stopper(trainer)) is None:
            return
        trainer.should_stop = True
        if lightning_compat.can_stop_early(trainer):
            rank_zero_info(f"{stopper} has ended this run before; without it among the callbacks, it trains on")
            self._is_over = self._is_stopped = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Be sure that Lightning and the data module mean the same batch."""
        if self._resumed and (counted := (trainer.current_epoch, batch_idx)) != self._data.place:
            raise UserError(
                f"the checkpoint goes on at (epoch, batch) {self._data.place}, but the trainer at {counted}: its state "
                "is not that of this data; resume with the data module and the trainer it was saved with"
            )
        self._resumed = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One more batch is used up. A batch in whose middle an exception strikes is not, and is run again."""
        self._data.place, self._data.done = (trainer.current_epoch, batch_idx + 1), "batch"
        self._data.ended = ends_epoch(trainer, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The validation need not run again."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._data.done = "validation"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the next epoch, unless training stops within this one."""
        self._end(trainer)
        trainer.fit_loop.epoch_loop.restarting = False  # it does not notice where no batch was left
        self._data.done = "epoch"
        if self._data.ended:
            self._data.place, self._data.ended = (self._data.place[0] + 1, 0), False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        self._put_limit_back(trainer)
        lightning_compat.put_advance_back(trainer)


def _stopper(trainer: Any) -> str | None:
    """Name of a callback that has ended the run, if any did, by its state."""
    for callback in trainer.callbacks:
        reason = getattr(callback, "stopping_reason", EarlyStoppingReason.NOT_STOPPED)
        if reason != EarlyStoppingReason.NOT_STOPPED or getattr(callback, "has_stopped", False):
            return type(callback).__name__
    return None


def _count_from(
    data: ResumableDataModule,
    counters: dict[str, Any],
    total: int,
    steps: int,
    accumulates: bool,
    max_epochs: int | None,
) -> None:
    """Write Lightning's counters of a fit as it saves them itself after a batch, or before an epoch.

    Args:
        data: knows the place.
        counters: of the fit loop, from a checkpoint; changed in place.
        total: batches of all epochs.
        steps: batches that ended in an optimizer step.
        accumulates: the last batch did not.
        max_epochs: where the run ends. At that place the last epoch counts as one whose last batch has just been made:
            then Lightning trains no more, but still runs the hooks of the end of training, which may not have run.
    """
    epoch, batches = data.place
    is_within = batches > 0
    over = not is_within and 0 < epoch == max_epochs
    started, finished = epoch + is_within, epoch - over
    # Within an epoch it is started, but not finished.
    epochs = {"ready": started, "started": started, "processed": finished, "completed": finished}
    seen = {
        "total": {"ready": total, "started": total, "processed": total, "completed": total - over},
        "current": dict.fromkeys(("ready", "started", "processed", "completed"), batches),
        "is_last_batch": data.ended or over,
    }
    begun, ended = (int(is_within and data.done == "batch"), 0)  # a validation that is to run
    validated = {"ready": begun, "started": begun, "processed": ended, "completed": ended}
    counters["epoch_progress"] = {"total": epochs, "current": {**epochs}}
    counters["epoch_loop.batch_progress"] = seen
    counters["epoch_loop.val_loop.batch_progress"] = {
        "total": validated,
        "current": {**validated},
        "is_last_batch": False,
    }
    counters["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - (is_within and not accumulates)
