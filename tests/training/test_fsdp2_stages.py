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
