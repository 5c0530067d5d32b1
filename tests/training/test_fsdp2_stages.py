"""Every stage under FSDP2 on two processes, full and with adapters, is the same run as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed import run_in_processes
from helpers.fsdp2_runs import run_all
from helpers.models import save_folder
from helpers.stages import save_llama, save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import load_causal_lm

STAGES = ["sft", "sft checkpointing", "reward", "dpo", "ppo", "ppo trunk"]
LORA = {"mode": "lora", "rank": 4}
CASES = {
    "sft merged": ("sft", LORA),
    "reward adapter": ("reward", LORA | {"export": "adapter"}),
    "reward last layer": ("reward", {"mode": "last_layer"}),
    "ppo merged": ("ppo", LORA),
    "ppo last layer": ("ppo", {"mode": "last_layer"}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def stage(name: str, stage: str, root: Path) -> dict[str, Any]:
    models = {"folder": str(root / "llama"), "reward": str(root / "reward")}
    return {"task": "stage", "stage": stage, "name": name, "export": str(root / f"{stage} {name}"), **models}


def adapters(name: str, case: str, root: Path) -> dict[str, Any]:
    stage, settings = CASES[case]
    folders = {"folder": str(root / "llama"), "export": str(root / f"{case} {name}")}
    return {"task": "adapters", "stage": stage, "name": name, "settings": settings, **folders}


@pytest.fixture(scope="module")
def two(root: Path) -> dict[str, Any]:
    """Stage, or case with adapters -> result of each of two processes; all are started once."""
    base = save_llama(root / "llama", layers=2)
    reference = load_causal_lm(base)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.3)
    save_folder(root / "llama-reference", reference, tiny_tokenizer())
    save_reward_model(root / "reward", base)
    runs = [stage("fsdp2", name, root) for name in STAGES] + [adapters("fsdp2", case, root) for case in CASES]
    ranks = run_in_processes("helpers.fsdp2_runs:run_all", runs=runs)
    return dict(zip([*STAGES, *CASES], zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_train_and_log_as_one(two: Any, root: Path, name: str) -> None:
    first, second = two[name]
    (one,) = run_all([stage("auto", name, root)])
    assert first["steps"] == second["steps"] == one["steps"] > 0
    for when in ("before", "after"):
        assert first[when].keys() == one[when].keys()
        for weight, expected in one[when].items():
            found = torch.tensor(first[when][weight])
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0, msg=f"{when} {weight}")
    assert first["before"] != first["after"]
    assert first["metrics"].keys() == one["metrics"].keys()
    for metric, expected in one["metrics"].items():
        assert first["metrics"][metric] == pytest.approx(expected, abs=1e-4, rel=1e-4), metric
    assert {m: first["metrics"][m] for m in second["metrics"]} == second["metrics"]


@pytest.mark.parametrize("name", STAGES)
def test_exports_hold_the_trained_weights(two: Any, root: Path, name: str) -> None:
    (file,) = (root / f"{name} fsdp2").glob("*.safetensors")
    for weight, tensor in load_file(file).items():
        assert tensor.tolist() == two[name][0]["after"][f"0 {weight}"], weight


@pytest.mark.parametrize("case", CASES)
def test_adapters_and_last_layers_train_and_export_as_on_one_process(two: Any, root: Path, case: str) -> None:
    (losses,) = run_all([adapters("auto", case, root)])
    assert two[case][0] == pytest.approx(losses, abs=1e-4)
    (expected,), (found,) = ((root / f"{case} {name}").glob("*.safetensors") for name in ("auto", "fsdp2"))
    weights = load_file(found)
    assert weights.keys() == load_file(expected).keys()
    for name, tensor in load_file(expected).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0, msg=name)


CUTS = {"sft": 3, "ppo": 6}
"""Optimizer steps after which a checkpoint is written, in the middle of the second epoch, besides those at the ends."""


@pytest.fixture(scope="module")
def resumed(two: Any, root: Path) -> dict[Any, dict[str, Any]]:
    """(stage, processes) -> a run that went on from the checkpoint of two; (stage, `whole`) -> one that was not cut."""
    models = {"folder": str(root / "llama"), "reward": str(root / "reward")}
    told = [
        {"task": "resumed", "name": "fsdp2", "stage": stage, "path": str(root / f"{stage}.ckpt"), **models}
        for stage in CUTS
    ]
    first = [each | {"cut": CUTS[each["stage"]], "devices": 2} for each in told]
    again = [each | {"cut": None, "devices": 2} for each in told]
    results, _ = run_in_processes("helpers.fsdp2_runs:run_all", runs=[*first, *again])
    (alone,) = run_in_processes(
        "helpers.fsdp2_runs:run_all",
        world_size=1,
        runs=[each | {"devices": 1, "path": each["path"].replace(".ckpt", "-epoch=0.ckpt")} for each in again],
    )
    keys = [(stage, kind) for kind in ("whole", 2, 1) for stage in CUTS]
    return dict(zip(keys, [*results, *alone], strict=True))


@pytest.mark.parametrize("stage", CUTS)
def test_a_resumed_run_is_the_one_that_was_not_cut(resumed: Any, stage: str) -> None:
    whole, after = resumed[stage, "whole"], resumed[stage, 2]
    assert after["steps"] == whole["steps"] > CUTS[stage]
    assert after["after"] == whole["after"]
    loss = "train/loss" if stage == "sft" else "train/policy_loss"
    assert after["metrics"][loss] == whole["metrics"][loss][-len(after["metrics"][loss]) :]


@pytest.mark.parametrize("stage", CUTS)
def test_one_process_goes_on_from_the_checkpoint_of_two(resumed: Any, stage: str) -> None:
    whole, after = resumed[stage, "whole"], resumed[stage, 1]
    assert after["steps"] == whole["steps"]
    for weight, expected in whole["after"].items():
        found = torch.tensor(after["after"][weight])
        torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=0, msg=weight)
