"""A shuffle that can be taken up in the middle of an epoch.

Lightning restores its own counters in a resumed run, but not the place of a data loader: it expects the first batches
of the loader to be gone already while `len(loader)` still speaks of the whole epoch. `ResumableSampler` does just that.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ResumableSampler(DistributedSampler[Any]):
    """Every epoch a new order, fixed by seed and epoch; `resume` makes one epoch start past its first batches.

    Being a `DistributedSampler`, Lightning leaves it in place on any number of processes and tells it the epoch.

    Args:
        dataset: what is drawn from; only its length counts.
        num_replicas: number of processes.
        rank: this process.
        seed: of the shuffle.
        drop_last: leave out examples that do not divide among the processes, instead of repeating some.
    """

    def __init__(
        self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)
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

    def __iter__(self) -> Iterator[int]:
        """Numbers of the examples left in this epoch, for this process."""
        start = self._consumed if self.epoch == self._resumed_epoch else 0
        return islice(super().__iter__(), start, None)


class LateLoader(DataLoader[Any]):
    """A `DataLoader` that asks its sampler for nothing before its first batch is asked for.

    Lightning makes the iterator of a fit before it has told the sampler the epoch, and in some strategies before it has
    read the checkpoint. With workers an ordinary loader has by then drawn its first batches, from the wrong epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module keeps the place. That the method is there tells Lightning this loader resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore; see `state_dict`.

        Args:
            state_dict: empty.
        """
