"""Win rates count what was judged, and nothing else; what was judged is not judged again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cli_runs import save_model
from helpers.judge_server import ChatServer, Said, chat, chat_server
from helpers.stages import prompt_rows, save_reward_model
from rlhf_lightning.chat.endpoint import Endpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import Judge
from rlhf_lightning.evaluation.comparing import Verdict
from rlhf_lightning.evaluation.results import Lines, Result
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.evaluation.task import Bench
from rlhf_lightning.evaluation.winrate import Compared, WinRate, ranking, results_of_pair
from rlhf_lightning.functional import bradley_terry, length_controlled_win_rate
from rlhf_lightning.generation.sampling import Sampling

ROWS = read_rows(prompt_rows(7), "prompts")
SAMPLING = Sampling(max_new_tokens=6)


def number_of_letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(map(str.isalpha, response))) for response in responses]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_model(folder / name, seed=seed)) for seed, name in enumerate("abc")]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def measured(models: list[str], out: Any, task: WinRate, **options: Any) -> dict[tuple[str, str, str], Result]:
    options = {"rewards": [number_of_letters], **options}
    bench = Bench(models, sampling=SAMPLING, batch_size=4, **options)
    task.check(bench)
    lines = Lines(out)
    results, _ = task.run(ROWS, bench, lines)
    lines.finish()
    return {(one.metric, one.model, one.group): one for one in results}


def answers(out: Any, model: str) -> list[str]:
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    return [line["response"] for line in lines if line["model"] == model]


def test_the_win_rate_is_that_of_the_scores(models, tmp_path):
    found = measured(models[:2], tmp_path, WinRate())
    mine, theirs = (number_of_letters([], answers(tmp_path, model)) for model in (models[1], models[0]))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(mine, theirs, strict=True)]
    group = f"against={models[0]}"
    assert len(set(wins)) > 1
    assert found["win_rate", models[1], group].value == pytest.approx(sum(wins) / 7)
    assert found["tie_rate", models[1], group].value == pytest.approx(wins.count(0.5) / 7)
    assert found["unjudged", models[1], group].value == 0
    lengths = [[len(text) for text in answers(tmp_path, model)] for model in (models[1], models[0])]
    controlled = length_controlled_win_rate(torch.tensor(wins), *map(torch.tensor, lengths))
    one = found["win_rate_length_controlled", models[1], group]
    assert one.value == pytest.approx(controlled)
    assert one.low <= one.value <= one.high
    assert {model for _, model, _ in found} == {models[1]}


def test_a_reward_model_judges_what_it_is_shown(models, tmp_path):
    reward = save_reward_model(tmp_path / "reward", models[0])
    found = measured(models[:2], tmp_path, WinRate(judge=reward))
    scores = [Judge.load(reward).scores([row.written for row in ROWS], answers(tmp_path, m)) for m in models[:2]]
    wins = (scores[1] > scores[0]).float().mean()  # all answers ended or were cut alike in both
    assert found["win_rate", models[1], f"against={models[0]}"].value == pytest.approx(float(wins), abs=1 / 7 + 1e-6)


def test_all_pairs_are_compared_and_ranked(models, tmp_path):
    found = measured(models, tmp_path, WinRate())
    a, b, c = models
    pairs = {(model, group) for metric, model, group in found if metric == "win_rate"}
    assert pairs == {(b, f"against={a}"), (c, f"against={a}"), (c, f"against={b}")}
    strengths = [found["strength", model, "all"] for model in models]
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert {metric for metric, *_ in found} <= set(re.findall(r"`(\w+)`", page))
    assert sum(one.value for one in strengths) == pytest.approx(0, abs=1e-9)
    assert all(one.low <= one.value <= one.high for one in strengths)


def test_one_model_may_be_what_the_others_are_compared_with(models, tmp_path):
    a, b, c = models
    found = measured(models, tmp_path, WinRate(against=b))
    pairs = {(model, group) for metric, model, group in found if metric == "win_rate"}
    assert pairs == {(a, f"against={b}"), (c, f"against={b}")}


def test_strengths_are_those_of_the_wins():
    wins = [1.0, 1.0, 0.5, None, 0.0, 1.0]
    compared = [Compared("b", "a", [Verdict(win) for win in wins]), Compared("c", "b", [Verdict(0.5)] * 6)]
    found = ranking(["a", "b", "c"], compared, seed=0)
    table = torch.tensor([[0.0, 1.5, 0.0], [3.5, 0.0, 3.0], [0.0, 3.0, 0.0]])
    assert [one.value for one in found] == pytest.approx(bradley_terry(table).tolist())
    assert [one.model for one in found] == ["a", "b", "c"]
    assert {one.count for one in found} == {6}
    nobody = [*wins[:-1], None]
    compared = [
        Compared("b", "a", [Verdict(win) for win in nobody]),
        Compared("c", "b", [Verdict(0.5)] * 5 + [Verdict(None)]),
    ]
    assert {one.count for one in ranking(["a", "b", "c"], compared, seed=0)} == {5}


def test_what_was_not_judged_counts_for_nothing_but_itself(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("rlhf_lightning.evaluation.winrate.rank_zero_warn", said.append)
    verdicts = [Verdict(1.0, True), Verdict(0.5, False), *[Verdict(None, problem="429 Too Many Requests")] * 2]
    found = {one.metric: one for one in results_of_pair(Compared("b", "a", verdicts), [1, 2, 3, 4], [4, 3, 2, 1], 0)}
    assert (found["win_rate"].value, found["win_rate"].count) == (0.75, 2)
    assert (found["unjudged"].value, found["unjudged"].count) == (0.5, 4)
    assert (found["position_consistency"].value, found["position_consistency"].count) == (0.5, 2)
    assert said == ["b against a: 2 of 4 rows are unjudged and count for neither (2 429 Too Many Requests)"]


def test_a_judge_that_says_nothing_is_an_error():
    verdicts = [Verdict(None, problem="no connection"), Verdict(None, problem="a reply without a verdict")]
    with pytest.raises(UserError, match=r"none of the 2 rows of b against a could be judged \(1 no connection, 1 a"):
        results_of_pair(Compared("b", "a", verdicts), [1, 2], [1, 2], 0)


def judged(server: ChatServer) -> list[str]:
    return [re.search("--- request ---\n(.*?)\n---", b["messages"][1]["content"], re.S)[1] for b in server.bodies]


def test_an_endpoint_is_asked_both_ways_and_only_for_what_it_has_not_said(models, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.evaluation.winrate._AT_ONCE", 2)
    broken = {"0: happy", ROWS[0].written.text, ROWS[5].written.text}

    def answer(body: dict[str, Any]) -> Said:
        text = body["messages"][1]["content"]
        if any(f"--- request ---\n{prompt}\n" in text for prompt in broken):
            return Said("", 400)
        return chat("[[A]]")

    with chat_server(answer) as server:
        task = WinRate(endpoint=Endpoint(server.url, "m", backoff=0.0), against=models[0])
        with pytest.warns(UserWarning, match=r"2 of 7 rows are unjudged .*\(2 400 Bad Request\)"):
            found = measured(models[:2], tmp_path, task, rewards=[])
        group = f"against={models[0]}"
        assert (found["win_rate", models[1], group].value, found["win_rate", models[1], group].count) == (0.5, 5)
        assert found["position_consistency", models[1], group].value == 0
        assert sorted(judged(server)) == sorted(2 * [row.written.text for row in ROWS])

        broken.clear()
        server.bodies.clear()
        found = measured(models[:2], tmp_path, task, rewards=[])
        assert found["win_rate", models[1], group].count == 7
        assert sorted(judged(server)) == sorted(2 * [ROWS[0].written.text, ROWS[5].written.text])

        server.bodies.clear()
        assert measured(models[:2], tmp_path, task, rewards=[]) == found
        assert server.bodies == []


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ({}, {"models": ["a", "a"]}, "name two or more with --models"),
        ({"against": "z"}, {}, r"winrate.against 'z' is none of the models \(a, b\)"),
        ({}, {"rewards": []}, "winrate needs a judge"),
        ({"judge": "nonsense"}, {}, "is neither a reward model folder nor the import path"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(task, options, said):
    bench = Bench(options.get("models", ["a", "b"]), rewards=options.get("rewards", [number_of_letters]))
    with pytest.raises(UserError, match=said):
        WinRate(**task).check(bench)


def test_two_kinds_of_judges_are_refused():
    with pytest.raises(UserError, match="both judge; give one of them"):
        WinRate(judge="x.y", endpoint=Endpoint("http://127.0.0.1:1/v1", "m"))
