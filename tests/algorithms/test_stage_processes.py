"""Every stage on several processes, under DDP, real DeepSpeed and FSDP2, is the same run as on one process.

The rows of an epoch and of a validation do not divide by the processes, responses are drawn at temperature 1, gradients
are clipped. `MATRIX=full`, as in `make test-slow`, takes every stage on every strategy, with all weights and with
LoRA, each step in one piece and in several; else a few of them.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import equality
from helpers.distributed import run_in_processes
from helpers.equality import BESIDE, FULL, SOME, STRATEGIES, distance
from helpers.stage_runs import STAGES
from rlhf_lightning import load_causal_lm, load_reward_model

pytestmark = pytest.mark.matrix
CASES = [*(FULL if os.environ.get("MATRIX") == "full" else SOME), *BESIDE]
NAMES = [" ".join(map(str, case)) for case in CASES]
EXPORTED = [case for case in CASES if not case.lora]
each_case = pytest.mark.parametrize("case", CASES, ids=NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return equality.prepare(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def one(folders):
    return equality.run_one(CASES, folders)


@pytest.fixture(scope="module")
def two(folders, exports):
    """Every run of this file on two processes, started twice; case, or `skips` -> result of each rank."""
    # Side by side, as one alone would go on when all other files are done; each has as many LoRA and as many pieces.
    halves = [[case for i, case in enumerate(CASES) if (i + i // 2) % 2 == half] for half in (0, 1)]
    skips = {"folder": folders["folder"], "root": str(exports / "skips")}

    def run_half(cases, **more):
        runs = [equality.settings(case, folders) for case in cases]
        for case, settings in zip(cases, runs, strict=True):
            settings["export"] = str(exports / " ".join(map(str, case))) if case in EXPORTED else None
        return run_in_processes("helpers.stage_runs:run_all", timeout=3600, runs=runs, **more)

    with ThreadPoolExecutor() as pool:
        started = [pool.submit(run_half, halves[0], skips=skips), pool.submit(run_half, halves[1])]
        results = [result for each in started for result in zip(*each.result(), strict=True)]
    return dict(zip([*halves[0], "skips", *halves[1]], results, strict=True))


@each_case
def test_two_processes_train_as_one(one, two, case):
    first, second = two[case]
    assert first["steps"] == second["steps"] == one[case]["steps"] >= 5
    assert distance(first, one[case], "before") <= 1e-7
    assert distance(first, one[case]) <= 1e-5
    assert distance({"after": first["before"]}, one[case]) > 1e-3


@each_case
def test_two_processes_answer_as_one(one, two, case):
    """Token for token, whichever process has the prompt."""
    first, second = two[case]
    together = [sorted(a + b) for a, b in zip(first["said"], second["said"], strict=True)]
    assert together == [sorted(said) for said in one[case]["said"]]
    assert bool(together) == ("ppo" in case.stage or case.stage in ("rloo", "grpo"))


@each_case
def test_two_processes_log_as_one(one, two, case):
    first, second = two[case]
    parts = {metric for metric in one[case]["metrics"] if metric.startswith("train/grad_norm_")}
    assert len(parts) == (2 if "ppo" in case.stage else 0)
    left_out = parts if case.strategy.startswith("zero") else set()  # ZeRO holds gradients in pieces
    assert one[case]["metrics"].keys() - first["metrics"].keys() == left_out
    for metric, expected in one[case]["metrics"].items():
        if metric in left_out:
            continue
        assert first["metrics"][metric] == pytest.approx(expected, abs=1e-5, rel=1e-5), metric
    assert {m: first["metrics"][m] for m in second["metrics"]} == second["metrics"]


@each_case
def test_clipping_was_at_work(one, case):
    assert min(one[case]["metrics"]["train/grad_norm"]) > 0.1


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: " ".join(map(str, case)))
def test_exports_hold_the_trained_weights(two, exports, case):
    folder = exports / " ".join(map(str, case))
    model = load_reward_model(folder).model if case.stage.startswith("reward") else load_causal_lm(folder)
    (trained, _) = two[case]
    for weight, tensor in model.state_dict().items():
        assert tensor.tolist() == trained["after"][f"0 {weight}"], weight


def test_reward_models_are_calibrated_over_all_processes(one, two):
    for case in CASES:
        if case.stage.startswith("reward"):
            expected, (found, _) = one[case]["calibration"], two[case]
            assert found["calibration"] == pytest.approx(expected, abs=1e-5)


def test_a_step_is_skipped_on_all_processes(two, exports):
    """A bad row of one process leaves no trace on either."""
    for result in two["skips"]:
        assert result["skipped"]["skips"] == 1
        assert result["without"]["skips"] == 0
        assert result["skipped"]["steps"] == result["without"]["steps"] == 2
        assert result["skipped"]["weights"] == result["without"]["weights"] == two["skips"][0]["skipped"]["weights"]
    names = {f"1_rank{rank}.{kind}" for rank in (0, 1) for kind in ("pt", "txt")}
    assert {path.name for path in (exports / "skips" / "non_finite").iterdir()} == names


def test_the_page_has_a_row_for_each_stage_and_a_column_for_each_strategy():
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    made = page.partition(equality.BEGIN)[2].partition(equality.END)[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()]
    assert head[1:] == [*STRATEGIES]
    assert [row[0] for row in rows] == [*STAGES]
    assert all(float(cell) <= 1e-5 for row in rows for cell in row[1:])


def test_the_cases_of_the_suite_are_among_all_and_meet_every_stage_and_both_of_everything():
    assert set(SOME) <= set(FULL)
    assert {case.stage for case in SOME} == set(STAGES)
    for strategy in ("ddp", "zero2", "zero3", "fsdp2"):
        group = [case for case in SOME if case.strategy == strategy]
        assert {case.lora for case in group} == {case.pieces for case in group} == {False, True}
