"""What algorithms that learn from pairs share: reward modelling and DPO.

Notation: B pairs, T padded length. Both sides of a pair go through the model together, and what both begin with, the
prompt and often more, is run only once where the model can.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.batches import PreferenceBatch, micro_batches
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.prefix import SharedRows, share_rows, shared_lengths, sharing_pays
from rlhf_lightning.models.dtypes import keep_dtype


class Pairs(NamedTuple):
    """Pairs, laid out before the first forward pass, so that none waits for lengths from the device.

    Attributes:
        batch: the pairs.
        rows: the same as rows that share their beginning; None to run both sides apart.
    """

    batch: PreferenceBatch
    rows: SharedRows | None = None

    def hidden_states(self, model: PreTrainedModel) -> Tensor:
        """Last hidden states of chosen and rejected sequences, `[B, 2, T, D]`, in one forward pass.

        Args:
            model: a language model or a scalar model.
        """
        if self.rows is not None:
            return self.rows.spread(self.rows.hidden_states(model))
        ids, mask = both_sides(self.batch)
        return hidden_states(model, ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])

    @property
    def shown(self) -> Tensor:
        """Mask of what the model is really shown, any shape, bool."""
        return both_sides(self.batch)[1] if self.rows is None else self.rows.mask


def pair_weights(batch: PreferenceBatch) -> Tensor:
    """How much each pair counts, `[B]`, float32."""
    if batch.weights is None:
        return torch.ones(len(batch.row_ids), dtype=torch.float32, device=batch.row_ids.device)
    return batch.weights.float()  # the Trainer gives batches the type of the weights


def both_sides(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask of chosen and rejected sequences, each `[B, 2, T]`."""
    ids = torch.stack([batch.chosen_ids, batch.rejected_ids], dim=1)
    return ids, torch.stack([batch.chosen_mask, batch.rejected_mask], dim=1)


def whole_batch(batch: PreferenceBatch, model: PreTrainedModel, prefix_sharing: bool) -> Pairs:
    """A batch as one piece; all processes call it equally often.

    Args:
        batch: pairs.
        model: will run them.
        prefix_sharing: run what both sides begin with only once, where that pays.
    """
    shares = prefix_sharing and sharing_pays(model, *both_sides(batch))
    return Pairs(batch, share_rows(*both_sides(batch)) if shares else None)


def pair_pieces(stage: Stage, batch: PreferenceBatch, prefix_sharing: bool) -> list[Pairs]:
    """A batch cut into micro-batches, as many as on every other process.

    Args:
        stage: its limits count.
        batch: pairs.
        prefix_sharing: as in `whole_batch`.
    """
    shares = prefix_sharing and sharing_pays(stage.export_model, *both_sides(batch))
    lengths = shared_lengths(*both_sides(batch)) if shares else None
    size, max_tokens = stage.micro_batch_size, stage.max_tokens_per_batch
    pieces = stage.cut(lambda least: micro_batches(batch, size, max_tokens, least, lengths))
    return [Pairs(piece, share_rows(*both_sides(piece)) if shares else None) for piece in pieces]


def total_weight(weights: Tensor) -> Tensor:
    """What weighted sums of a step are divided by; only pairs of weight 0 sum to 0.

    Args:
        weights: summed over all micro-batches and ranks, a scalar.
    """
    return weights.clamp(min=torch.finfo(torch.float32).tiny)


def weighted_sums(values: dict[str, Tensor], batch: PreferenceBatch) -> dict[str, Tensor]:
    """Sums over pairs, each as often as it counts.

    Args:
        values: name to one number for each pair, `[B]`.
        batch: the pairs.
    """
    weights = pair_weights(batch)
    return {name: (value * weights).sum() for name, value in values.items()}


def mean_metrics(*names: str) -> nn.ModuleDict:
    """One mean over a validation or test set for each name; sums stay float32."""
    return nn.ModuleDict({name: keep_dtype(MeanMetric()) for name in names})
