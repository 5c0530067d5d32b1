"""Rewards that take the place of all others for the prompts of some sources (the safety rule of Llama 2)."""

import json

import pytest
import torch

from helpers.stages import adamw, disturb_random_numbers, fit, prompt_rows, save_llama, share_of_letters, trainer
from rlhf_lightning import Blend, PPOModule, PromptDataModule, RLOOModule, Sampling, ScoreShaping, Table, UserError
from rlhf_lightning.batches import Sources
from rlhf_lightning.models.other_rewards import OtherReward, total_scores

SOURCES = Sources(["data/help.jsonl", "data/safety.jsonl", "web"], torch.tensor([0, 0, 1, 1, 2]))
MAIN = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
SAFE = torch.tensor([-1.8, 2.0, 2.5, -3.0, -1.7])
"""Raw: of the first the logistic function is 0.142, of the fourth 0.047, of the fifth 0.154."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """Prompts with letters are about help, those of digits alone about safety."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in (("help", prompt_rows(12)), ("safety", [{"prompt": f"{i} {i * i}"} for i in range(12)])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Blend([Table(str(root / "help.jsonl")), Table(str(root / "safety.jsonl"))])


def five(prompts, responses):
    return [5.0 for _ in responses]


def by_source(prompts, responses):
    """7 for prompts about safety, 1 for others: what the rule would leave, told by the prompts themselves."""
    return [1.0 if any(map(str.isalpha, prompt)) else 7.0 for prompt in prompts]


def one(prompts, responses):
    return [1.0 for _ in responses]


def seven(prompts, responses):
    return [7.0 for _ in responses]


def combined(sources=SOURCES, **settings):
    setting = {"safe": OtherReward("f", **settings)}
    return total_scores(MAIN, {"safe": SAFE}, {"safe": SAFE}, setting, sources).tolist()


def test_the_rule_by_hand():
    assert combined(replaces_for=["safety"]) == [1.0, 2.0, 2.5, -3.0, 5.0]
    assert combined(replaces_for=["data/safety.jsonl"]) == [1.0, 2.0, 2.5, -3.0, 5.0]  # as the data name it
    assert combined(replaces_below=0.15) == pytest.approx([-1.8, 2.0, 3.0, -3.0, 5.0])
    assert combined(replaces_below=0.15, replaces_for=["safety"]) == pytest.approx([-1.8, 2.0, 2.5, -3.0, 5.0])
    assert combined(replaces_for=["help", "web"]) == pytest.approx([-1.8, 2.0, 3.0, 4.0, -1.7])
    assert combined(sources=None, replaces_for=["safety"]) == MAIN.tolist()


def test_of_two_that_replace_the_first_wins_and_the_others_are_added_elsewhere():
    settings = {
        "added": OtherReward("f", weight=10.0),
        "safe": OtherReward("f", replaces_for=["safety"]),
        "web": OtherReward("f", replaces_for=["web", "safety"]),
    }
    scores = {"added": torch.ones(5), "safe": SAFE, "web": torch.full((5,), 9.0)}
    assert total_scores(MAIN, scores, scores, settings, SOURCES).tolist() == [11.0, 12.0, 2.5, -3.0, 9.0]


def make(folder, other, kind=PPOModule, reward=one, **settings):
    given = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    given |= {"samples_per_prompt": 2, "minibatch_size": 16} if kind is RLOOModule else {}
    given |= {"score": ScoreShaping(scaling=False, clip=None), "other_rewards": {"safe": other} if other else None}
    return kind(folder, reward, optimizer=adamw(1e-3), **given | settings)


def prompts(module, data, **settings):
    options = {"validation_split": 0.0, "max_prompt_length": 40, "rollout_batch_size": 8} | settings
    return PromptDataModule(module.model_name_or_path, data, **options)


def run(module, data, **settings):
    disturb_random_numbers(0)
    return fit(module, prompts(module, data, **settings))


