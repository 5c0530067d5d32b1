"""A process of several holds its part, and no buffer that is as large as the model; real DeepSpeed, real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.distributed import run_in_processes
from helpers.memory_runs import save_wide_model
from rlhf_lightning.training.deepspeed_memory import fitted_sizes

pytestmark = pytest.mark.matrix

RUNS: dict[str, dict[str, Any]] = {
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3"},
    "zero3 bf16": {"name": "zero3", "precision": "bf16-mixed"},
    "zero3 chosen": {"name": "zero3", "options": {"reduce_bucket_size": 5_000_000, "sub_group_size": 10_000_000}},
}
# Bytes per weight of each of two processes, before the optimizer's second step: weights, gradients, and what the
# optimizer keeps (two moments, and float32 copies where the weights are not float32 or not split).
HELD = {
    "zero1": 4 + 4 + (4 + 8) / 2,
    "zero2": 4 + 4 / 2 + (4 + 8) / 2,
    "zero3": (4 + 4 + 8) / 2,
    "zero3 bf16": (2 + 4 + 4 + 8) / 2,
}
SLACK = 1.0
"""Bytes per weight for buffers and for what a small model has besides."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = save_wide_model(tmp_path_factory.mktemp("wide"))
    ranks = run_in_processes("helpers.memory_runs:run_all", runs=[run | {"folder": folder} for run in RUNS.values()])
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(RUNS)}


@pytest.mark.parametrize("name", HELD)
def test_each_process_holds_its_part_of_the_training_state(results, name):
    for each in results[name]:
        assert each["held"]["sum"] / each["weights"] <= HELD[name] + SLACK


@pytest.mark.parametrize(("name", "per_weight"), [("zero3", (4 + 4) / 2), ("zero3 bf16", (2 + 4 + 4) / 2)])
def test_after_loading_there_is_a_part_of_weights_and_gradients(results, name, per_weight):
    for each in results[name]:
        assert each["loaded"]["sum"] / each["weights"] <= per_weight + SLACK


@pytest.mark.parametrize("name", ["zero3", "zero3 bf16"])
def test_nothing_is_larger_than_the_part_of_the_weights(results, name):
    for each in results[name]:
        for when in ("loaded", "held"):
            assert each[when]["largest"] <= 1.01 * each["weights"] / 2 * 4


def test_sizes_that_are_chosen_are_kept(results):
    for each in results["zero3 chosen"]:
        assert each["sizes"]["reduce_bucket_size"] == 5_000_000
        assert each["sizes"]["sub_group_size"] == 10_000_000
        assert each["sizes"]["allgather_bucket_size"] == results["zero3"][0]["sizes"]["allgather_bucket_size"] < 300_000
        assert each["loaded"]["largest"] == 5_000_000 * 4


def test_large_models_get_the_usual_sizes_and_small_ones_their_share():
    class Weight(nn.Parameter):
        ds_numel = 70_000_000_000

    large = fitted_sizes({}, [Weight(torch.zeros(1))], processes=8)
    assert large["reduce_bucket_size"] == 200_000_000
    assert large["stage3_max_live_parameters"] == 1_000_000_000
    assert large["sub_group_size"] == 70_000_000_000 // 8 // 32
    middle = fitted_sizes({}, [torch.empty(800_000_000, device="meta")], processes=2)
    assert (middle["stage3_max_live_parameters"], middle["reduce_bucket_size"]) == (100_000_000, 25_000_000)
    small = fitted_sizes({}, [torch.zeros(64)], processes=2)
    assert small.pop("stage3_max_reuse_distance") == 2
    assert set(small.values()) == {1 << 18}
    assert "reduce_bucket_size" not in fitted_sizes({"reduce_bucket_size": 5}, [torch.zeros(10)], processes=2)
