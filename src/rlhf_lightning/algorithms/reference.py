"""What a frozen reference says of every pair, computed once before training: no second model in memory, no second pass.

A pair is known by its tokens, so that neither the order of the data nor the process that reads it matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.pairs import Pairs, both_sides, response_logprobs
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.compat import load_validation_data
from rlhf_lightning.errors import UserError
from rlhf_lightning.training import world_size

_BYTES = 15
"""Of a pair's hash: two numbers of 60 bits, which no two pairs of a data set are likely to share."""


class Reference(nn.Module):
    """Log-probabilities of chosen and rejected responses under a frozen model, or as that has said before.

    Args:
        model: frozen; None for a reference to which everything is equally likely.
    """

    def __init__(self, model: PreTrainedModel | None) -> None:
        super().__init__()
        self.model = model
        self._known: dict[tuple[int, int], tuple[float, float]] = {}

    @torch.no_grad()
    def forward(self, pairs: Pairs) -> Tensor:
        """In nats, `[B, 2]`, 0 without a model.

        Args:
            pairs: B of them, all of which were there when the reference was computed, if it was computed before.
        """
        if self._known:
            return self._looked_up(pairs.batch)
        if self.model is None:
            return torch.zeros(len(pairs.batch.row_ids), 2, device=pairs.batch.row_ids.device)
        return response_logprobs(self.model, pairs)[0]

    @torch.no_grad()
    def precompute(self, stage: Stage) -> None:
        """Read all pairs that are trained on and validated with, then let the model go; every process must call it.

        Args:
            stage: inside its `on_fit_start`.

        Raises:
            UserError: the data come as a stream.
        """
        trainer: Any = stage.trainer
        if self.model is not None and not self._known:
            if trainer.val_dataloaders is None and trainer.enable_validation:
                load_validation_data(trainer)
            held_out = trainer.val_dataloaders or []
            with trainer.precision_plugin.forward_context():
                said = [
                    self._measured(stage, loader)
                    for loader in [trainer.train_dataloader, *(held_out if isinstance(held_out, list) else [held_out])]
                ]
            self._known = {key: pair for part in said for key, pair in part.items()}
        self.model = None

    def _measured(self, stage: Stage, loader: Any) -> dict[Any, Any]:
        """What the model says of all pairs of a loader's data, each process measuring its share."""
        rows: list[tuple[tuple[int, int], list[float]]] = []
        for batch in _every_batch(stage, loader):
            rows += zip(_keys(batch), self(Pairs(batch)).double().tolist(), strict=True)
        # Keys are whole numbers of 60 bits, which no float holds: they and the values travel apart.
        keys = torch.tensor([key for key, _ in rows], dtype=torch.int64, device=stage.device)
        values = torch.tensor([pair for _, pair in rows], dtype=torch.float64, device=stage.device)
        if world_size(stage) > 1:
            keys, values = (stage.all_gather(each).flatten(0, 1) for each in (keys, values))  # type: ignore[union-attr]
        return dict(zip(map(tuple, keys.tolist()), map(tuple, values.tolist()), strict=True))

    def _looked_up(self, batch: PreferenceBatch) -> Tensor:
        try:
            rows = [self._known[key] for key in _keys(batch)]
        except KeyError as e:
            raise UserError(
                "a pair was not there when the reference was computed: resume with the data that the run began with, "
                "or set precompute_reference to false"
            ) from e
        return torch.tensor(rows, dtype=torch.float32, device=batch.chosen_ids.device)

    def known(self) -> dict[str, Any]:
        """What was computed before training, as plain lists for a checkpoint."""
        return {"keys": [*map(list, self._known)], "values": [*map(list, self._known.values())]}

    def load_known(self, known: dict[str, Any]) -> None:
        """Take over what `known` gave.

        Args:
            known: as it was in the checkpoint.
        """
        self._known = dict(zip(map(tuple, known["keys"]), map(tuple, known["values"]), strict=True))


def _every_batch(stage: Stage, loader: Any) -> Iterator[PreferenceBatch]:
    """All data of a loader in their own order, on the device; every process has as many batches as the others."""
    if isinstance(loader.dataset, IterableDataset):
        raise UserError("precompute_reference needs data that do not come as a stream: set streaming to false")
    count, world = len(loader.dataset), world_size(stage)
    rows = [row % count for row in range(stage.global_rank, -(-count // world) * world, world)]
    size = loader.batch_size or (None if loader.batch_sampler is None else loader.batch_sampler.batch_size)
    batches = DataLoader(loader.dataset, batch_size=size, sampler=rows, collate_fn=loader.collate_fn)
    rank_zero_info(f"the reference reads {count:,} pairs, once")
    for batch in batches:
        yield stage.trainer.strategy.batch_to_device(batch)


def _keys(batch: PreferenceBatch) -> list[tuple[int, int]]:
    ids, mask = (each.cpu() for each in both_sides(batch))
    keys = []
    for pair, kept in zip(ids, mask, strict=True):
        chosen, rejected = (side[real].numpy().tobytes() for side, real in zip(pair, kept, strict=True))
        digest = hashlib.blake2b(len(chosen).to_bytes(8, "big") + chosen + rejected, digest_size=_BYTES).digest()
        number = int.from_bytes(digest, "big")
        keys.append((number >> 60, number & ((1 << 60) - 1)))
    return keys
