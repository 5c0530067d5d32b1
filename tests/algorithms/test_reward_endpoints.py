"""Rewards that a service gives: a reward server and a chat model that rates, asked over real HTTP."""

from __future__ import annotations

import json
import socket
from functools import partial
from typing import Any

import pytest
import yaml
from torch.optim import AdamW

from helpers.judge_server import Said, chat, chat_server
from helpers.stages import (
    adamw,
    assert_close_weights,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    share_of_letters,
    trainer,
    weights,
)
from rlhf_lightning import OtherReward, PPOModule, PromptDataModule, RewardEndpoint, Sampling, UserError
from rlhf_lightning.algorithms.hyperparameters import as_config, from_config
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.cli.main import main
from rlhf_lightning.evaluation.judge import Judge

PROMPTS, ANSWERS, ROWS = ["a?", "b?", "c?"], ["one", "three", "fifteen"], [4, 5, 6]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def letters(body: dict[str, Any]) -> Said:
    """A reward server that counts as `share_of_letters` does."""
    return Said(json.dumps({"scores": share_of_letters(body["prompts"], body["responses"])}))


def rates(body: dict[str, Any]) -> Said:
    """A chat model that rates an answer by its length."""
    shown = body["messages"][-1]["content"]
    answer = shown.partition("--- answer ---\n")[2].partition("\n--- end of answer")[0]
    return chat(f"It has {len(answer)} letters: [[{len(answer)}]]")


def nothing(prompts, responses):
    return [0.0 for _ in responses]


def ask(endpoint: RewardEndpoint) -> list[float]:
    return endpoint(list(PROMPTS), list(ANSWERS), [[]] * 3, ROWS)


