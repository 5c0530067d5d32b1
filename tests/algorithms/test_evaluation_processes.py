"""Validation, testing and prediction of any number of rows say on two processes what they say on one.

`MATRIX=full`, as in `make test-slow`, asks for both numbers of rows on both strategies.
"""

import json
import os
from itertools import product

import pytest

from helpers.distributed import run_in_processes
from helpers.equality import prepare
from helpers.evaluation_runs import STAGES, run

pytestmark = pytest.mark.matrix
STRATEGIES = ("ddp", "zero3")
COUNTS = (5, 1)  # one batch of a process is not full; one process has no row at all
CASES = [*product(STAGES, STRATEGIES, COUNTS)]
if os.environ.get("MATRIX") != "full":  # on ZeRO-3, whose processes must keep step, the harder one
    CASES = [case for case in CASES if case[1] == "ddp" or case[2] == 1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, by case; `auto` for one process."""
    root = tmp_path_factory.mktemp("models")
    shared = {**prepare(root), "root": str(root / "runs")}
    runs = [{"stage": stage, "name": name, "count": count, **shared} for stage, name, count in CASES]
    two = zip(*run_in_processes("helpers.evaluation_runs:run_each", runs=runs), strict=True)
    one = {(s, "auto", c): [run(stage=s, name="auto", count=c, **shared)] for s, c in product(STAGES, COUNTS)}
    return dict(zip(CASES, two, strict=True)) | one


@pytest.mark.parametrize("task", ["validate", "test"])
@pytest.mark.parametrize(("stage", "name", "count"), CASES)
def test_every_row_counts_once(found, stage, name, count, task):
    (expected,) = found[stage, "auto", count]
    for rank in found[stage, name, count]:
        assert rank[task].keys() == expected[task].keys() != set()
        for metric, value in expected[task].items():
            assert rank[task][metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric


@pytest.mark.parametrize(("stage", "name", "count"), [case for case in CASES if case[0] != "dpo"])
def test_predictions_are_those_of_one_process_though_each_has_a_disk_of_its_own(found, stage, name, count):
    (expected,) = found[stage, "auto", count]
    first, second = found[stage, name, count]
    assert second["predict"] is None
    rows, wanted = (
        [json.loads(line) for line in text.splitlines()] for text in (first["predict"], expected["predict"])
    )
    assert len(rows) == len(wanted) == count * (2 if stage == "reward" else 1)
    for row, other in zip(rows, wanted, strict=True):
        numbers = {name for name, value in other.items() if isinstance(value, float)}
        assert {name: row[name] for name in row.keys() - numbers} == {n: other[n] for n in other.keys() - numbers}
        assert {n: row[n] for n in numbers} == pytest.approx({n: other[n] for n in numbers}, abs=1e-5)
