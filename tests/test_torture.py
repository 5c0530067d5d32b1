"""Runs that are killed at random moments and resumed end as runs that were left alone; `make torture` makes more."""

from helpers.torture import VARIANTS, differences, run, summary

RUNS = 12


def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path):
    results = run(tmp_path, RUNS)

    assert {result["variant"] for result in results} == set(VARIANTS)
    assert sum(result["kills"] for result in results) >= len(VARIANTS)
    assert not [result for result in results if result["wrong"]], summary(results)
    assert run(tmp_path, RUNS) == results  # taken from the file


def test_differences_are_seen():
    same = {"a": [1, (2.0, float("nan"))], "b": "x"}
    assert differences(same, {"a": [1, (2.0, float("nan"))], "b": "x"}) == ""
    assert differences(same, {**same, "b": "y"}) == "/b: x, not y"
    assert differences(same, {**same, "a": [1, (2.5, float("nan"))]}) == "/a/1/0: 2.0, not 2.5"
    assert differences(same, {"a": same["a"]}) == ": ['b']"
    assert differences({"a": [1]}, {"a": [1, 2]}) == "/a: [1], not [1, 2]"
