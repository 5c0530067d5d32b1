"""What a reward prefers, against what people preferred: numbers worked out by hand, and those of training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from helpers.stages import preference_rows, save_llama, save_reward_model, trainer
from rlhf_lightning import PreferenceDataModule, RewardModule
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.evaluation import reward as of
from rlhf_lightning.evaluation.results import Lines
from rlhf_lightning.evaluation.reward import Reward
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.evaluation.task import Bench


def number(prompts, responses):
    """The number that each response ends with."""
    return [float(response.split()[-1]) for response in responses]


def by_function(rows, out):
    results, curves = Reward().run(read_rows(rows, "preference"), Bench(rewards=[number]), Lines(out))
    return {(result.metric, result.group): result for result in results}, curves


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_reward_model(folder / "reward", save_llama(folder / "base"))


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results, curves = Reward().run(read_rows(preference_rows(40), "preference"), Bench(rewards=[folder]), Lines(out))
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    return {(result.metric, result.group): result for result in results}, curves, lines


def test_pairs_are_counted_by_hand(tmp_path):
    rows = [
        {"prompt": "a", "chosen": "yes 2", "rejected": "no 1", "margin": 1},  # right, and longer
        {"prompt": "b", "chosen": "y 2", "rejected": "really no 1", "margin": 1},  # right, and shorter
        {"prompt": "c", "chosen": "yes 1", "rejected": "no 1", "margin": 2},  # a tie, and longer
        {"prompt": "d", "chosen": "yes " * 20 + "1", "rejected": "no 2", "margin": 2},  # wrong, and much longer
    ]
    found, curves = by_function(rows, tmp_path)
    value = {place: one.value for place, one in found.items()}
    assert value["reward_accuracy", "all"] == 2.5 / 4
    assert (value["reward_accuracy", "margin=1"], value["reward_accuracy", "margin=2"]) == (1, 0.25)
    assert value["reward_accuracy", "length=-50..+50"] == 2.5 / 3
    assert value["reward_accuracy", "length=+50..+200"] == 0
    assert value["reward_margin", "all"] == pytest.approx((1 + 1 + 0 - 1) / 4)
    assert value["longer_is_better", "all"] == 3 / 4
    assert value["prefers_longer", "all"] == (1 + 0 + 0.5 + 0) / 4
    assert value["wins_longer", "all"] == 1 / 2
    assert ("calibration_error", "all") not in found  # of a function, whose scores are no log-odds
    assert curves == []


def test_a_ranking_counts_as_one_row(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x 3", "x 1", "x 2"], "ranks": [1, 2, 3]},  # two of three pairs are right
        {"prompt": "b", "responses": ["x 1", "x 2"], "ranks": [1, 2]},
    ]
    found, _ = by_function(rows, tmp_path)
    assert found["reward_accuracy", "all"].value == pytest.approx((2 / 3 + 0) / 2)
    assert found["reward_accuracy", "all"].count == 2


def test_four_responses_are_scored_as_by_rewardbench_2(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x 3", "x 1", "x 2", "y 0"], "ranks": [1, 2, 2, 2]},
        {"prompt": "b", "responses": ["x 3", "y 3", "x 2", "y 0"], "ranks": [1, 2, 2, 2]},  # shares the first place
        {"prompt": "c", "responses": ["x 1", "x 3", "x 2", "y 0"], "ranks": [1, 2, 2, 2]},
        {"prompt": "d", "responses": ["x 1", "x 0", "x -1"], "ranks": [1, 2, 3]},  # too few
        {"prompt": "e", "responses": ["x 5", "y 4.5", "x 3", "y 0"], "ranks": [1, 1, 2, 2]},  # above and close
        {"prompt": "f", "responses": ["x 5", "y 3.5", "x 3", "y 0"], "ranks": [1, 1, 2, 2]},  # above and far apart
        {"prompt": "g", "responses": ["x 5", "y 2", "x 3", "y 0"], "ranks": [1, 1, 2, 2]},
    ]
    found, _ = by_function(rows, tmp_path)
    assert (found["best_of_4", "all"].value, found["best_of_4", "all"].count) == (1.5 / 3, 3)
    assert found["ties_accuracy", "all"].value == pytest.approx(2 / 3)
    assert found["ties_margin", "all"].value == pytest.approx(1 / 3)


def test_accuracy_is_that_of_training(folder, found):
    rows = preference_rows(40)
    data = PreferenceDataModule(folder, rows, validation_data=rows, max_length=60, batch_size=8)
    (logged,) = trainer().validate(RewardModule(folder), data, verbose=False)
    assert found[0]["reward_accuracy", "all"].value == pytest.approx(logged["val/accuracy"])
    assert found[0]["calibration_error", "all"].value == pytest.approx(logged["val/calibration_error"], abs=1e-4)
    assert found[0]["reward_margin", "all"].value == pytest.approx(logged["val/margin"], abs=1e-4)


def test_the_diagram_is_that_of_scikit_learn(found):
    _, (curve,), lines = found
    margins = np.array([line["raw_scores"][0] - line["raw_scores"][1] for line in lines])
    observed, predicted = calibration_curve(margins > 0, 1 / (1 + np.exp(-abs(margins))), n_bins=20)
    np.testing.assert_allclose([point[:2] for point in curve.points], np.stack([predicted, observed], axis=1))
    assert sum(point[4] for point in curve.points) == len(lines)
    error = sum(abs(x - y) * count for x, y, _, _, count in curve.points) / len(lines)
    assert found[0]["calibration_error", "all"].value == pytest.approx(error)


def test_raw_scores_are_calibrated_scores_undone(found):
    for line in found[2]:
        assert line["raw_scores"] == pytest.approx([score * 2 + 0.5 for score in line["scores"]], rel=1e-5)


def test_a_row_that_the_template_refuses_is_counted_and_the_others_measured(folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(of, "rank_zero_warn", said.append)
    bench = Bench(rewards=[folder])
    chat = bench.judge(folder).scores_by.chat
    render = chat.render

    def refuse(prompt, tools=()):
        if prompt.startswith("2"):
            raise RefusedTurnsError("no such turns")
        return render(prompt, tools)

    monkeypatch.setattr(chat, "render", refuse)
    results, _ = Reward().run(read_rows(preference_rows(5), "preference"), bench, Lines(tmp_path))
    assert results[0].count == 4
    assert said == [f"{folder} cannot score 1 of 5 rows, the first: no such turns"]


def sometimes_nothing(prompts, responses):
    return [float("nan") if response == "bad 1" else 1.0 * len(response) for response in responses]


def test_a_score_that_is_not_finite_leaves_its_row_out_and_no_other(tmp_path):
    rows = [{"prompt": str(i), "chosen": f"longer {i}", "rejected": f"bad {i}"} for i in range(4)]
    read = read_rows(rows, "preference")
    for _ in range(2):  # the second time from what was written
        with pytest.warns(
            UserWarning, match="cannot score 1 of 4 rows, the first: row 1 has a score that is not finite"
        ):
            results, _ = Reward().run(read, Bench(rewards=[sometimes_nothing]), Lines(tmp_path))
        found = {(result.metric, result.group): (result.value, result.count) for result in results}
        assert found["reward_accuracy", "all"] == (1, 3)
        assert found["reward_margin", "all"] == (3, 3)
