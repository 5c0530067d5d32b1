"""Each process's share of the examples, as many as every other process has, and none counted twice.

All processes must run as many batches of as many rows, since each waits for the others in every pass. Where the
examples do not divide, Lightning repeats some, and a mean over them is no longer that of the data. Here a process that
is short of a row gets a blank one: an example like any other, whose row id is -1, and which is taught, weighed,
measured and written nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


def blank(example: Any) -> Any:
    """An example that counts for nothing.

    Args:
        example: a named tuple with a `row_id`, or a list of such that share a row.
    """
    return [blank(one) for one in example] if isinstance(example, list) else example._replace(row_id=-1)


class WithBlanks(Sequence[Any]):
    """Examples, and behind each number's complement, `~i`, example i as a blank.

    Args:
        examples: N of them.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        """N, the blanks not among them."""
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        """One example, or a blank."""
        return self._examples[index] if index >= 0 else blank(self._examples[~index])


class EvaluationSampler(DistributedSampler[int]):
    """Every example once, in order, dealt out to the processes; blanks where they do not divide.

    Being a `DistributedSampler`, Lightning leaves it in place.

    Args:
        examples: N of them; only their number counts.
        processes: how many there are.
        rank: this process.
    """

    def __init__(self, examples: Sized, processes: int, rank: int) -> None:
        super().__init__(examples, processes, rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        """Numbers of this process's examples, as `WithBlanks` takes them."""
        count = len(self.dataset)  # type: ignore[arg-type]
        return iter([i if i < count else ~(i % count) for i in range(self.rank, self.total_size, self.num_replicas)])


def pins_memory(trainer: Any) -> bool:
    """Whether batches go to a GPU, which copies from pinned memory without making the host wait.

    Args:
        trainer: Lightning's; None where there is none.
    """
    return trainer is not None and bool(trainer.strategy.root_device.type == "cuda")


def evaluation_loader(examples: Sequence[Any], processes: int, rank: int, **options: Any) -> DataLoader[Any]:
    """This process's batches of every example once, in order; as many as every other process has.

    Args:
        examples: N of them.
        processes: how many there are.
        rank: this process.
        options: those of `DataLoader`.
    """
    return DataLoader(WithBlanks(examples), sampler=EvaluationSampler(examples, processes, rank), **options)  # type: ignore[arg-type]
