"""Adapters and the last layer on two processes, under DDP and real DeepSpeed, train and export as on one process.

`MATRIX=full`, as in `make test-slow`, takes every case on both.
"""

import os
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed import run_in_processes
from helpers.finetune_runs import run
from helpers.stages import save_llama

pytestmark = pytest.mark.matrix
LORA = {"mode": "lora", "rank": 4, "use_rslora": True}
CASES = {
    "sft merged": ("sft", LORA),
    "reward adapter": ("reward", LORA | {"export": "adapter"}),
    "reward last layer": ("reward", {"mode": "last_layer"}),
    "ppo merged": ("ppo", LORA),
    "ppo last layer": ("ppo", {"mode": "last_layer"}),
}
RUNS = [*product(CASES, ("ddp", "zero3"))]
if os.environ.get("MATRIX") != "full":
    RUNS = [("sft merged", "zero3"), ("reward adapter", "zero3"), ("reward last layer", "ddp")]
    RUNS += [("ppo merged", "ddp"), ("ppo last layer", "zero3")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def told(root, case, name):
    stage, settings = CASES[case]
    return {"stage": stage, "name": name, "folder": str(root / "base"), "export": str(root / f"{case} {name}")} | {
        "settings": settings
    }


@pytest.fixture(scope="module")
def losses(root):
    """(case, strategy) -> losses of the first process; every run on two processes is started once."""
    save_llama(root / "base", layers=1)
    results, _ = run_in_processes("helpers.finetune_runs:run_all", runs=[told(root, *pair) for pair in RUNS])
    return dict(zip(RUNS, results, strict=True)) | {(case, "auto"): run(**told(root, case, "auto")) for case in CASES}


def exported(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_two_processes_train_and_export_as_one(losses, root, case, name):
    assert losses[case, name] == pytest.approx(losses[case, "auto"], abs=1e-4)
    expected, weights = (exported(root / f"{case} {which}") for which in ("auto", name))
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-5, rtol=0, msg=key)
    assert any(tensor.abs().sum() > 0 for key, tensor in expected.items() if "lora_B" in key) or "adapter" not in case
