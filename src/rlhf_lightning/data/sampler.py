"""A shuffle that can be taken up in the middle of an epoch.

Lightning restores its own counters in a resumed run, but not the place of a data loader: it expects the first batches
of the loader to be gone already while `len(loader)` still speaks of the whole epoch. `ResumableSampler` does just that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from rlhf_lightning.errors import UserError


class ResumableSampler(DistributedSampler[Any]):
    """Every epoch a new order, fixed by seed and epoch; `resume` makes one epoch start past its first batches.

    Being a `DistributedSampler`, Lightning leaves it in place on any number of processes and tells it the epoch.

    Args:
        dataset: what is drawn from; only its length counts.
        num_replicas: number of processes.
        rank: this process.
        seed: of the shuffle.
        drop_last: leave out examples that do not divide among the processes. Otherwise blanks make up for them: `~i`
            for a blank in the shape of example i, see `WithBlanks`.
        lengths: tokens of each example, `[N]`; asked for by `length_grouped`.
        length_grouped: put examples of similar length into one batch (of all processes together), the batch with the
            longest first. What does not fill a batch is drawn from all lengths and comes last.
        batch_size: examples in a batch of all processes together; asked for by `length_grouped`.
        groups: number of the group each example belongs to, `[N]`, from 0; asked for by `weights`.
        weights: how often an epoch sees each example of each group: 1 once, 0.5 a fresh random half every epoch, 2.5
            twice and half of them once more. Every epoch has the same length.

    Raises:
        UserError: the weights leave no example.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
        *,
        lengths: Sequence[int] | np.ndarray | None = None,
        length_grouped: bool = False,
        batch_size: int | None = None,
        groups: Sequence[int] | np.ndarray | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        if length_grouped and (lengths is None or batch_size is None):
            raise ValueError("length_grouped asks for lengths and batch_size")
        if weights is not None and groups is None:
            raise ValueError("weights ask for groups")
        self._lengths = np.asarray(lengths, dtype=np.int64) if length_grouped else None
        self._batch_size, self._num_examples = batch_size, len(dataset)
        self._weights = None if weights is None else list(weights)
        # Rows of each weighted group, and how many of them an epoch draws.
        members = [np.arange(len(dataset))] if weights is None else _members(np.asarray(groups), len(weights))
        self._drawn = [
            (rows, round(weight * len(rows))) for rows, weight in zip(members, self._weights or [1.0], strict=True)
        ]
        epoch_length = sum(count for _, count in self._drawn)
        if weights is not None and epoch_length == 0:
            raise UserError(f"the weights {self._weights} leave no example to train on; raise them")
        drawn_from: Any = range(epoch_length)  # the parent takes the length of an epoch from it
        super().__init__(drawn_from, num_replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)
        self._resumed_epoch = -1
        self._consumed = 0

    def resume(self, epoch: int, consumed: int) -> None:
        """Take up an epoch where it was left.

        Args:
            epoch: number of the epoch, from 0.
            consumed: examples of it that this process has seen.
        """
        self.set_epoch(epoch)
        self._resumed_epoch, self._consumed = epoch, consumed

    def order(self) -> dict[str, Any]:
        """Settings that, with the epoch, fix the order over the same examples; plain values, for a checkpoint."""
        grouped = {} if self._lengths is None else {"length-grouped batches of": self._batch_size}
        weighted = {} if self._weights is None else {"weights": self._weights}
        return {"seed": self.seed, "examples": self._num_examples} | grouped | weighted

    def __iter__(self) -> Iterator[int]:
        """Numbers of the examples left in this epoch, for this process."""
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = np.concatenate([_draw(rows, count, random) for rows, count in self._drawn])
        drawn = drawn[torch.randperm(len(drawn), generator=random).numpy()]
        if self._lengths is not None and self._batch_size is not None:
            drawn = group_by_length(drawn, self._lengths, self._batch_size, random)
        # Leave out the last or add blanks, so that all processes get equally many.
        missing = max(0, self.total_size - len(drawn))
        order = np.concatenate([drawn[: self.total_size], ~drawn[np.arange(missing) % len(drawn)]])
        start = self._consumed if self.epoch == self._resumed_epoch else 0
        return iter(order[self.rank :: self.num_replicas][start:].tolist())


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int, random: torch.Generator) -> np.ndarray:
    """Rearrange shuffled examples so that each batch holds examples of similar length, longest first.

    Only stretches of at most 50 batches, and at most a quarter of all, are sorted, so that batches differ from epoch to
    epoch. The batches come in random order, except that the one with the longest example leads: a run that does not fit
    in memory fails at once. Examples that do not fill a batch stay at the end, whatever their length.

    Args:
        order: numbers of examples in random order, `[N]`.
        lengths: tokens of every example, by number.
        batch_size: examples in a batch.
        random: shuffles the batches.

    Returns:
        The same numbers, `[N]`.
    """
    num_batches = len(order) // batch_size
    if num_batches == 0:
        return order
    whole, rest = order[: num_batches * batch_size], order[num_batches * batch_size :]
    stretch = max(1, min(50, num_batches // 4)) * batch_size
    pieces = [whole[start : start + stretch] for start in range(0, len(whole), stretch)]
    sorted_pieces = [piece[np.argsort(-lengths[piece], kind="stable")] for piece in pieces]
    batches = np.concatenate(sorted_pieces).reshape(num_batches, batch_size)
    batches = batches[torch.randperm(num_batches, generator=random).numpy()]
    longest = lengths[batches].max(axis=1).argmax()
    batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.reshape(-1), rest])


def _members(groups: np.ndarray, num_groups: int) -> list[np.ndarray]:
    return [np.flatnonzero(groups == group) for group in range(num_groups)]


def _draw(rows: np.ndarray, count: int, random: torch.Generator) -> np.ndarray:
    """`count` of the rows: all of them as often as they go in, and a random part of them once more."""
    if count == len(rows):
        return rows
    copies, more = divmod(count, len(rows))
    return np.concatenate([np.tile(rows, copies), rows[torch.randperm(len(rows), generator=random).numpy()[:more]]])


class LateLoader(DataLoader[Any]):
    """A `DataLoader` that asks its sampler for nothing before its first batch is asked for.

    Lightning makes the iterator of a fit before it has told the sampler the epoch, and in some strategies before it has
    read the checkpoint. With workers an ordinary loader has by then drawn its first batches, from the wrong epoch.

    Args:
        dataset: the examples.
        before: called when the first batch is asked for.
        options: those of `DataLoader`.
    """

    def __init__(self, dataset: Any, before: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.before = before  # as Lightning finds it where it makes a loader anew

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches."""
        self.before()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module keeps the place. That the method is there tells Lightning this loader resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; see `state_dict`."""
