"""Text that a policy goes on learning beside PPO, so that it does not forget it (PPO-ptx, Ouyang et al. 2022).

The data are a data module of their own, which no Trainer drives: their place is kept here, and in the module's state.

Notation: B batch, T padded length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.online.experience import Experience
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.batches import InstructionBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.output_layer import cross_entropy_at
from rlhf_lightning.host import alike
from rlhf_lightning.models.tokenizer import check_same_words


class PretrainingData:
    """Batches without end, epoch after epoch, from where a checkpoint has left them.

    Args:
        data: an `InstructionDataModule`, whose `batch_size` counts examples of an optimizer step on all processes.

    Attributes:
        place: epoch of the next batch, from 0, and its number in it.
    """

    def __init__(self, data: pl.LightningDataModule) -> None:
        self.data: Any = data
        self.place = (0, 0)
        self._order: dict[str, Any] | None = None
        self._batches: Iterator[InstructionBatch] | None = None

    def begin(self, module: pl.LightningModule) -> None:
        """Prepare the data, and stand at the place.

        Args:
            module: with its tokenizer, attached to a running trainer.

        Raises:
            UserError: they are no such data, of other tokens, or others than those of the checkpoint.
        """
        if getattr(self.data, "packing", False):  # which not every model keeps apart, as SFT would find out
            raise UserError(
                "pretraining takes no packed rows: set packing to false, micro-batches fill up by themselves"
            )
        self.data.prepare_data()
        self.data.setup("fit")
        theirs = getattr(self.data, "tokenizer", None)
        if theirs is not None:
            check_same_words(module.tokenizer, theirs)  # type: ignore[arg-type]
        loader = self.data.train_dataloader()
        sampler: Any = getattr(loader, "sampler", None)
        if not hasattr(sampler, "resume") or not len(loader):
            raise UserError(
                "pretraining takes an InstructionDataModule that holds a batch at least and is not streamed, as its "
                "place is kept in checkpoints"
            )
        order = {**sampler.order(), "batch_size": self.data.batch_size}
        if self._order is not None and self.place[1] and self._order != order:
            changed = next(name for name in {**order, **self._order} if order.get(name) != self._order.get(name))
            raise UserError(
                f"pretraining: {changed} was {self._order.get(changed)} in the checkpoint, which stands within an "
                f"epoch, and is {order.get(changed)}; resume with the same data"
            )
        self._order = order
        sampler.resume(self.place[0], self.place[1] * (loader.batch_size or 1))
        self._batches = self._endless(loader, sampler)

    def _endless(self, loader: Any, sampler: Any) -> Iterator[InstructionBatch]:
        while True:
            epoch, number = self.place
            for batch in loader:
                number += 1
                self.place = (epoch, number) if number < len(loader) else (epoch + 1, 0)
                yield batch
            self.place = (epoch + 1, 0)
            sampler.set_epoch(epoch + 1)

    def next(self) -> InstructionBatch:
        """The next batch, this process's share, on the CPU."""
        assert self._batches is not None, "call begin() first"
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """Where the next batch stands, and what fixes the order."""
        return {"place": list(self.place), "order": self._order}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a place that `state` gave; before `begin`."""
        self.place, self._order = (state["place"][0], state["place"][1]), state["order"]


class BesideText(NamedTuple):
    """A micro-batch of responses and micro-batches of text that are learned beside it.

    In one piece, for DeepSpeed, and DDP in the last one, count on every backward pass to reach every weight, the value
    model's too, which text alone would not.

    Attributes:
        experience: responses.
        texts: none, one or several.
    """

    experience: Experience
    texts: list[InstructionBatch]


def pretraining_loss(policy: PreTrainedModel, batch: InstructionBatch, scale: Tensor, coef: float) -> Loss:
    """The negative log-likelihood of a batch's targets, by its weight.

    Args:
        policy: the policy.
        batch: a micro-batch.
        scale: response tokens of the optimizer step by target tokens of its pretraining data, on all processes, a
            scalar: what the loss is divided by afterwards is the former.
        coef: weight of the mean over target tokens.

    Returns:
        A scalar, and `ptx_loss`, the same without its weight, to be logged.
    """
    hidden = hidden_states(policy, batch.input_ids, batch.attention_mask, batch.position_ids)  # [B, T, D]
    mask = alike(lambda mask: mask[:, 1:], batch.loss_mask)  # [B, T - 1], token t is predicted from t - 1
    loss, nll = cross_entropy_at(policy, hidden[:, :-1], batch.input_ids[:, 1:], mask)
    return coef * scale * loss, {"ptx_loss": scale * nll}
