"""Under FSDP2 what test_stage_processes.py has not: gradient checkpointing, adapters, last layers, and resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import equality
from helpers.distributed import run_in_processes
from helpers.equality import Case, distance
from helpers.fsdp2_runs import run_all

pytestmark = pytest.mark.matrix
CASES = [Case("sft checkpointing", "fsdp2", False, True)]  # the others are in test_stage_processes.py
NAMES = [" ".join(map(str, case)) for case in CASES]
EXPORTED = [case for case in CASES if not case.lora]
PARTLY = {
    "reward adapter": ("reward", {"mode": "lora", "rank": 4, "export": "adapter"}),
    "reward last layer": ("reward", {"mode": "last_layer"}),
    "ppo last layer": ("ppo", {"mode": "last_layer"}),
}
CUTS = {"sft": 4, "ppo": 8}
"""Optimizer steps after which a checkpoint is written, in the middle of the second of two epochs."""

each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, str]:
    """The models lie in bfloat16, so that each process makes float32 what it holds of them."""
    folders = equality.prepare(root)
    for path in {file for folder in folders.values() for file in Path(folder).glob("*.safetensors")}:
        save_file({name: weight.bfloat16() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    return folders


def partly(case: str, name: str, root: Path, folders: dict[str, str]) -> dict[str, Any]:
    stage, settings = PARTLY[case]
    export = str(root / f"{case} {name}")
    told = {"stage": stage, "name": name, "settings": settings, "folder": folders["folder"], "export": export}
    return {"task": "adapters", **told}


def cut(stage: str, steps: int | None, devices: int, root: Path, folders: dict[str, str]) -> dict[str, Any]:
    path = str(root / f"{stage}.ckpt")
    return {"task": "resumed", "stage": stage, "path": path, "cut": steps, "devices": devices, **folders}


@pytest.fixture(scope="module")
def two(root: Path, folders: dict[str, str]) -> dict[Any, Any]:
    """Case, or (stage, `whole` or `resumed`) -> result of each of two processes; all are started once."""
    runs = [{"task": "stage", **equality.settings(case, folders)} for case in CASES]
    for case, settings in zip(CASES, runs, strict=True):
        settings["export"] = str(root / " ".join(map(str, case))) if case in EXPORTED else None
    runs += [partly(case, "fsdp2", root, folders) for case in PARTLY]
    runs += [cut(stage, steps, 2, root, folders) for stage in CUTS for steps in (CUTS[stage], None)]
    keys = [*CASES, *PARTLY, *((stage, kind) for stage in CUTS for kind in ("whole", "resumed"))]
    ranks = run_in_processes("helpers.fsdp2_runs:run_all", timeout=3600, runs=runs)
    return dict(zip(keys, zip(*ranks, strict=True), strict=True))


@pytest.fixture(scope="module")
def one(folders: dict[str, str]) -> dict[Case, dict[str, Any]]:
    """The same without FSDP2, on one process in one piece."""
    alone = sorted({(case.stage, case.lora) for case in CASES})
    runs = [{"task": "stage", **equality.settings(Case(stage, "auto", lora, False), folders)} for stage, lora in alone]
    done = dict(zip(alone, run_all(runs), strict=True))
    return {case: done[case.stage, case.lora] for case in CASES}


@each_case
def test_two_processes_train_as_one(one: Any, two: Any, case: Case) -> None:
    first, second = two[case]
    assert first["steps"] == second["steps"] == one[case]["steps"] >= 3
    assert distance(first, one[case], "before") <= 1e-7
    assert distance(first, one[case]) <= 1e-5
    assert distance({"after": first["before"]}, one[case]) > 1e-3


@each_case
def test_two_processes_log_as_one(one: Any, two: Any, case: Case) -> None:
    first, second = two[case]
    assert first["metrics"].keys() == one[case]["metrics"].keys()  # each part's gradient norm, too
    for metric, expected in one[case]["metrics"].items():
        assert first["metrics"][metric] == pytest.approx(expected, abs=1e-4, rel=1e-4), metric
    assert {m: first["metrics"][m] for m in second["metrics"]} == second["metrics"]


@pytest.mark.parametrize("case", EXPORTED, ids=[" ".join(map(str, case)) for case in EXPORTED])
def test_exports_hold_the_trained_weights(two: Any, root: Path, case: Case) -> None:
    (file,) = (root / " ".join(map(str, case))).glob("*.safetensors")
    for weight, tensor in load_file(file).items():
        assert tensor.tolist() == two[case][0]["after"][f"0 {weight}"], weight


@pytest.mark.parametrize("case", PARTLY)
def test_adapters_and_last_layers_train_and_export_as_on_one_process(
    two: Any, root: Path, folders: dict[str, str], case: str
) -> None:
    (losses,) = run_all([partly(case, "auto", root, folders)])
    assert two[case][0] == pytest.approx(losses, abs=1e-4)
    (expected,), (found,) = ((root / f"{case} {name}").glob("*.safetensors") for name in ("auto", "fsdp2"))
    weights = load_file(found)
    assert weights.keys() == load_file(expected).keys()
    for name, tensor in load_file(expected).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("stage", CUTS)
def test_a_resumed_run_is_the_one_that_was_not_cut(two: Any, stage: str) -> None:
    (whole, _), (after, _) = two[stage, "whole"], two[stage, "resumed"]
    assert after["steps"] == whole["steps"] > CUTS[stage]
    assert after["after"] == whole["after"]
    loss = "train/loss" if stage == "sft" else "train/policy_loss"
    assert after["metrics"][loss] == whole["metrics"][loss][-len(after["metrics"][loss]) :]


def test_one_process_goes_on_from_the_checkpoint_of_two(two: Any, root: Path, folders: dict[str, str]) -> None:
    runs = [cut(stage, None, 1, root, folders) for stage in CUTS]
    (alone,) = run_in_processes("helpers.fsdp2_runs:run_all", world_size=1, runs=runs)
    for stage, after in zip(CUTS, alone, strict=True):
        whole = two[stage, "whole"][0]
        assert after["steps"] == whole["steps"]
        assert distance(after, whole) <= 2e-5
