"""One process exports what several have saved: the folder that they ended with, of every strategy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.distributed import run_in_processes
from helpers.export_runs import run
from helpers.stages import assert_close_weights, save_llama, save_reward_model
from rlhf_lightning import load_reward_model
from rlhf_lightning.cli.export import export

pytestmark = pytest.mark.matrix

LORA = {"mode": "lora", "rank": 2}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "zero1": {"name": "zero1"},
    "zero1-bf16": {"name": "zero1", "precision": "bf16-mixed"},
    "zero2-lora": {"name": "zero2", **LORA},
    "zero2-reward": {"name": "zero2", "stage": "reward"},
    "zero3": {"name": "zero3"},
    "zero3-bf16": {"name": "zero3", "precision": "bf16-mixed"},
    "zero3-lora": {"name": "zero3", **LORA},
    "zero3-lora-bf16": {"name": "zero3", "precision": "bf16-mixed", **LORA},
    "zero3-adapter": {"name": "zero3", "export": "adapter", **LORA},
    "zero3-reward": {"name": "zero3", "stage": "reward"},
    "fsdp2": {"name": "fsdp2"},
    "fsdp2-bf16": {"name": "fsdp2", "precision": "bf16-true"},
    "fsdp2-mixed": {"name": "fsdp2", "precision": "bf16-mixed"},
    "fsdp2-lora": {"name": "fsdp2", **LORA},
    "fsdp2-adapter": {"name": "fsdp2", "export": "adapter", **LORA},
    "fsdp2-reward": {"name": "fsdp2", "stage": "reward"},
    "zero3-reward-last": {"name": "zero3", "stage": "reward", "mode": "last_layer"},
}
VALUES: dict[str, dict[str, Any]] = {
    "zero3-ppo": {"name": "zero3"},
    "zero3-ppo-lora": {"name": "zero3", **LORA},
    "fsdp2-ppo": {"name": "fsdp2"},
    "fsdp2-ppo-last": {"name": "fsdp2", "mode": "last_layer"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run of two processes, done in one start of them."""
    root = tmp_path_factory.mktemp("runs")
    folder = save_llama(root / "lm", layers=1)
    settings = RUNS | {name: {**run, "stage": "ppo"} for name, run in VALUES.items()}
    reward = save_reward_model(root / "reward", folder)
    common = {"folder": folder, "reward": reward}
    runs = [{**run, **common, "root": str(root / name)} for name, run in settings.items()]
    run_in_processes("helpers.export_runs:run_all", runs=runs)
    return root


def files(folder: Path) -> dict[str, bytes]:
    """What an export holds, but for its card, and the prompts: those are in the folder of a run of the command line."""
    left_out = ("README.md", "trained_on.npy")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left_out}


@pytest.mark.parametrize("name", RUNS)
def test_the_last_checkpoint_gives_the_folder_that_the_run_ended_with(root, name, capsys, recwarn):
    export(str(root / name / "checkpoints" / "last.ckpt"), str(root / name / "again"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not [warning for warning in recwarn if "distributed" in str(warning.message)]
    assert "which prompts it was trained on is not known" in said
    assert files(root / name / "again") == files(root / name / "export")


@pytest.mark.parametrize("name", VALUES)
def test_the_value_model_is_that_of_the_run(root, name):
    checkpoint = str(root / name / "checkpoints" / "last.ckpt")
    export(checkpoint, str(root / name / "value again"), part="value")
    export(checkpoint, str(root / name / "again"))
    for folder, again in (("value", "value again"), ("export", "again")):
        written, found = (root / name / each / "model.safetensors" for each in (folder, again))
        assert written.read_bytes() == found.read_bytes()
    assert load_reward_model(root / name / "value again").calibration.std == 2


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero3", "zero3-lora", "zero3-reward", "fsdp2", "fsdp2-lora"])
def test_several_processes_export_what_one_does(root, tmp_path, name):
    run(**{**RUNS[name], "name": "auto"}, folder=str(root / "lm"), root=str(tmp_path))
    found, alone = (load_file(folder / "export" / "model.safetensors") for folder in (root / name, tmp_path))
    assert_close_weights(found, alone)


def test_deepspeed_is_not_needed(root, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.setitem(sys.modules, name, None)
    export(str(root / "zero3" / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(root / "zero3" / "export")
