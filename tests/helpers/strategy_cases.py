"""Runs of the tiny model that each strategy is asked for, and what must come of them beside one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.strategy_runs import fit

WHOLE, HALVES = {"micro_sizes": [4, 4, 4]}, {"micro_sizes": [2, 2, 2]}  # rows per micro-batch; a rank has four rows
UNEVEN = {"micro_sizes": [1, 3, 2]}  # 4, then 2 (of 3 and 1 rows), then 2 micro-batches
CLIPPED_ADAM = {"gradient_clip_val": 0.1, "adam": True}
UNCLIPPED_SGD: dict[str, Any] = {}
POISONS = ["loss", "gradient"]
RUNS: dict[str, dict[str, Any]] = {
    "two passes": {"passes": 2, **UNEVEN, **CLIPPED_ADAM},
    **{poison: {"poison": poison, **HALVES} for poison in POISONS},
    "bf16": {"trainer_options": {"precision": "bf16-mixed"}, **HALVES, **CLIPPED_ADAM},
    "validate": {"task": "validate", **HALVES},
    "forgetful": {"module_class": "ForgetfulModule", **HALVES},
}
"""Of any strategy, for two processes."""

Result = dict[str, Any]


def runs_of(name: str, *kinds: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Some of `RUNS`, or all, on a strategy."""
    return {(name, kind): {"name": name, **RUNS[kind]} for kind in kinds or RUNS}


def alone(folder: str) -> Callable[..., Result]:
    """`fit` in this process, each configuration once: the whole batch of eight rows in one micro-batch."""
    done: dict[str, Result] = {}

    def run(**kwargs: Any) -> Result:
        if str(kwargs) not in done:
            done[str(kwargs)] = fit(folder=folder, micro_sizes=[8, 8, 8], **kwargs)
        return done[str(kwargs)]

    return run


def assert_same_training(result: Result, expected: Result, atol: float = 2e-6) -> None:
    """Norms, losses, learning rates, steps and weights."""
    assert result["error"] == ""
    assert result["global_step"] == expected["global_step"]
    assert result["rates"] == expected["rates"]
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert distance(result, expected) <= atol


def assert_same_on_both(ranks: list[Result], expected: Result) -> None:
    """As on one process, and the same on each of two."""
    first, second = ranks
    assert_same_training(first, expected)
    assert "state" not in second  # consolidated on the first rank only
    for key in ("norms", "losses", "rates", "global_step"):
        assert first[key] == second[key]


def assert_stopped(ranks: list[Result], poison: str, before: Result) -> None:
    """Each process has refused the second step, says where the bad number was, and has the weights of `before`."""
    assert distance(ranks[0], before) <= 2e-6
    for rank, result in enumerate(ranks):
        assert result["error"].startswith("NonFiniteError: ")
        assert "after 1 optimizer steps" in result["error"]
        assert len(result["norms"]) == 1
        if poison == "loss":
            assert "the loss is nan on rank 1" in result["error"]
            assert ("rows of rank 1" in result["error"]) == (rank == 1)
        else:
            assert "the gradient is not finite" in result["error"]
            assert f"rows of rank {rank}" in result["error"]


def distance(a: Result, b: Result) -> float:
    """Largest difference of any weight."""
    assert a["state"].keys() == b["state"].keys()
    pairs = [(torch.tensor(a["state"][name]), torch.tensor(b["state"][name])) for name in a["state"]]
    return max((x - y).abs().max().item() for x, y in pairs)
