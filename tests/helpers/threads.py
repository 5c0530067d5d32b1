"""Two threads in the place of two processes, where only what they sum over matters."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.functional.masked import Reduce


def in_two_threads(work: Callable[[Any, Reduce], Any], shares: Sequence[Any]) -> list[Any]:
    """What `work(share, reduce)` returns in each of two threads, whose `reduce` sums over both."""
    barrier, given = threading.Barrier(2, timeout=60), [torch.zeros(()), torch.zeros(())]

    def run(rank: int) -> Any:
        def reduce(ours: Tensor) -> Tensor:
            given[rank] = ours
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        return work(shares[rank], reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))