@pytest.mark.parametrize("kind", [PPOModule, RLOOModule])
def test_a_run_is_that_of_a_reward_which_tells_the_sources_apart_itself(folder, blend, kind):
    ruled = run(make(folder, {"reward": seven, "replaces_for": ["safety"]}, kind), blend)
    told = run(make(folder, None, kind, by_source), blend)
    assert ruled.series("train/score_from_safety") == [7.0] * 3
    assert ruled.series("train/score_from_help") == [1.0] * 3
    for name in ("score", "reward", "loss", "kl"):
        assert ruled.series(f"train/{name}") == told.series(f"train/{name}"), name


def test_validation_and_prediction_know_the_sources_too(folder, blend):
    other = {"reward": seven, "replaces_for": ["safety"]}
    module, told = make(folder, other), make(folder, None, reward=by_source)
    logs = [run(each, blend, validation_split=0.3) for each in (module, told)]
    assert logs[0].series("val/score") == logs[1].series("val/score") != []
    assert len({*logs[0].series("val/score")} - {1.0, 7.0}) == 1  # both kinds are among the held-out prompts
    rows, theirs = (trainer().predict(each, prompts(each, blend, validation_split=0.3))[0] for each in (module, told))
    assert [row["score"] for row in rows] == [row["score"] for row in theirs]


def test_validation_data_have_sources_of_their_own(folder, blend, tmp_path, recwarn):
    for name in ("safety", "web"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "of it"}\n')
    for name, score in (("safety", 7.0), ("web", 1.0)):
        module = make(folder, {"reward": seven, "replaces_for": ["safety"]})
        log = run(module, blend, validation_data=str(tmp_path / f"{name}.jsonl"))
        assert log.series("val/score") == [score] * len(log.series("val/score")) != []
    assert not [warning for warning in recwarn if "replaces_for" in str(warning.message)]


def test_prompts_without_a_source_are_said_once(folder, blend):
    module = make(folder, {"reward": seven, "replaces_for": ["safety"]})
    with pytest.warns(UserWarning, match="do not say which source they come from") as said:
        rows = trainer().predict(module, prompts(module, blend, predict_data=prompt_rows(6), eval_batch_size=2))
    assert len(rows) == 3
    assert {row["score"] for batch in rows for row in batch} == {1.0}
    assert len([warning for warning in said if "replaces_for" in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            ["safetys"],
            r"other_rewards\.safe\.replaces_for: 'safetys' is no source of the data, which are help, safety; ",
        ),
        (["help", "nothing"], r"'nothing' is no source of the data, which are help, safety$"),
    ],
)
def test_an_unknown_source_is_refused_before_models_are_loaded(folder, blend, named, message, monkeypatch):
    module = make(folder, {"reward": seven, "replaces_for": named})
    monkeypatch.setattr(module, "load_models", lambda: pytest.fail("models are loaded"))
    with pytest.raises(UserError, match=message) as error:
        run(module, blend)
    assert "\n" not in str(error.value)


def test_data_of_one_source_are_refused(folder):
    module = make(folder, {"reward": seven, "replaces_for": ["safety"]})
    with pytest.raises(UserError, match=r"^other_rewards\.safe\.replaces_for asks which source .* give an .*Blend"):
        run(module, prompt_rows(8))


def test_a_loader_whose_prompts_say_no_source_is_refused(folder):
    module = make(folder, {"reward": seven, "replaces_for": ["safety"]})
    data = prompts(module, prompt_rows(8))
    data.setup("fit")
    with pytest.raises(UserError, match="asks which source a prompt comes from"):
        trainer().fit(module, data.train_dataloader())


def test_without_the_rule_nothing_changes(folder, blend):
    """A reward that replaces nothing of these prompts leaves every number as it was."""
    never = {"reward": five, "replaces_below": 0.01}
    plain, ruled = make(folder, None, reward=share_of_letters), make(folder, never, reward=share_of_letters)
    logs = [run(module, blend) for module in (plain, ruled)]
    for name in ("score", "reward", "loss"):
        assert logs[0].series(f"train/{name}") == logs[1].series(f"train/{name}")


def test_a_source_goes_by_its_name_of_now(folder, blend):
    """Not by that under which its tokens were cached."""
    for name in ("safety", "harm"):
        sources = Blend([blend.sources[0], Table(blend.sources[1].path, name=name)])
        log = run(make(folder, {"reward": seven, "replaces_for": [name]}), sources)
        assert log.series(f"train/score_from_{name}") == [7.0] * 3
