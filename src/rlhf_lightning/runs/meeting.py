"""Where the processes of one start meet: a part of the store that their process group is made in."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning_fabric.plugins.environments import ClusterEnvironment
from torch.distributed import PrefixStore, TCPStore

from rlhf_lightning.errors import RankError

POLL = 0.05
"""Seconds between two questions of who waits."""


def open_store(environment: ClusterEnvironment, rank: int, size: int, seconds: float) -> TCPStore:
    """The store that a process group of these processes meets in.

    Args:
        environment: which says where it is.
        rank: of this process; the first one makes it, unless torchrun's agent has.
        size: of the run.
        seconds: to wait for it.
    """
    is_of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        environment.main_address,
        environment.main_port,
        size,
        is_master=rank == 0 and not is_of_agent,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,  # shared with the process group, when that is made
    )


def meet(store: Any, rank: int, seconds: float) -> PrefixStore:
    """The part of a store that only the processes of this start use.

    The store of torchrun's agent outlives the processes, so it holds what those before a restart have left. The first
    process names the part; for another one it is the right part when the first one answers in it.

    Args:
        store: of the run.
        rank: of this process.
        seconds: to wait for the first one.

    Raises:
        RankError: it did not come.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("rlhf_lightning", name)
        return PrefixStore(f"rlhf_lightning/{name}", store)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if store.check(["rlhf_lightning"]):
            part = PrefixStore(f"rlhf_lightning/{store.get('rlhf_lightning').decode()}", store)
            if _is_answered(part, rank):
                return part
        time.sleep(POLL)
    raise RankError(f"rank {rank}: the first process of the run did not come within {seconds:.0f} s", 1)


def _is_answered(part: PrefixStore, rank: int) -> bool:
    token = uuid.uuid4().hex
    part.set(f"ask/{rank}", token)
    return comes(lambda: part.check([f"answer/{token}"]), 2)


def answer(part: Any, rank: int) -> bool:
    """Let another process know that this is where they meet; False if it has not asked.

    Args:
        part: of this start, in the first process.
        rank: of the other one.
    """
    if not part.check([f"ask/{rank}"]):
        return False
    part.set(f"answer/{part.get(f'ask/{rank}').decode()}", "")
    return True


def comes(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for something; whether it has come.

    Args:
        condition: asked until it holds.
        seconds: to wait.
    """
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(POLL)
    return holds
