"""What a step sends is what theory says, on each strategy; real processes."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.distributed import run_in_processes
from helpers.memory_runs import save_wide_model

VOLUMES = {"ddp": 2, "zero1": 3, "zero2": 3, "zero3": 3}
"""What a step of one micro-batch sends, in sizes of the model."""


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = save_wide_model(tmp_path_factory.mktemp("wide"))
    runs = [{"name": name, "folder": folder} for name in VOLUMES]
    ranks = run_in_processes("helpers.traffic_runs:run_all", runs=runs)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(VOLUMES)}


@pytest.mark.parametrize("name", VOLUMES)
def test_a_step_sends_what_theory_says(sent, name):
    for each in sent[name]:
        assert each["volume"] / (4 * each["weights"]) == pytest.approx(VOLUMES[name], rel=0.05), each


def test_kinds_are_told_apart(sent):
    for each in sent["ddp"]:
        assert each["bytes"]["all_reduce"] >= 4 * each["weights"]
    for each in sent["zero3"]:
        # Each weight is gathered for both passes, but for those that are kept from one to the other.
        assert 1.5 < each["bytes"]["all_gather"] / each["bytes"]["reduce_scatter"] < 2.05
        assert each["calls"]["reduce_scatter"] > 10
