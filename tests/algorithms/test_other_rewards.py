"""Rewards beside the main one: added by their weights, put in its place, or only logged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    share_of_letters,
    trainer,
    weights,
)
from rlhf_lightning import (
    Evaluate,
    OtherReward,
    PPOModule,
    PromptDataModule,
    RLOOModule,
    Sampling,
    ScoreShaping,
    UserError,
)
from rlhf_lightning.algorithms.lineage import lineage_of
from rlhf_lightning.models.other_rewards import total_scores
from rlhf_lightning.models.scorers import ModelScorer, TextScorer

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


@pytest.fixture(scope="module")
def foreign_reward(tmp_path_factory):
    """A reward model that reads characters."""
    root = tmp_path_factory.mktemp("foreign")
    vocab = {token: i for i, token in enumerate(["<end>", "<pad>", "<unk>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    base = save_llama(root / "llama", tokenizer=tokenizer)
    return save_reward_model(root / "reward", base, tokenizer)


def length(prompts, responses):
    return [float(len(response)) for response in responses]


def letters(prompts, responses):
    return share_of_letters(prompts, responses)


def nothing(prompts, responses):
    return [0.0 for _ in responses]


def make(folder, reward=share_of_letters, kind=PPOModule, **settings):
    given = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    return kind(folder, reward, **given | {"optimizer": adamw(1e-3)} | CONSTANT | settings)


def data(module, iterations=2, **settings):
    rows, size = prompt_rows(8 * iterations), module.rollout_batch_size
    options = {"validation_split": 0.0, "max_prompt_length": 40, "rollout_batch_size": size} | settings
    return PromptDataModule(module.model_name_or_path, rows, **options)


def run(module, iterations=2, **settings):
    disturb_random_numbers(0)
    return fit(module, data(module, iterations), **settings)


def by_hand(main, **others):
    """Combined scores of one response whose raw scores are those that count."""
    settings = {name: setting for name, (_, setting) in others.items()}
    scores = {name: torch.tensor([score]) for name, (score, _) in others.items()}
    return total_scores(torch.tensor([main]), scores, scores, settings).item()


def test_combined_scores_by_hand():
    half, minus, logged = (OtherReward("f", weight=weight) for weight in (0.5, -2.0, 0.0))
    assert by_hand(1.0, a=(4.0, half), b=(3.0, minus), c=(100.0, logged)) == 1 + 2 - 6
    # sigma(-1.8) is 0.142, sigma(-1.7) 0.154.
    safe = OtherReward("f", replaces_below=0.15)
    assert by_hand(1.0, a=(4.0, half), safe=(-1.75, safe)) == -1.75
    assert by_hand(1.0, a=(4.0, half), safe=(-1.7, safe)) == 3.0
    # Of two that would, the first.
    assert by_hand(1.0, safe=(-1.75, safe), other=(-9.0, safe)) == -1.75
    assert by_hand(1.0, safe=(5.0, safe), other=(-9.0, safe)) == -9.0


def test_the_probability_is_that_of_the_raw_score():
    setting = {"safe": OtherReward("f", replaces_below=0.15)}
    main, counted = torch.tensor([1.0, 1.0]), {"safe": torch.tensor([0.3, 0.4])}
    combined = total_scores(main, counted, {"safe": torch.tensor([-3.0, 3.0])}, setting)
    torch.testing.assert_close(combined, torch.tensor([0.3, 1.0]))


@pytest.mark.parametrize("kind", [PPOModule, RLOOModule])
def test_models_with_tokens_of_their_own_and_functions_are_added(folder, reward_folder, foreign_reward, kind):
    others = {
        "foreign": OtherReward(foreign_reward, weight=0.5),
        "length": OtherReward(length, weight=0.1),
        "judge": OtherReward(share_of_letters, weight=0.0),
    }
    options = {"samples_per_prompt": 2, "minibatch_size": 16} if kind is RLOOModule else {}
    module = make(folder, reward_folder, kind, other_rewards=others, **options)
    log = run(module)
    scorers = module.other_scorers.by_name()
    assert [*scorers] == [*others]
    assert isinstance(scorers["foreign"], TextScorer)
    assert isinstance(module.scorer, ModelScorer)
    part = {name: torch.tensor(log.series(f"train/score_{name}")) for name in ("main", *others)}
    expected = part["main"] + 0.5 * part["foreign"] + 0.1 * part["length"]
    torch.testing.assert_close(torch.tensor(log.series("train/score")), expected, atol=1e-5, rtol=1e-5)
    assert part["judge"].min() > 0
    assert "raw_score" not in log.names("train")


def test_one_reward_may_be_written_as_two(folder):
    """Half of a score and the other half of it are that score, bit for bit in what is trained."""
    whole = make(folder)
    halves = make(folder, nothing, other_rewards={"a": {"reward": share_of_letters, "weight": 0.5},
                                                  "b": {"reward": share_of_letters, "weight": 0.5}})  # fmt: skip
    run(whole)
    run(halves)
    assert same_weights(weights(whole.policy), weights(halves.policy))
    assert same_weights(weights(whole.value), weights(halves.value))


def test_a_judge_that_is_only_logged_changes_nothing(folder):
    alone, judged = make(folder), make(folder, other_rewards={"judge": OtherReward(length, weight=0)})
    run(alone)
    log = run(judged)
    assert same_weights(weights(alone.policy), weights(judged.policy))
    assert len(log.series("train/score_judge")) == 2


def test_scores_are_scaled_by_all_scores_of_their_own_reward_and_then_clipped(folder):
    settings = {"reward": length, "scaling": True, "clip": 0.5}
    module = make(folder, nothing, other_rewards={"length": settings}, score=ScoreShaping(scaling=False, clip=None))
    seen = []
    combined = module.combined

    def listening(measured, sources):
        made = combined(measured, sources)
        seen.append((measured.others["length"], made.scores))
        return made

    module.combined = listening
    run(module)
    lengths = torch.cat([raw for raw, _ in seen]).double()
    for number, (raw, counted) in enumerate(seen):
        so_far = lengths[: 8 * (number + 1)]
        expected = ((raw.double() - so_far.mean()) / so_far.std(correction=0)).clamp(-0.5, 0.5)
        torch.testing.assert_close(counted.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_goes_on_with_the_scale_of_each_reward(folder, tmp_path):
    def fresh():
        return make(folder, other_rewards={"length": {"reward": length, "scaling": True}})

    whole, half, resumed = fresh(), fresh(), fresh()
    run(whole, 3)
    run(half, 3, max_steps=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    run(resumed, 3, ckpt_path=str(tmp_path / "half.ckpt"))
    assert same_weights(weights(resumed.policy), weights(whole.policy))
    assert resumed.run_state()["part_moments"] == whole.run_state()["part_moments"]


def test_validation_and_prediction_tell_every_score(folder, reward_folder):
    module = make(folder, reward_folder, other_rewards={"length": OtherReward(length, weight=0.5)})
    log = fit(module, data(module, validation_data=prompt_rows(5), eval_batch_size=2), val_check_interval=1)
    names = ("score", "score_main", "score_length")
    score, main, others = (torch.tensor(log.series(f"val/{name}")) for name in names)
    torch.testing.assert_close(score, main + 0.5 * others, atol=1e-5, rtol=1e-5)
    rows = trainer().predict(module, data(module, predict_data=prompt_rows(3)))[0]
    for row in rows:
        assert row["score"] == pytest.approx(row["score_main"] + 0.5 * row["score_length"], abs=1e-5)
        assert row["score_length"] >= len(row["response"]) > 0  # which is told without its spaces


def test_reward_models_beside_the_main_one_stay_out_of_checkpoints_and_never_change(folder, reward_folder, tmp_path):
    module = make(folder, share_of_letters, other_rewards={"model": OtherReward(reward_folder)})
    run(module, 1)
    scorer = module.other_scorers.by_name()["model"]
    before = make(folder, reward_folder)
    before.configure_model()
    assert same_weights(weights(scorer.model), weights(before.scorer.model))
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if name.startswith("other_scorers")]
    assert module.parents["reward model"] == reward_folder


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"main": {"reward": length}}, r"'main' cannot be the name of a reward"),
        ({"a b": {"reward": length}}, r"'a b' cannot be the name of a reward"),
        ({"a": {"reward": "nowhere"}}, r"reward 'nowhere' is neither a reward model folder nor the import path"),
        ({"a": {"reward": length, "replaces_below": 0.1, "weight": 2.0}}, r"other_rewards\.weight \(2\.0\) must be 1"),
        ({"a": {"reward": length, "replaces_below": 1.0}}, r"other_rewards\.replaces_below \(1\.0\) must be above 0"),
        (
            {"a": {"reward": length, "replaces_for": ["x"], "weight": 0.0}},
            r"weight \(0\.0\) must be 1 beside replaces_for",
        ),
        ({"a": {"reward": length, "replaces_for": []}}, r"other_rewards\.replaces_for names no source"),
        ({"a": {"reward": length, "replaces_for": "x"}}, r"other_rewards\.replaces_for \('x'\) must be a list"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(folder, others, message):
    with pytest.raises(UserError, match=message) as error:
        make(folder, other_rewards=others)
    assert "\n" not in str(error.value)


def test_the_time_limit_is_for_functions_wherever_they_stand(folder, reward_folder):
    make(folder, reward_folder, other_rewards={"judge": OtherReward(length)}, reward_timeout=60.0)
    with pytest.raises(UserError, match="reward_timeout is a limit for functions"):
        make(folder, reward_folder, other_rewards={"more": OtherReward(reward_folder)}, reward_timeout=60.0)


def test_a_resumed_run_refuses_other_weights_of_a_reward_beside_the_main_one(folder, reward_folder, tmp_path):
    def fresh(reward):
        return make(folder, other_rewards={"model": OtherReward(reward)})

    first = fresh(reward_folder)
    run(first, 2, max_steps=1)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    changed = Path(shutil.copytree(reward_folder, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    save_file({**tensors, "score.weight": 2 * tensors["score.weight"]}, changed / "model.safetensors", {"format": "pt"})
    config = json.loads((changed / "config.json").read_text())
    config["reward_calibration"] = None
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^the checkpoint was made with the reward model "):
        run(fresh(str(changed)), 2, ckpt_path=str(tmp_path / "half.ckpt"))


def test_the_record_of_an_export_names_every_reward(folder, reward_folder):
    module = make(folder, other_rewards={"model": OtherReward(reward_folder), "length": OtherReward(length)})
    run(module, 1)
    record = lineage_of(module)
    assert record["models"]["reward model"]["name"] == reward_folder
    assert record["reward_function"].endswith("share_of_letters")
    assert record["reward_function length"].endswith("test_other_rewards.length")


def test_a_held_out_judge_is_compared_with_the_score_that_is_trained_on(folder):
    """The weighted sum: here twice the share of letters."""
    evaluate = Evaluate(share_of_letters, prompts=["bake bread", "small salt", "water"])
    module = make(folder, letters, other_rewards={"again": OtherReward(letters)})
    run(module, 1, callbacks=[evaluate])
    assert evaluate.points
    for judged in evaluate.points:
        assert judged.proxy_score == pytest.approx(2 * judged.score, rel=1e-5)
        assert judged.score > 0
