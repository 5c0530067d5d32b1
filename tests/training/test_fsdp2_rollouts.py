"""Weights that are gathered once per rollout, on what shards them: FSDP2 and real DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy

from helpers.distributed import run_in_processes
from helpers.stages import save_llama, save_reward_model
from rlhf_lightning.training import memory, rollout_weights

pytestmark = pytest.mark.matrix

STRATEGIES = ["fsdp2", "zero3 alone"]
SHORT, LONG = 2, 4
LAYERS = 1
GROUPS = LAYERS + 2
"""Of weights that FSDP2 gathers at once: each block, the rest of the backbone, the output layer."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[dict[str, Any]]]:
    """(strategy, how, tokens, kind) -> what came out on each of two processes."""
    root = tmp_path_factory.mktemp("models")
    models = {"folder": save_llama(root / "llama", layers=LAYERS)}
    models["reward"] = save_reward_model(root / "reward", models["folder"])
    keys = [(name, "layered", SHORT, "all") for name in STRATEGIES] + [("fsdp2", "layered", LONG, "all")]
    keys += [(name, "gathered", tokens, "all") for name in STRATEGIES for tokens in (SHORT, LONG)]
    keys += [(name, "gathered", SHORT, kind) for name in STRATEGIES for kind in ("lora", "fails")]
    keys += [("fsdp2", "layered", SHORT, "fails"), ("fsdp2", "auto", SHORT, "bf16")]
    names = ("name", "how", "tokens", "kind")
    told = [{"task": "rollouts", **dict(zip(names, key, strict=True))} for key in keys]
    ranks = run_in_processes("helpers.fsdp2_runs:run_all", runs=[each | models for each in told])
    return dict(zip(keys, zip(*ranks, strict=True), strict=True))


def gathers(run: dict[str, Any]) -> list[int]:
    """Of the rollouts after the first, in which the model is also tested."""
    return [rollout["gathers"] for rollout in run["rollouts"][1:]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_gathers_do_not_grow_with_the_number_of_tokens(runs: Any, name: str) -> None:
    for short, long in zip(runs[name, "gathered", SHORT, "all"], runs[name, "gathered", LONG, "all"], strict=True):
        assert len({*gathers(short), *gathers(long)}) == 1
    for (strategy, how, tokens, kind), ranks in runs.items():
        if (strategy, how, kind) == (name, "layered", "all"):
            assert min(each for run in ranks for each in gathers(run)) >= tokens * GROUPS


def test_fsdp2_gathers_each_group_once(runs: Any) -> None:
    for kind in ("all", "lora"):
        assert gathers(runs["fsdp2", "gathered", SHORT, kind][0])[0] == GROUPS
    # In mixed precision, by default, on a machine with memory to spare, for which each asks the other.
    assert gathers(runs["fsdp2", "auto", SHORT, "bf16"][0])[0] == GROUPS + 1


@pytest.mark.parametrize(("name", "tokens"), [("fsdp2", SHORT), ("fsdp2", LONG), ("zero3 alone", SHORT)])
def test_responses_and_training_are_those_of_layered_weights(runs: Any, name: str, tokens: int) -> None:
    for whole, layered in zip(runs[name, "gathered", tokens, "all"], runs[name, "layered", tokens, "all"], strict=True):
        assert [each["ids"] for each in whole["rollouts"]] == [each["ids"] for each in layered["rollouts"]]
        assert whole["state"] == layered["state"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_are_whole_during_a_rollout_and_not_after(runs: Any, name: str) -> None:
    for (strategy, how, _, _), ranks in runs.items():
        for rollout in (each for run in ranks if strategy == name for each in run["rollouts"]):
            assert rollout["after"]
            # After a layered one DeepSpeed has fetched what it expects to be asked for next.
            assert not any(rollout["after"]) or (how, strategy) == ("layered", "zero3 alone")
            assert rollout["whole"][-1] == (how != "layered")


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_error_leaves_no_weight_gathered_and_the_next_rollout_is_as_it_would_be(runs: Any, name: str) -> None:
    expected = runs["fsdp2", "layered", SHORT, "fails"]
    for run, same in zip(runs[name, "gathered", SHORT, "fails"], expected, strict=True):
        first = run["rollouts"][0]["whole"]
        assert not first[0]  # after the error
        assert [each["ids"] for each in run["rollouts"]] == [each["ids"] for each in same["rollouts"]]
    for weight, values in expected[0]["state"].items():
        found = torch.tensor(runs[name, "gathered", SHORT, "fails"][0]["state"][weight])
        torch.testing.assert_close(found, torch.tensor(values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_adapters_gather_their_base_too(runs: Any, name: str) -> None:
    for run in runs[name, "gathered", SHORT, "lora"]:
        assert len(set(gathers(run))) == 1
        assert min(gathers(run)) > 0


def test_policy_and_reference_share_the_parts_of_what_is_frozen(runs: Any) -> None:
    for run in runs["fsdp2", "gathered", SHORT, "lora"]:
        assert len(run["shared"]) == 7 * LAYERS + 2  # every matrix of a block, the embeddings, the output layer


def test_whole_size_is_of_all_processes(runs: Any) -> None:
    sizes = {run["size"] for key, ranks in runs.items() if key[3] == "all" for run in ranks}
    assert len(sizes) == 1
    blocks = LAYERS * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)  # numbers; attention, its keys, MLP, norms
    assert runs["fsdp2", "auto", SHORT, "bf16"][0]["size"] == sizes.pop() - 2 * blocks


def module_on(available: int, monkeypatch: pytest.MonkeyPatch, others: bool = True) -> Any:
    """A module of two processes on a machine with so much memory."""
    monkeypatch.setattr(memory, "available_memory", lambda device: available)
    trainer = SimpleNamespace(num_devices=2)
    gather = lambda tensor: torch.stack([tensor, torch.tensor(others)])  # noqa: E731
    return SimpleNamespace(device=torch.device("cpu"), trainer=trainer, all_gather=gather)


def test_room_is_half_of_what_is_free_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.has_room(module_on(400, monkeypatch), 100)
    assert not memory.has_room(module_on(399, monkeypatch), 100)
    assert not memory.has_room(module_on(400, monkeypatch, others=False), 100)


def test_available_memory_is_what_the_system_says() -> None:
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    assert 0 < memory.available_memory(torch.device("cpu")) < total


def test_nothing_happens_where_nothing_is_sharded() -> None:
    module = SimpleNamespace(trainer=SimpleNamespace(strategy=DDPStrategy(), world_size=2))
    model = torch.nn.Linear(2, 2)
    with rollout_weights(module, model, "gathered"):  # type: ignore[arg-type]
        assert type(model) is torch.nn.Linear
