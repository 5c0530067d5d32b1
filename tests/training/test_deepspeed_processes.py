"""A ZeRO run resumed by another number of processes goes on as if nothing had changed; real DeepSpeed and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import run_in_processes
from helpers.stages import save_llama, save_reward_model
from helpers.strategy_runs import save_model

pytestmark = pytest.mark.matrix
TINY: dict[str, dict[str, Any]] = {
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3"},
    "zero1 bf16": {"name": "zero1", "precision": "bf16-mixed"},
    "zero2 bf16": {"name": "zero2", "precision": "bf16-mixed"},
    "zero3 bf16": {"name": "zero3", "precision": "bf16-mixed"},
}
STAGES: dict[str, dict[str, Any]] = {
    f"{stage} zero{number}": {"stage": stage, "name": f"zero{number}"}
    for stage in ("sft", "ppo")
    for number in (1, 2, 3)
}
RUNS = TINY | STAGES


EVALUATED = ["zero2", "zero3"]
Run = tuple[str, int, str]
"""Name, by how many processes it was saved, and whether that is done now (`saved`), resumed, or validated."""


class Folders:
    """Models, and where each run writes its checkpoints."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tiny = save_model(root / "tiny")
        self.llama = save_llama(root / "lm")
        self.reward = save_reward_model(root / "reward", self.llama)

    def run(self, name: str, saved_by: int, what: str) -> dict[str, Any]:
        models = {"folder": self.llama, "reward": self.reward} if name in STAGES else {"folder": self.tiny}
        path = str(self.root / f"{name} by {saved_by}")
        if what == "saved":
            return RUNS[name] | models | {"checkpoints": path}
        if what == "refused":
            return RUNS[name] | models | {"resume": f"{path}/epoch=0.ckpt", "module": "OtherModule"}
        if what == "validated":
            return {"task": "validate", "name": name, "folder": self.tiny, "resume": f"{path}/epoch=0.ckpt"}
        return RUNS[name] | models | {"resume": f"{path}/epoch=0.ckpt"}

    def run_all(self, processes: int, runs: list[Run]) -> dict[Any, dict[str, Any]]:
        """Each run, and the number of processes; to what the first process found."""
        options = [self.run(*run) for run in runs]
        ranks = run_in_processes("helpers.resharding_runs:run_all", processes, runs=options)
        return {(*run, processes): result for run, result in zip(runs, ranks[0], strict=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(folders: Folders) -> dict[Any, dict[str, Any]]:
    """Every run by two processes, then by one, which goes on from two; then two go on from one."""
    found = folders.run_all(2, [(name, 2, "saved") for name in RUNS])
    ones = [(name, 1, "saved") for name in RUNS] + [(name, 2, "resumed") for name in RUNS]
    found |= folders.run_all(1, ones + [(name, by, "validated") for name in EVALUATED for by in (1, 2)])
    twos = [(name, 1, "resumed") for name in RUNS] + [(name, 1, "refused") for name in EVALUATED]
    found |= folders.run_all(2, twos + [(name, by, "validated") for name in EVALUATED for by in (1, 2)])
    return found


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a["state"].keys() == b["state"].keys()
    pairs = [(torch.tensor(a["state"][name]), torch.tensor(b["state"][name])) for name in a["state"]]
    return max((x - y).abs().max().item() for x, y in pairs)


def check_same(resumed: dict[str, Any], whole: dict[str, Any], name: str) -> None:
    assert whole["error"] == resumed["error"] == ""
    assert resumed["global_step"] == whole["global_step"]
    assert distance(resumed, whole) <= (8e-3 if "bf16" in name else 2e-6)  # the last bit of a bfloat16 weight
    if name in TINY:
        assert resumed["norms"] == pytest.approx(whole["norms"][3:], rel=2e-2 if "bf16" in name else 1e-5)
        assert resumed["rates"] == whole["rates"][3:]
        assert resumed["count"] == whole["count"] == [6.0] * 3


@pytest.mark.parametrize("saved_by", [2, 1])
@pytest.mark.parametrize("name", RUNS)
def test_resuming_with_another_number_of_processes_changes_nothing(results, name, saved_by):
    check_same(results[name, saved_by, "resumed", 3 - saved_by], results[name, saved_by, "saved", saved_by], name)


@pytest.mark.parametrize("saved_by", [2, 1])
@pytest.mark.parametrize("name", EVALUATED)
def test_so_does_evaluation(results, name, saved_by):
    losses = [results[name, saved_by, "validated", processes]["losses"] for processes in (1, 2)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", EVALUATED)
def test_another_model_is_refused_in_one_line(results, folders, name):
    path = folders.root / f"{name} by 1" / "epoch=0.ckpt"
    said = f"UserError: '{path}' holds other weights than this model; resume with the same"
    assert results[name, 1, "refused", 2]["error"] == said


@pytest.mark.slow
def test_so_do_four_after_two(results, folders):
    four = folders.run_all(4, [(name, 2, "resumed") for name in TINY])
    for name in TINY:
        check_same(four[name, 2, "resumed", 4], results[name, 2, "saved", 2], name)


def test_what_is_cut_anew_is_not_kept(results, folders):
    assert not list(folders.root.rglob("*.partial"))
