"""Training with answers from vLLM: they are the policy's of that moment, on one process and on several."""

import itertools

import pytest

import runs
from helpers.distributed import run_in_processes
from helpers.equality import distance

MISMATCH = "train/mismatch_kl"
ONE = {
    "ppo": {},
    "ppo lora": {"lora": True},
    "ppo lora merged": {"lora": True, "engine": {"lora": "merged"}},
    "ppo on-policy": {"stage": "ppo on-policy"},
    "rloo": {"stage": "rloo"},
    "stale": {"stale": True},
    "stale lora": {"stale": True, "lora": True},
}
TWO = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2 lora": {"strategy": "fsdp2", "lora": True},
    "fsdp2 rloo": {"strategy": "fsdp2", "stage": "rloo"},
    "fsdp2 one engine": {"strategy": "fsdp2", "engine": {"tensor_parallel_size": 2}},
    "ddp one engine lora": {"strategy": "ddp", "lora": True, "engine": {"tensor_parallel_size": 2}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return runs.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def one(models):
    return {name: runs.run(**models, **options) for name, options in ONE.items()}


@pytest.fixture(scope="module")
def two(models):
    """Every run on two processes, started once; by name, the result of each rank."""
    results = run_in_processes("runs:run_all", runs=[models | options for options in TWO.values()])
    return dict(zip(TWO, zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("name", [name for name in ONE if not name.startswith("stale")])
def test_the_engine_draws_from_the_policy_of_now(one, name):
    metrics = one[name]["metrics"]
    assert len(metrics[MISMATCH]) == 3
    assert max(map(abs, metrics[MISMATCH])) < 1e-5
    assert metrics["train/importance"] == pytest.approx([1, 1, 1], abs=1e-4)
    assert metrics["train/importance_capped"] == [0, 0, 0]
    assert one[name]["threads"] == 1


@pytest.mark.parametrize("name", ["stale", "stale lora"])
def test_an_engine_that_keeps_old_weights_is_seen(one, name):
    first, *later = one[name]["metrics"][MISMATCH]
    assert abs(first) < 1e-5
    assert min(map(abs, later)) > 1e-3


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_is_resumed_ends_as_one_that_was_not_cut(models, one, lora, tmp_path):
    resumed = runs.run(**models, lora=lora, cut=str(tmp_path / "cut.ckpt"))
    whole = one["ppo lora" if lora else "ppo"]
    assert resumed["said"] == whole["said"][-len(resumed["said"]) :]
    assert len(resumed["said"]) < len(whole["said"])
    assert distance(resumed, whole) == 0


def test_adapters_answer_as_merged_weights(one):
    assert one["ppo lora"]["said"] == one["ppo lora merged"]["said"]
    assert distance(one["ppo lora"], one["ppo lora merged"]) < 1e-5


@pytest.mark.parametrize("name", TWO)
def test_two_processes_answer_and_train_as_one(one, two, name):
    alone = one["rloo" if "rloo" in name else "ppo lora" if "lora" in name else "ppo"]
    first, second = two[name]
    together = [sorted(a + b) for a, b in zip(first["said"], second["said"], strict=True)]
    assert together == [sorted(said) for said in alone["said"]]
    assert distance(first, alone) < 1e-5
    assert max(map(abs, itertools.chain(first["metrics"][MISMATCH], second["metrics"][MISMATCH]))) < 1e-5
