"""Random numbers that depend on where a run is, not on what ran before.

Every step draws from streams seeded by the run's seed, the step's number and, for answers, the row of the prompt. So a
resumed run draws what the uninterrupted one would have drawn, a prompt gets the same answer on whatever process it is,
and a callback that samples texts in between changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed from several numbers or words; different inputs give unrelated streams.

    Example:
        >>> derive_seed(1, "rollout", 2) == derive_seed(1, "rollout", 2), derive_seed(1, 2) == derive_seed(2, 1)
        (True, False)
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on a device, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def occurrences(rows: Sequence[int]) -> list[int]:
    """How often each row has stood before in a sequence.

    Example:
        >>> occurrences([7, 7, 3, 7])
        [0, 1, 0, 2]
    """
    seen: Counter[int] = Counter()
    counted = []
    for row in rows:
        counted.append(seen[row])
        seen[row] += 1
    return counted


@contextmanager
def forked_rng(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Seed torch's global generators for the length of a `with` block, then put them back as they were.

    For code that takes no generator, such as dropout.

    Args:
        device: the device that is used besides the CPU.
        *parts: what the seed is derived from.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(derive_seed(*parts))
        yield