def nobody() -> str:
    """A URL that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/score"


# One request.


@pytest.mark.parametrize(("size", "requests"), [(64, 1), (2, 2), (1, 3)])
def test_a_reward_server_is_sent_every_row_once_and_in_order(size, requests):
    with chat_server(lambda body: Said(json.dumps({"scores": [len(r) for r in body["responses"]]}))) as server:
        assert ask(RewardEndpoint(f"{server.url}/score", batch_size=size)) == [3.0, 5.0, 7.0]
    assert {*server.paths} == {"/v1/score"}
    assert len(server.bodies) == requests
    sent = [pair for body in server.bodies for pair in zip(body["prompts"], body["responses"], strict=True)]
    assert sorted(sent) == [*zip(PROMPTS, ANSWERS, strict=True)]
    assert all({*body} == {"prompts", "responses"} for body in server.bodies)


def test_scores_stand_where_they_are_said_to():
    with chat_server(lambda body: Said(json.dumps({"data": {"rewards": [1, 2.5, -3]}}))) as server:
        assert ask(RewardEndpoint(server.url, scores_at="data.rewards")) == [1.0, 2.5, -3.0]


def test_a_chat_model_rates_each_answer():
    with chat_server(rates) as server:
        assert ask(RewardEndpoint(server.url, model="judge")) == [3.0, 5.0, 7.0]
    assert {*server.paths} == {"/v1/chat/completions"}
    assert len(server.bodies) == 3
    assert all(body["model"] == "judge" and body["temperature"] == 0 for body in server.bodies)
    with chat_server(lambda body: chat(" 4.5\n")) as server:
        assert ask(RewardEndpoint(server.url, model="judge", instructions="Rate it.")) == [4.5] * 3
    assert {body["messages"][0]["content"] for body in server.bodies} == {"Rate it."}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (Said("no JSON"), "a reply that holds no scores"),
        (Said('{"rewards": [1, 2, 3]}'), "a reply that holds no scores"),
        (Said('{"scores": [1, 2]}'), "scores is not a list of 3 numbers"),
        (Said('{"scores": [1, 2, NaN]}'), "scores holds what is no finite number"),
        (Said('{"scores": [1, 2, true]}'), "scores holds what is no finite number"),
        (Said('{"scores": [1, 2, 1' + 400 * "0" + "]}"), "scores holds what is no finite number"),
        (Said('{"scores": [1, 2, -1e39]}'), "scores holds what is no finite number"),
        (Said("", 500), "500 Internal Server Error"),
    ],
)
def test_what_is_no_score_ends_the_run_in_one_line(said, problem):
    with chat_server(lambda body: said) as server, pytest.raises(UserError) as error:
        ask(RewardEndpoint(server.url, retries=1, backoff=0.0))
    assert str(error.value) == (
        f"the reward at {server.url} gives no score for row 4: {problem}; the run ends here, and a checkpoint goes on "
        "from where it was written"
    )
    assert len(server.bodies) == (2 if said.code == 500 else 1)


def test_a_reply_without_a_rating_names_its_row():
    def mostly(body: dict[str, Any]) -> Said:
        return chat("[[3]] or [[4]]") if "three" in body["messages"][-1]["content"] else rates(body)

    with (
        chat_server(mostly) as server,
        pytest.raises(UserError, match=r"row 5: a reply without one rating in \[\[ \]\]"),
    ):
        ask(RewardEndpoint(server.url, model="judge"))


def test_a_rating_that_float32_does_not_hold_is_none():
    with (
        chat_server(lambda body: chat(f"[[4{39 * '0'}]]")) as server,
        pytest.raises(UserError, match=r"row 4: a reply without one rating in \[\[ \]\]"),
    ):
        ask(RewardEndpoint(server.url, model="judge"))
    with chat_server(lambda body: Said('{"scores": [3e38, -3e38, 0]}')) as server:
        assert ask(RewardEndpoint(server.url)) == [3e38, -3e38, 0.0]


def test_what_may_pass_is_asked_again():
    left = [Said("", 503), Said("", 429), Said('{"scores": [1, 2, 3]}')]
    with chat_server(lambda body: left.pop(0)) as server:
        assert ask(RewardEndpoint(server.url, backoff=0.0)) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("model", [None, "judge"])
def test_a_reply_that_breaks_off_is_asked_again(model):
    whole = chat("[[2]]") if model else Said('{"scores": [2, 2, 2]}')
    broken = whole._replace(body=whole.body[:12], headers={"Content-Length": str(len(whole.body))})
    left = [broken] if model else [broken, broken]
    with chat_server(lambda body: left.pop() if left else whole) as server:
        assert ask(RewardEndpoint(server.url, model, backoff=0.0)) == [2.0, 2.0, 2.0]
    with (
        chat_server(lambda body: broken) as server,
        pytest.raises(UserError, match=r"connection broke \(IncompleteRead"),
    ):
        ask(RewardEndpoint(server.url, model, retries=1, backoff=0.0))


def test_it_judges_outside_of_training_too():
    with chat_server(letters) as server:
        judge = Judge.load(RewardEndpoint(server.url))
        assert judge.scores([WrittenPrompt("a")] * 2, ["ab", "a1"]).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "nowhere"}, r"endpoint\.url 'nowhere' is none"),
        ({"url": "http://me:secret@host"}, r"endpoint\.url holds a name, a password or a query"),
        ({"url": "http://host", "api_key_variable": "NOT_SET_ANYWHERE"}, "the environment variable NOT_SET_ANYWHERE"),
        ({"url": "http://host", "instructions": "Rate."}, "are for a chat model"),
        ({"url": "http://host", "timeout": 0}, r"reward\.timeout \(0\) must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as error:
        OtherReward(settings)
    assert "secret" not in str(error.value)


# Whole runs.


def make(folder, others, reward=nothing, **settings):
    given = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    given |= {"lr_schedule": "constant", "warmup_steps": 0, "optimizer": adamw(1e-3), "micro_batch_size": 4}
    return PPOModule(folder, reward, other_rewards=others, **given | settings)


def data(module, iterations=2, **settings):
    rows, options = prompt_rows(8 * iterations), {"validation_split": 0.0, "max_prompt_length": 40}
    return PromptDataModule(module.model_name_or_path, rows, rollout_batch_size=8, **options | settings)


def run(module, iterations=2, data_options=None, **settings):
    disturb_random_numbers(0)
    return fit(module, data(module, iterations, **(data_options or {})), **settings)


def test_a_run_with_a_server_is_that_with_its_function(folder):
    alone = make(folder, {"letters": OtherReward(share_of_letters)})
    run(alone)
    with chat_server(letters) as server:
        asking = make(folder, {"letters": {"reward": {"url": server.url, "batch_size": 3}}})
        run(asking)
    assert same_weights(weights(alone.policy), weights(asking.policy))
    assert sum(len(body["responses"]) for body in server.bodies) == 16  # each once
    assert all("<|" not in text for body in server.bodies for text in (*body["prompts"], *body["responses"]))


def test_a_judge_that_is_only_logged_and_goes_down_changes_nothing_and_is_left_out(folder):
    alone = make(folder, None, share_of_letters)
    run(alone, 3)
    asked = []

    def fails_later(body: dict[str, Any]) -> Said:
        asked.append(body)
        return rates(body) if len(asked) <= 8 + 4 else Said("", 500)

    with chat_server(fails_later) as server:
        judge = {"reward": {"url": server.url, "model": "m", "retries": 0, "parallel": 1}, "weight": 0}
        module = make(folder, {"judge": judge}, share_of_letters)
        with pytest.warns(UserWarning, match="does not score all responses") as said:
            log = run(module, 3)
    assert_close_weights(weights(alone.policy), weights(module.policy), 0.0)
    assert len(log.series("train/score")) == 3
    # All of the first iteration, half of the second, none of the third.
    assert len(log.series("train/score_judge")) == 2
    assert all(value == value for call in log.calls for value in call.values())
    assert len([each for each in said if "does not score all" in str(each.message)]) == 1


def test_a_judge_that_is_down_leaves_validation_and_prediction_without_its_score(folder):
    judge = {"reward": {"url": nobody(), "retries": 0}, "weight": 0.0}
    module = make(folder, {"judge": judge}, share_of_letters)
    with pytest.warns(UserWarning, match=r"no connection"):
        log = run(module, 1, {"validation_data": prompt_rows(5), "eval_batch_size": 2}, val_check_interval=1)
    rows = trainer().predict(module, data(module, predict_data=prompt_rows(3)))[0]
    assert "val/score" in {name for call in log.calls for name in call}
    assert not [name for call in log.calls for name in call if name.endswith("score_judge")]
    assert [row["score_judge"] for row in rows] == [None] * 3
    assert all(row["score"] == row["score_main"] for row in rows)


def test_a_weighted_server_that_is_down_ends_the_run_which_goes_on_from_its_checkpoint(folder, tmp_path):
    whole = make(folder, {"letters": OtherReward(share_of_letters)})
    run(whole, 3)
    up = [True]
    with chat_server(lambda body: letters(body) if up[0] else Said("", 503)) as server:
        others = {"letters": {"reward": {"url": server.url, "retries": 1, "backoff": 0.0}}}
        first = make(folder, others)
        run(first, 3, max_steps=1)
        first.trainer.save_checkpoint(tmp_path / "one.ckpt")
        up[0] = False
        second = make(folder, others)
        with pytest.raises(
            UserError, match="503 Service Unavailable; the run ends here, and a checkpoint goes on from"
        ):
            run(second, 3, ckpt_path=str(tmp_path / "one.ckpt"))
        assert second.iteration == 1  # none is lost
        up[0] = True
        third = make(folder, others)
        run(third, 3, ckpt_path=str(tmp_path / "one.ckpt"))
    assert same_weights(weights(third.policy), weights(whole.policy))


def test_a_checkpoint_brings_the_service_back_that_is_the_main_reward(folder, tmp_path):
    with chat_server(letters) as server:
        module = make(folder, None, RewardEndpoint(server.url, batch_size=3), optimizer=partial(AdamW, lr=1e-3))
        run(module, 1)
        module.trainer.save_checkpoint(tmp_path / "one.ckpt")
        loaded = PPOModule.load_from_checkpoint(tmp_path / "one.ckpt")
        assert loaded.reward == module.reward
        rows = [trainer().predict(each, data(each, predict_data=prompt_rows(3)))[0] for each in (module, loaded)]
    assert rows[0] == rows[1]
    assert all(0 < row["score"] < 1 for row in rows[1])


@pytest.mark.parametrize("weights", [None, {"a": 1.0}])
def test_what_cannot_be_a_reward_is_refused(weights):
    with pytest.raises(UserError, match="reward is a dict: give the folder or hub id of a reward model, the import"):
        Judge.load({"url": "http://host"}, weights=weights)


def test_it_is_written_in_yaml_and_read_back(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlhf"])
    others = {"judge": {"reward": {"url": "http://localhost:1/v1", "model": "m", "timeout": 5}, "weight": 0}}
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "ppo.yaml", "--model.other_rewards", json.dumps(others), "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["other_rewards"]["judge"]
    assert printed["reward"]["model"] == "m"
    setting = OtherReward(**printed)
    assert setting.reward == RewardEndpoint("http://localhost:1/v1", "m", timeout=5)
    assert from_config(OtherReward, as_config(each=setting)["each"]) == setting
