"""A suite ends the same whether it was stopped or not, and refuses in one line before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.cli_runs import save_model, save_pairs
from helpers.judge_server import chat, chat_server
from helpers.stages import save_reward_model, share_of_letters
from rlhf_lightning.chat.endpoint import Endpoint
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.results import Evaluation
from rlhf_lightning.evaluation.suite import evaluate, plain
from rlhf_lightning.evaluation.winrate import WinRate
from rlhf_lightning.generation.sampling import Sampling


class Stopped(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    models = [str(save_model(folder / name, seed=seed)) for seed, name in enumerate("ab")]
    return {
        "data": str(save_pairs(folder / "pairs.jsonl", 12)),
        "models": models,
        "reference": models[0],
        "rewards": [save_reward_model(folder / "reward", models[0])],
        "part": "all",
    }


def run(inputs, out, **options):
    settings = {"sampling": Sampling(max_new_tokens=4), "batch_size": 4, "max_tokens": 200}
    return evaluate(**inputs | {"out": str(out)} | settings | options)


def stop_after(pieces):
    """A report that stops a run in the middle."""
    left = iter(range(pieces))

    def told(done):
        if done and next(left, None) is None:
            raise Stopped

    return lambda what, total: told


TASKS = ["perplexity", "rouge", "reward", "kl"]


def test_what_was_stopped_ends_as_what_was_not(inputs, tmp_path):
    whole = run(inputs, tmp_path / "whole", tasks=TASKS)
    for pieces in (2, 5, 9, 14):
        with pytest.raises(Stopped):
            run(inputs, tmp_path / "stopped", tasks=TASKS, report=stop_after(pieces))
    seen = []
    resumed = run(
        inputs, tmp_path / "stopped", tasks=TASKS, report=lambda what, total: seen.append(what) or (lambda done: None)
    )
    assert resumed.results == whole.results
    assert resumed.curves == whole.curves
    lines = [(tmp_path / name / "evaluation.jsonl").read_text() for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) == 12 * 7
    assert Evaluation.read(tmp_path / "stopped") == resumed
    assert {one.metric for one in resumed.results} >= {"perplexity", "rouge_l", "reward_accuracy", "kl_k1"}


def test_nothing_is_asked_again_and_what_is_new_is(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path, tasks=["perplexity"])
    before = (tmp_path / "evaluation.jsonl").read_text()
    asked = []
    monkeypatch.setattr("rlhf_lightning.evaluation.policy.Policy.logprobs", lambda *args, **kw: asked.append(args))
    run(inputs, tmp_path, tasks=["perplexity"])
    assert (asked, (tmp_path / "evaluation.jsonl").read_text()) == ([], before)
    monkeypatch.undo()
    for setting in ({"seed": 7}, {"sampling": Sampling(max_new_tokens=5)}):
        options = inputs | setting
        first = run(options | {"models": inputs["models"][1:]}, tmp_path / "kl", tasks=["kl"])
        assert first.settings["seed"] == options.get("seed", 42)


def test_a_model_that_was_trained_again_is_asked_again(inputs, tmp_path):
    folder = save_model(tmp_path / "model", seed=0)
    own = inputs | {"models": [str(folder)], "tasks": ["perplexity"]}
    first = run(own, tmp_path / "out")
    save_model(folder, seed=3)
    second = run(own, tmp_path / "out")
    assert second.results[0].value != first.results[0].value
    assert len((tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()) == 12


def test_rows_that_say_something_else_are_asked_again(inputs, tmp_path):
    data = save_pairs(tmp_path / "pairs.jsonl", 12)
    own = inputs | {"data": str(data), "tasks": ["perplexity"], "models": inputs["models"][:1]}
    run(own, tmp_path / "out")
    data.write_text(data.read_text().replace("bake bread", "paint a wall"))
    second = run(own, tmp_path / "out")
    assert second.results == run(own, tmp_path / "anew").results
    assert (tmp_path / "out" / "evaluation.jsonl").read_text() == (tmp_path / "anew" / "evaluation.jsonl").read_text()


def test_what_is_measured_follows_from_what_is_given(inputs, tmp_path):
    only_models = inputs | {"rewards": None, "reference": None}
    assert {one.metric for one in run(only_models, tmp_path / "a").results} == {
        *("perplexity", "nll_per_token", "bits_per_byte")
    }
    only_rewards = inputs | {"models": None, "reference": None, "rewards": [share_of_letters]}
    found = run(only_rewards, tmp_path / "b")
    assert {one.model for one in found.results} == {"share_of_letters"}
    assert found.settings["rewards"] == ["share_of_letters"]
    assert "kl" not in found.settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"tasks": ["perplexty"]},
            "tasks: 'perplexty' is unknown; did you mean perplexity? there are perplexity, rouge",
        ),
        ({"models": ["./nowhere"]}, "model folder './nowhere' does not exist"),
        ({"reference": "./nowhere"}, "model folder './nowhere' does not exist"),
        ({"rewards": ["./nowhere"]}, "model folder './nowhere' does not exist"),
        ({"models": None, "rewards": None}, "there is nothing to measure; name language models with --models"),
        ({"models": None, "tasks": ["perplexity"]}, "perplexity needs models"),
        ({"rewards": None, "tasks": ["reward"]}, "reward needs rewards"),
        ({"reference": None, "tasks": ["kl"]}, "kl compares models with another; name it with --reference"),
        ({"sampling": Sampling(temperature=0), "tasks": ["kl"]}, "set sampling.temperature above 0"),
        ({"num_samples": 0}, "num_samples (0) must be at least 1"),
        ({"part": "test"}, "has no test split, and test_split is 0"),
        ({"sampling": Sampling(max_new_tokens=500), "tasks": ["kl"]}, "leave no room for a prompt"),
    ],
)
def test_bad_input_is_named_in_one_line(inputs, tmp_path, options, said):
    with pytest.raises(UserError) as error:
        run(inputs, tmp_path / "out", **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_models_of_the_wrong_kind_are_named(inputs, tmp_path):
    with pytest.raises(UserError, match="has no trained reward head"):
        run(inputs | {"rewards": inputs["models"]}, tmp_path)
    with pytest.raises(UserError, match=r"is a reward model .* a language model is needed"):
        run(inputs | {"models": inputs["rewards"], "rewards": None}, tmp_path)


def test_an_empty_file_is_named(inputs, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows"):
        run(inputs | {"data": str(tmp_path / "empty.jsonl")}, tmp_path / "out")


def test_settings_are_said_as_json_can_hold_them():
    said = plain({"sampling": Sampling(top_k=3), "rewards": [share_of_letters], "out": (1, None, 0.5)})
    assert json.loads(json.dumps(said))["sampling"]["top_k"] == 3
    assert (said["rewards"], said["out"]) == (["share_of_letters"], [1, None, 0.5])


def test_an_endpoint_is_not_asked_again_for_what_it_has_said(inputs, tmp_path):
    with chat_server(lambda body: chat("[[A]]")) as server:
        task = WinRate(endpoint=Endpoint(server.url, "m"))
        for asked in (24, 0):
            run(inputs, tmp_path, tasks=["winrate"], winrate=task)
            assert len(server.bodies) == asked
            server.bodies.clear()


def test_a_function_that_was_written_anew_is_asked_anew(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 22):
        Path("own_rewards.py").write_text(
            f"def constant(prompts, responses):\n    return [{number}.0] * len(prompts)\n"
        )
        run(inputs, tmp_path / "out", tasks=["reward"], rewards=["own_rewards.constant"])
        lines = (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()
        assert {score for line in lines for score in json.loads(line)["scores"]} == {number}
        del sys.modules["own_rewards"]
