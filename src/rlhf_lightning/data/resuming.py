"""The place in the training data that a checkpoint remembers, so that a resumed run sees the batches it would have."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from rlhf_lightning.data.sampler import ResumableSampler
from rlhf_lightning.data.streaming import StreamedExamples
from rlhf_lightning.errors import UserError


class ResumableDataModule(pl.LightningDataModule):
    """A data module whose training order is fixed by a sampler, or by what streams the examples.

    Attributes:
        batch_size: examples in a training batch of one process.
        packing: whether examples share rows.
    """

    batch_size: int
    packing = False

    def __init__(self) -> None:
        super().__init__()
        self._sampler: ResumableSampler | StreamedExamples | None = None
        self._resumed_batches: int | None = None
        self._miscounted = (-1, 0)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compare Lightning's count with the checkpoint at the first batch of a resumed run.

        Resumed from a checkpoint taken after the last batch of a stream, Lightning counts on from there in the next
        epoch, because it does not know the length of the one before.

        Args:
            batch: passed on.
            dataloader_idx: not used.
        """
        if self._resumed_batches is not None and self.trainer is not None and self.trainer.training:
            assert self._sampler is not None
            counted = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self._miscounted = (self._sampler.epoch, counted - self._resumed_batches)
            self._resumed_batches = None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data: the epoch, and how many batches of it are used up."""
        if self._sampler is None or self.trainer is None:
            return {}
        # Lightning's own count, so that a resumed run can never disagree with it about the batch to go on with. A batch
        # in whose middle an exception strikes is not processed, and is run again.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        epoch, batches = self._sampler.epoch, progress.current.processed
        # How many batches a stream has is known only when its last one is at hand.
        ended = progress.is_last_batch and batches == progress.current.ready
        if epoch == self._miscounted[0]:
            batches -= self._miscounted[1]
        if ended or batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place that `state_dict` gave.

        Args:
            state_dict: from a checkpoint.

        Raises:
            UserError: the checkpoint stands in the middle of an epoch over other data, or in other batches.
        """
        if self._sampler is None:
            return
        if state_dict["batches"] > 0:
            self._check_order(state_dict["order"])
        self._resumed_batches = state_dict["batches"]
        self._sampler.resume(state_dict["epoch"], state_dict["batches"] * self.batch_size)

    def _order(self) -> dict[str, Any]:
        """Everything that, with the epoch, fixes which example is in which batch."""
        assert self._sampler is not None
        names = {"examples": "packed rows" if self.packing else "training examples"}
        order = {names.get(name, name): value for name, value in self._sampler.order().items()}
        return {"batch_size": self.batch_size, **order}

    def _check_order(self, saved: dict[str, Any]) -> None:
        now = self._order()
        for name in {**now, **saved}:
            if saved.get(name) != now.get(name):
                raise UserError(
                    f"the checkpoint was saved in the middle of an epoch with {name} {saved.get(name)}, now it is "
                    f"{now.get(name)}; resume with the same, or from a checkpoint of an epoch's end"
                )
