"""The benchmarks' own arithmetic, and that the script for GPUs runs where there is none."""

from __future__ import annotations

import importlib
import json
import operator
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_lightning
from helpers.compiling import count_compiling
from helpers.stages import preference_rows, save_llama
from rlhf_lightning.batches import InstructionBatch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_training_flops_by_hand(bench: Any) -> None:
    shape = bench("_synthetic").TINY._replace(layers=1, hidden=4, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
    # Queries and output 4 x 4, keys and values 4 x 2, three matrices of 4 x 8.
    assert shape.block_weights == 2 * 16 + 2 * 8 + 3 * 32
    # 6 x weights x 5 tokens, 6 x hidden x vocabulary x 2 targets, 6 x hidden x (2^2 + 3^2).
    work = shape.training_work([2, 3], targets=2)
    assert work.flops == 6 * 144 * 5 + 6 * 40 * 2 + 6 * 4 * 13
    assert work.unhalved == 6 * 144 * 5 + 6 * 40 * 2 + 12 * 4 * 13


def test_warm_up_steps_do_not_count_and_medians_do(bench: Any) -> None:
    compare = bench("compare")
    report = {"seconds": [9.0, 1.0, 3.0], "cpu_seconds": [9.0, 1.0, 3.0], "peak": 4 * 2**30, "libraries": 2**30}
    peer = {**report, "seconds": [9.0, 4.0, 6.0], "peak": 9 * 2**30}
    sides = {"ours": compare.Side("us", [report]), "peer": compare.Side("them", [peer])}
    job = {"stage": "sft", "rows": 2, "new_tokens": 0, "device": "cpu"}
    text = compare.comparison(sides, job, [100, 10, 30], 1)
    assert "| seconds a step, median | 2.000 | 5.000 | 2.50 times as fast |" in text
    assert "| real tokens/s | 10 | 4 | **2.50** times |" in text
    assert "| peak memory of the process | 4.00 GiB | 9.00 GiB | **0.44** |" in text


def test_a_side_that_saw_other_rows_is_found_out(bench: Any) -> None:
    compare = bench("compare")
    sides = {"ours": compare.Side("us", [{"tokens": [5, 7]}]), "peer": compare.Side("them", [{"tokens": [5, 8]}])}
    with pytest.raises(SystemExit, match="them saw"):
        compare.check_tokens(sides, [5, 7])


def test_our_side_reports_the_tokens_of_the_shared_rows(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = tmp_path / "data.jsonl", save_llama(tmp_path / "model")
    data.write_text("\n".join(map(json.dumps, preference_rows(12))), encoding="utf-8")
    compare, rows, ours = map(bench, ("compare", "_rows", "_ours"))
    arguments = ["--stage", "reward", "--model", model, "--data", str(data), "--steps", "2", "--rows", "4"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--max-length", "32"])
    job = compare.make_job(compare.parse(), tmp_path)
    rows.write_rows(job)
    rows.write_reward_model(job)
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["_ours.py", str(tmp_path / "job.json"), str(tmp_path / "report.json")])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # what the script sets is undone afterwards
    ours.main()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["tokens"] == compare.tokens_of_steps(job)
    assert len(report["seconds"]) == len(report["metrics"]["loss"]) == 2
    assert report["peak"] > report["libraries"] > 0


def test_switches_are_counted_between_files_that_follow_each_other(bench: Any) -> None:
    structure = bench("structure")
    counts = structure.switches(["a", "a", "b", "a", "b", "c"])
    assert counts == {("a", "b"): 2, ("b", "a"): 1, ("b", "c"): 1}
    text = structure.tell({"sft": ["a", "a", "b", "a", "b", "c"]}, listed=True)
    assert "| sft | 3 | 4 |" in text
    assert "| a | 3 |" in text
    assert "| a | b | 2 |" in text


@pytest.mark.parametrize("step", ["ppo", "sft"])
def test_structure_script_sees_our_files_and_no_others(tmp_path: Path, bench: Any, step: str) -> None:
    files = bench("structure").calls_of_step(step, tmp_path)
    package = Path(rlhf_lightning.__file__).parent
    assert all((package / file).is_file() for file in files)
    assert any(file.startswith("algorithms/") for file in files)
    assert any(file.startswith("functional/") for file in files)
    assert sys.getprofile() is None


def test_gpu_script_runs_on_a_cpu(tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = bench("gpu")
    count_compiling(monkeypatch)  # the compiler itself has tests elsewhere
    gpu.write_model(gpu.TINY, tmp_path)
    options = ["--device", "cpu", "--tiny", "--steps", "1", "--warmup", "0", "--precision", "32-true"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    settings = gpu.parse()
    results = {part: gpu.run_part(part, tmp_path, settings) for part in gpu.PARTS}
    text = gpu.tell(results, settings, measured=(0.5, 10.0))
    for part in ("sft", "reward", "ppo", "ours", "plain"):
        assert f"| {part} |" in text


def test_packed_rows_hold_each_example_once_in_the_first_row_with_room(bench: Any) -> None:
    lengths = torch.tensor([3, 4, 2])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    ids = torch.arange(1, 13).view(3, 4) * mask
    taught = mask & (torch.arange(4) > 0)
    packed = bench("_synthetic").packed(InstructionBatch(ids, mask, taught, torch.arange(3)), 5)
    assert packed.input_ids.tolist() == [[1, 2, 3, 9, 10], [5, 6, 7, 8, 0]]
    assert packed.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert packed.loss_mask.tolist() == [[False, True, True, False, True], [False, True, True, True, False]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert packed.row_ids.tolist() == [[0, 2], [1, -1]]


def test_a_function_in_a_process_of_its_own_says_how_it_ended(bench: Any) -> None:
    process = bench("_gpu_process")
    context = process.make_context(True, ())

    def end_of(function: Any, *arguments: Any, seconds: float = 60) -> tuple[Any, ...]:
        return tuple(process.run_alone(context, function, arguments, seconds))[:3]

    assert end_of(json.loads, "[1]") == ([1], "", False)
    assert end_of(operator.truediv, 1, 0) == (None, "ZeroDivisionError: division by zero", True)
    assert end_of(process.need, "json", "a_package_of_nobody") == (None, "a_package_of_nobody is not installed", False)
    assert end_of(os._exit, 3) == (None, "its process ended with 3", True)
    assert end_of(time.sleep, 60, seconds=1) == (None, "it was ended after 1 s", False)
