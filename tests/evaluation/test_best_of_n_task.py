"""Best-of-n from one sampling run: what the answers' scores say, and the other models beside it."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from helpers.cli_runs import save_model
from helpers.stages import prompt_rows
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.best_of_n import BestOfN, counts_up_to, fits_of
from rlhf_lightning.evaluation.kl import kl_of_response
from rlhf_lightning.evaluation.results import Curve, Lines, Result
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.evaluation.task import Bench
from rlhf_lightning.generation.sampling import Sampling

ROWS = read_rows(prompt_rows(5), "prompts")
SAMPLING = Sampling(max_new_tokens=6, temperature=0.8)


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(map(str.isalpha, response))) for response in responses]


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in response)) for response in responses]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_model(folder / name, seed=seed)) for seed, name in enumerate("abc")]


def measured(out: Any, *names: str, **options: Any) -> tuple[list[Result], list[Curve], list[dict[str, Any]]]:
    bench = Bench(names, **{"rewards": [letters, vowels], "sampling": SAMPLING, "batch_size": 4, **options})
    task = BestOfN(samples=5)
    task.check(bench)
    lines = Lines(out)
    results, curves = task.run(ROWS, bench, lines)
    lines.finish()
    return results, curves, [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


def test_every_n_is_the_mean_over_all_choices_by_proxy_and_by_judge(models, tmp_path):
    results, curves, lines = measured(tmp_path, models[0])
    assert [len(set(line["responses"])) > 1 for line in lines] == [True] * 5
    for line in lines:
        assert line["score"] == letters([], line["responses"])
        assert line["judge_score"] == vowels([], line["responses"])
    found = {(one.metric, one.group): one for one in results}
    for n in (1, 2, 4, 5):
        best, worth = [], []
        for line in lines:
            for chosen in combinations(range(5), n):
                high = max(line["score"][i] for i in chosen)
                ties = [line["judge_score"][i] for i in chosen if line["score"][i] == high]
                best.append(high)
                worth.append(sum(ties) / len(ties))
        assert found["best_of_n_score", f"n={n}"].value == pytest.approx(sum(best) / len(best))
        assert found["best_of_n_judge_score", f"n={n}"].value == pytest.approx(sum(worth) / len(worth))
    by_score, by_judge = curves
    assert (by_score.y, by_judge.y, by_score.model) == ("score", "judge_score", models[0])
    assert [point[0] for point in by_score.points] == pytest.approx([math.log(n) - (n - 1) / n for n in (1, 2, 4, 5)])
    assert [point[1] for point in by_score.points] == [found["best_of_n_score", f"n={n}"].value for n in (1, 2, 4, 5)]
    assert by_score.fits["best_of_n"]["start"] == by_score.points[0][1]


def test_other_models_stand_on_the_same_axes(models, tmp_path):
    a, b, c = models
    results, curves, lines = measured(tmp_path, b, c, reference=a)
    found = {(one.metric, one.model): one for one in results}
    assert [(curve.metric, curve.model, curve.y) for curve in curves] == [
        ("best_of_n", a, "score"),
        ("best_of_n", a, "judge_score"),
        ("policies", a, "score"),
        ("policies", a, "judge_score"),
    ]
    for model in (b, c):
        own = [line for line in lines if line["model"] == model]
        assert [line["score"] for line in own] == letters([], [line["response"] for line in own])
        kl, score = found["kl_k1", model], found["judge_score", model]
        assert kl.group == f"against={a}"
        assert kl.value == pytest.approx(sum(line["k1"] for line in own) / 5)
        assert (kl.value, score.value, score.low, score.high, 5) in curves[3].points
    assert "rl" in curves[2].fits
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert {one.metric for one in (*results, *curves)} <= set(re.findall(r"`(\w+)`", page))


def test_the_kl_is_to_the_model_that_the_answers_come_from(models, tmp_path):
    a, b, _ = models
    *_, lines = measured(tmp_path, a, b)
    bench = Bench(models)
    policy, start = bench.policy(b), bench.policy(a)
    places = [("best of n", row.row, 0) for row in ROWS]
    drawn = policy.answer([row.written for row in ROWS], SAMPLING, policy.row_generators(42, places))
    own, other = (
        each.logprobs([one.prompt_ids for one in drawn], [one.ids for one in drawn], 0.8) for each in (policy, start)
    )
    expected = [kl_of_response(*pair)["k1"] for pair in zip(own, other, strict=True)]
    assert [line["k1"] for line in lines if line["model"] == b] == pytest.approx(expected, abs=1e-4)


def test_one_reward_alone_is_enough(models, tmp_path):
    results, curves, _ = measured(tmp_path, models[0], rewards=[letters])
    assert {one.metric for one in results} == {"best_of_n_score"}
    assert len(curves) == 1


def test_a_second_run_asks_nothing_again(models, tmp_path, monkeypatch):
    first = measured(tmp_path, *models[:2])
    monkeypatch.setattr("rlhf_lightning.evaluation.policy.Policy.answer", None)
    assert measured(tmp_path, *models[:2]) == first


def test_a_score_that_is_no_number_is_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"'?<lambda>'? gives row \d a score that is not finite"):
        measured(tmp_path, models[0], rewards=[lambda prompts, responses: [float("inf")] * len(prompts)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policies": []}, "best_of_n needs models"),
        ({"rewards": []}, "best_of_n needs rewards"),
        ({"sampling": Sampling(temperature=0.0)}, "set sampling.temperature above 0"),
        ({"rewards": [letters, "nonsense"]}, "is neither a reward model folder"),
    ],
)
def test_what_is_missing_is_said_at_once(options, said):
    with pytest.raises(UserError, match=said):
        BestOfN().check(Bench(**{"policies": ["a"], "rewards": [letters], **options}))


def test_counts_double_up_to_the_number_of_samples():
    assert [counts_up_to(n) for n in (1, 2, 3, 64)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16, 32, 64]]


def test_a_fit_counts_scores_from_that_of_the_start():
    points = [(d * d, 7 + d * (2 - 0.5 * d), None, None, 3) for d in (0.0, 1.0, 2.0, 3.0)]
    fit = fits_of(points, "best_of_n")["best_of_n"]
    assert fit == pytest.approx({"alpha": 2, "beta": 0.5, "r2": 1, "start": 7, "peak": 2})
    assert fits_of(points[:2], "rl") == {}
