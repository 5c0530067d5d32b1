"""A policy learns from the weighed labels of public classifiers, as from a reward model of one label."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers.classifiers import ATTRIBUTES, WEIGHTS, named, save_encoder
from helpers.models import save_folder
from helpers.planned import arguments, planned, save_models
from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import Evaluate, OtherReward, PPOModule, PromptDataModule, RLOOModule, Sampling, UserError
from rlhf_lightning.cli.main import main
from rlhf_lightning.evaluation.suite import evaluate
from rlhf_lightning.models.classifiers import Classifier
from rlhf_lightning.models.labels import fold_head
from rlhf_lightning.models.scalar_lm import load_reward_model
from rlhf_lightning.models.scorers import ModelScorer

BY_ORDER = [0.65, 0.8, 0.0, 0.0, -0.4]
CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A policy; a decoder of five attributes on it, and the same with one label that weighs them; an encoder."""
    root = tmp_path_factory.mktemp("folders")
    policy = save_llama(root / "policy")
    torch.manual_seed(1)
    model: Any = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=5, **named(ATTRIBUTES))
    torch.nn.init.normal_(model.score.weight)
    attributes = save_folder(root / "attributes", model, tiny_tokenizer())
    model.score, model.config.num_labels = fold_head(model.score, BY_ORDER), 1
    return {
        "policy": policy,
        "attributes": attributes,
        "weighed": save_folder(root / "weighed", model, tiny_tokenizer()),
        "encoder": save_encoder(root / "encoder", num_labels=2, **named(["bad", "good"])),
    }


def make(folders: dict[str, str], reward: str, kind: Any = PPOModule, **settings: Any) -> Any:
    given = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    return kind(folders["policy"], folders[reward], **given | {"optimizer": adamw(1e-3)} | CONSTANT | settings)


def run(module: Any, **settings: Any) -> Any:
    disturb_random_numbers(0)
    data = PromptDataModule(module.model_name_or_path, prompt_rows(18), rollout_batch_size=8, max_prompt_length=24)
    return fit(module, data, max_steps=2, limit_val_batches=1, **settings)


def test_attributes_are_learnt_from_as_their_weighed_sum(folders):
    several, one = make(folders, "attributes", reward_weights=WEIGHTS), make(folders, "weighed")
    logs = [run(module) for module in (several, one)]
    assert isinstance(several.scorer, ModelScorer)
    assert logs[0].series("train/score") == logs[1].series("train/score")
    assert same_weights(weights(several.policy), weights(one.policy))
    assert same_weights(weights(several.value), weights(one.value))
    assert several.hparams.reward_weights == WEIGHTS


def test_a_value_model_that_is_named_is_weighed_as_the_reward_that_it_is(folders, tmp_path):
    named_too = make(folders, "attributes", reward_weights=WEIGHTS, value_name_or_path=folders["attributes"])
    alone = make(folders, "attributes", reward_weights=WEIGHTS)
    logs = [run(module) for module in (named_too, alone)]
    assert same_weights(weights(named_too.value), weights(alone.value))
    assert logs[0].series("train/value_loss") == logs[1].series("train/value_loss")
    named_too.trainer.save_checkpoint(tmp_path / "one.ckpt")
    main(["export", str(tmp_path / "one.ckpt"), "--out", str(tmp_path / "value"), "--part", "value"])
    exported = load_reward_model(tmp_path / "value")
    ids = torch.tensor([[5, 6, 7, 2]])
    torch.testing.assert_close(exported.scores(ids, ids > 0), named_too.value.scores(ids, ids > 0))


def test_a_value_model_of_several_labels_is_refused_where_it_is_not_the_reward(folders):
    with pytest.raises(UserError, match="is a classifier with 5 labels, and a value model has one: name one of one"):
        make(folders, "weighed", value_name_or_path=folders["attributes"])


def test_an_encoder_scores_and_another_model_s_attribute_is_logged_beside_it(folders):
    other = OtherReward(folders["attributes"], weight=0.0, reward_weights={"verbosity": 1.0})
    module = make(folders, "encoder", reward_weights={"good": 1, "bad": -1}, other_rewards={"verbosity": other})
    log = run(module)
    assert isinstance(module.scorer.model, Classifier)
    assert log.series("train/score") == log.series("train/score_main")
    assert log.series("train/score_verbosity") != log.series("train/score")
    assert not any(p.requires_grad for p in module.scorer.parameters())


def test_labels_without_weights_are_refused_with_the_stage_and_beside_it(folders):
    with pytest.raises(UserError, match=r"5 labels \(helpfulness, correctness"):
        make(folders, "attributes")
    with pytest.raises(UserError, match=r"2 labels \(bad, good\)"):
        make(folders, "weighed", other_rewards={"mood": OtherReward(folders["encoder"])})
    with pytest.raises(UserError, match=r"no label 'great'; its labels are bad, good"):
        make(folders, "encoder", RLOOModule, reward_weights={"great": 1.0})


def test_a_judge_that_weighs_the_reward_s_labels_otherwise_is_another_judge(folders):
    module = make(folders, "attributes", reward_weights=WEIGHTS)
    with pytest.raises(UserError, match="is the reward that training uses"):
        run(module, callbacks=[Evaluate(folders["attributes"], judge_weights=WEIGHTS)])
    judge = Evaluate(folders["attributes"], num_prompts=2, judge_weights={"verbosity": 1.0})
    assert run(make(folders, "attributes", reward_weights=WEIGHTS), callbacks=[judge]).series("judge/score")


@pytest.mark.parametrize("reward", ["encoder", "attributes"])
def test_they_are_planned_like_other_rewards(tmp_path, folders, reward):
    lm, ordinary = save_models(tmp_path)
    given = {"reward_weights": {"1": 1.0}}
    found = planned("ppo", arguments("ppo", lm, folders[reward], **given))
    usual = planned("ppo", arguments("ppo", lm, ordinary))
    assert {role.name for role in found.roles} == {role.name for role in usual.roles}
    parts = {part.name for part in found.parts}
    assert parts == {part.name for part in usual.parts}


def test_the_command_line_takes_weights_by_name_and_by_number(folders, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "bake bread", "response": "yeast and salt"}) + "\n")
    found = []
    for weighed in ("{good: 2.0}", "{1: 2.0}", "{good: 1.0}"):
        main(["score", folders["encoder"], "--file", str(file), "--reward_weights", weighed])
        found.append(json.loads(capsys.readouterr().out.splitlines()[0])["score"])
    assert found[0] == found[1] == pytest.approx(2 * found[2])


def test_rows_are_measured_anew_by_other_weights(folders, tmp_path):
    rows = [{"prompt": "bake", "chosen": "yeast and salt", "rejected": f"water {word}"} for word in ("a", "b", "c")]
    file, out, name = tmp_path / "pairs.jsonl", tmp_path / "out", folders["encoder"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracies = []
    for weight in (1.0, -1.0, 1.0):
        options: Any = {"part": "all", "out": out, "reward_weights": {name: {"good": weight}}}
        found = evaluate(str(file), rewards=[name], **options)
        accuracies.append(next(one.value for one in found.results if one.metric == "reward_accuracy"))
    assert accuracies[0] == accuracies[2] == 1 - accuracies[1]
    with pytest.raises(UserError, match="reward_weights names 'other', which is none of the rewards"):
        evaluate(str(file), rewards=[folders["weighed"]], out=out, reward_weights={"other": {"good": 1.0}})
