"""Curves in pictures: short, and still the same curves."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.runs import run
from rlhf_lightning.evaluation import results as evaluation
from rlhf_lightning.report import svg
from rlhf_lightning.report.charts import Chart, Line, curve_charts, evaluation_charts, score_against_kl
from rlhf_lightning.report.thinning import smooth, thin

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400)


@given(numbers, st.integers(1, 20))
def test_thinning_keeps_the_extremes_of_each_column_and_the_ends(values, columns):
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept_x, kept_y = thin(x, y, columns)
    assert len(kept_x) <= max(4 * columns, 4)
    assert (np.diff(kept_x) > 0).all()
    assert (kept_y == y[kept_x.astype(int)]).all()
    assert (kept_x[0], kept_x[-1]) == (x[0], x[-1])
    column = np.minimum(x * columns / ((x[-1] - x[0]) or 1), columns - 1).astype(int)
    for each in np.unique(column):
        inside = [place for place in kept_x.astype(int) if column[place] == each]
        assert y[inside].min() == y[column == each].min()
        assert y[inside].max() == y[column == each].max()


@given(numbers, st.sampled_from([1, 3, 9]))
def test_smoothing_is_the_mean_of_the_neighbours(values, width):
    smoothed = smooth(np.array(values), width)
    for place, value in enumerate(smoothed):
        neighbours = values[max(0, place - width // 2) : place + width // 2 + 1]
        assert value == pytest.approx(np.mean(neighbours), abs=1e-6 * max(map(abs, values), default=0) + 1e-9)


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(svg.draw(chart, "name"))


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30),
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20),
)
def test_every_curve_is_well_formed_and_inside_its_picture(values, label):
    x = np.arange(len(values), dtype=float)
    picture = drawn(Chart("k", label, "", label, label, [Line(label, x, np.array(values, dtype=float), 0, "points")]))
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    for circle in picture.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height
    assert picture.find("title").text == (label or None)
    for path in picture.iter("path"):
        assert all(np.isfinite(float(number)) for number in re.findall(r"[\d.]+|nan|inf", path.attrib["d"]))


def test_a_long_curve_makes_a_small_picture():
    x = np.arange(100_000, dtype=float)
    line = Line("loss", x, np.sin(x / 100) + np.random.default_rng(0).normal(size=len(x)), 0)
    assert len(svg.draw(Chart("k", "t", "", "x", "y", [line]), "name")) < 50_000


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_inside(low, width):
    high = low + width
    if not low < high:
        return
    found = svg.ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert len(found) <= 12


def test_training_and_held_out_lie_over_one_another():
    charts = curve_charts([run({"train/loss": [3.0, 2.0], "val/loss": [2.5], "train/lr": [1.0, 0.5]}, stage="SFT")])
    assert [chart.key for chart in charts] == ["loss", "lr"]
    assert [line.label for line in charts[0].lines] == ["training", "held out"]
    assert charts[0].x_label == "optimizer step"
    assert [line.label for line in charts[1].lines] == [""]


def test_a_long_curve_is_smoothed_and_shown_as_it_was_logged_behind():
    (chart,) = curve_charts([run({"train/loss": [1.0, 2.0] * 200})])
    faint, smoothed = chart.lines
    assert (faint.style, faint.label) == ("faint", "")
    assert faint.y.tolist() == [1.0, 2.0] * 200
    assert smoothed.y.std() < 0.1


def test_what_is_not_finite_is_left_out_and_counted():
    (chart,) = curve_charts([run({"train/loss": [1.0, float("nan"), float("inf"), 2.0]})])
    assert chart.lines[0].x.tolist() == [0, 3]
    assert "2 values that are not finite are left out" in chart.note
    assert curve_charts([run({"train/loss": [float("nan")]})]) == []


def test_a_metric_of_ones_own_gets_a_picture_too():
    assert {"politeness", "alone"} <= {c.key for c in curve_charts([run({"train/politeness": [1.0], "alone": [2.0]})])}


def test_several_runs_have_a_colour_each_and_a_picture_for_each_metric():
    curves = {"train/score": [1.0, 2.0], "val/score": [1.5], "train/kl": [0.0, 1.0], "train/kl_k3": [0.0, 1.0]}
    charts = {chart.key: chart for chart in curve_charts([run(curves, "a"), run(curves, "b")])}
    assert {*charts} == {"score", "kl", "kl_k3"}
    assert [(line.label, line.color) for line in charts["score"].lines if line.style == "line"] == [("a", 0), ("b", 1)]
    assert [(line.label, line.color) for line in charts["score"].lines if line.style == "points"] == [("", 0), ("", 1)]


def test_score_against_kl_pairs_what_was_measured_at_the_same_step():
    (one,) = [run({"train/kl": [0.0, 4.0, 9.0, -1.0], "train/score": [1.0, 2.0, 3.0]})]
    chart = score_against_kl([one])
    assert chart.lines[0].x.tolist() == [0, 2, 3]
    assert chart.lines[0].y.tolist() == [1, 2, 3]
    assert "only a judge can say" in chart.note
    assert score_against_kl([run({"train/loss": [1.0]})]) is None
    judged = run({"judge/kl": [0.0, 4.0], "judge/score": [1.0, 0.5]})
    assert "over-optimisation" in score_against_kl([judged]).note


def test_curves_of_an_evaluation_become_pictures():
    points = [[0.7, 0.6, 0.5, 0.7, 120], [0.5, 0.5, None, None, 10], [None, 0.5, None, None, None]]
    curve = evaluation.Curve("reliability", "a", "predicted", "observed", [*map(tuple, points)])
    curves = [curve, curve._replace(model="b"), curve._replace(x="other"), curve._replace(points=[])]
    chart, other = evaluation_charts([evaluation.Evaluation(curves=curves)])
    assert (chart.has_diagonal, [line.label for line in chart.lines]) == (True, ["a", "b"])
    assert chart.lines[0].x.tolist() == [0.5, 0.7]
    assert len(other.lines) == 1
    assert chart.key != other.key
    assert 'class="line bar c0"' in svg.draw(chart, "name")
