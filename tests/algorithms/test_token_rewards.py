"""Rewards of tokens: a function that scores each, or a reward model's score along the response."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import table_lm, table_scalar, table_tokenizer
from helpers.stages import (
    adamw,
    assert_close_weights,
    disturb_random_numbers,
    fit,
    prompt_rows,
    save_gpt2,
    save_llama,
    save_reward_model,
    trainer,
    weights,
)
from helpers.templates import single_bytes
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    KLPenalty,
    Objective,
    OtherReward,
    PPOModule,
    PromptDataModule,
    RLOOModule,
    Sampling,
    ScoreShaping,
    UserError,
)
from rlhf_lightning.algorithms.online.combining import RewardCombination
from rlhf_lightning.algorithms.online.experience import Measurements
from rlhf_lightning.algorithms.online.rollout import measure, raw_score
from rlhf_lightning.algorithms.online.sharing import Piece
from rlhf_lightning.algorithms.ppo import build_experience
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.text_so_far import decode_response
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.functional import kl_shaped_rewards
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.models.reward_functions import ScoringFunction
from rlhf_lightning.models.scalar_lm import Calibration
from rlhf_lightning.models.scorers import FunctionScorer, ModelScorer, warn_without_steps
from rlhf_lightning.models.token_rewards import TokenRewards, step_ends

EOS = 3
UNIFORM = [[0.25] * 4] * 4
SCORES = [7.0, 1.0, 3.0, 4.0]
"""Of a response that ends in `_`, `a`, `b` and the EOS."""
PROMPTS = PromptBatch(
    prompt_ids=torch.tensor([[0, 1], [1, 2]]),
    prompt_mask=torch.tensor([[False, True], [True, True]]),
    prompts=["a", "ab"],
    row_ids=torch.tensor([10, 11]),
)
# `aba` and the EOS after the first prompt, an EOS alone after the second.
GENERATION = Generation(
    response_ids=torch.tensor([[1, 2, 1, EOS], [EOS, 0, 0, 0]]),
    response_mask=torch.tensor([[True] * 4, [True, False, False, False]]),
    ended=torch.tensor([True, True]),
)
PLAIN = ScoreShaping(scaling=False, clip=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def even(prompts, responses, token_ids):
    """A reward of each token."""
    return [[float(token % 2 == 0) for token in ids] for ids in token_ids]


def number_of_even(prompts, responses, messages=None, *, token_ids):
    """The same, all of it at the end."""
    return [[0.0] * (len(ids) - 1) + [float(sum(token % 2 == 0 for token in ids))] for ids in token_ids]


def measured(scorer, pieces=1, **others):
    return measure(
        PROMPTS,
        GENERATION,
        ["aba", ""],
        policy=table_lm(UNIFORM),
        reference=table_lm(UNIFORM),
        scorer=scorer,
        value=None,
        temperature=1.0,
        pieces=[*map(Piece, torch.arange(2).split(pieces))],
        others=others,
    )


def model_scorer(kind, step_end=None):
    scalar = table_scalar(SCORES)
    scorer = ModelScorer(scalar)
    scorer.along = TokenRewards(kind, step_end, table_tokenizer())
    return scorer


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    ("kind", "step_end", "expected"),
    [
        ("score", None, [[1.0, 3.0, 1.0, 4.0], [4.0, 0.0, 0.0, 0.0]]),
        ("difference", None, [[1.0, 2.0, -2.0, 3.0], [4.0, 0.0, 0.0, 0.0]]),
        ("score", "b", [[0.0, 3.0, 0.0, 4.0], [4.0, 0.0, 0.0, 0.0]]),
        ("difference", "b", [[0.0, 3.0, 0.0, 1.0], [4.0, 0.0, 0.0, 0.0]]),
        ("difference", "ba", [[0.0, 0.0, 1.0, 3.0], [4.0, 0.0, 0.0, 0.0]]),
        ("difference", "nowhere", [[0.0, 0.0, 0.0, 4.0], [4.0, 0.0, 0.0, 0.0]]),
    ],
)
def test_a_models_rewards_by_hand(kind, step_end, expected, pieces):
    found = measured(model_scorer(kind, step_end), pieces)
    assert found.dense.tolist() == expected
    assert found.scores.tolist() == [sum(row) for row in expected]
    other = measured(ModelScorer(table_scalar(SCORES)), pieces, along=model_scorer(kind, step_end))
    assert other.dense is None
    assert other.dense_others["along"].tolist() == expected
    assert other.others["along"].tolist() == [sum(row) for row in expected]


def test_calibrated_differences_sum_to_the_calibrated_score():
    scorer = model_scorer("difference")
    scorer.model.calibration = Calibration(mean=2.0, std=0.5)
    found = measured(scorer)
    assert found.dense[0].tolist() == [-2.0, 4.0, -4.0, 6.0]
    assert found.scores.tolist() == [4.0, 4.0]
    assert raw_score(scorer, found.scores)["raw_score"].tolist() == [4.0, 4.0]
    assert raw_score(model_scorer("score"), found.scores) == {}


def test_a_functions_rewards_by_hand():
    seen = []

    def function(prompts, responses, token_ids):
        seen.append((prompts, responses, token_ids))
        return [[0.5, -1.0, 2.0, 4.0], torch.tensor([3.0])]

    found = measured(FunctionScorer(ScoringFunction(function, "mine")))
    assert seen == [(["a", "ab"], ["aba", ""], [[1, 2, 1, EOS], [EOS]])]
    assert found.dense.tolist() == [[0.5, -1.0, 2.0, 4.0], [3.0, 0.0, 0.0, 0.0]]
    assert found.scores.tolist() == [5.5, 3.0]


def test_rewards_of_tokens_by_hand():
    """-0.1 a token for the KL; of a score of 7 there are 5 along the response, so 2 stand at its end."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    dense = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.0, 0.0]])
    rewards = kl_shaped_rewards(torch.tensor([7.0, -1.0]), torch.ones(2, 3), mask, 0.1, dense)
    torch.testing.assert_close(rewards, torch.tensor([[0.9, 3.9, 1.9], [-1.1, 0.0, 0.0]]))


def test_advantages_by_hand():
    """Lambda and gamma 1 and values of 0: what is still to come."""
    found = measured(model_scorer("score"))
    objective = Objective(gae_lambda=1.0, whiten_advantages=False)
    made = build_experience(PROMPTS, GENERATION, found, found.scores, KLPenalty(), 0.05, objective)
    assert made.rewards.tolist() == [[1.0, 3.0, 1.0, 4.0], [4.0, 0.0, 0.0, 0.0]]
    assert made.advantages.tolist() == [[9.0, 8.0, 5.0, 4.0], [4.0, 0.0, 0.0, 0.0]]
    clipped = build_experience(PROMPTS, GENERATION, found, found.scores.clamp(max=5), KLPenalty(), 0.05, objective)
    assert clipped.rewards.tolist() == [[1.0, 3.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0]]


def of_tokens(dense, scores=None, **others):
    dense = torch.tensor(dense)
    zeros = torch.zeros_like(dense)
    parts = {name: torch.tensor(part) for name, part in others.items()}
    sums = {name: part.sum(dim=1) for name, part in parts.items()}
    scores = dense.sum(dim=1) if scores is None else torch.tensor(scores)
    return Measurements(zeros, zeros, zeros, zeros, scores, zeros, sums, dense, parts)


def test_rewards_are_added_where_they_stand():
    settings = {
        "half": OtherReward("f", weight=0.5),
        "logged": OtherReward("f", weight=0.0),
        "safe": OtherReward("f", replaces_below=0.15),
    }
    given = of_tokens(
        [[1.0, 2.0], [3.0, 4.0]],
        half=[[10.0, 0.0], [0.0, 2.0]],
        logged=[[9.0, 9.0], [9.0, 9.0]],
        safe=[[4.0, 4.0], [-1.0, -2.0]],
    )
    found = RewardCombination(settings).of(given, dict.fromkeys(settings, len), None)
    assert found.dense.tolist() == [[6.0, 2.0], [-1.0, -2.0]]
    assert found.scores.tolist() == [8.0, -3.0]


def test_a_part_is_scaled_like_its_score_and_shift_and_clip_are_left_for_the_end():
    combination = RewardCombination({"half": OtherReward("f", weight=0.5, scaling=True, clip=1.0)})
    given = of_tokens([[0.0, 0.0], [0.0, 0.0]], half=[[1.0, 1.0], [2.0, 4.0]])  # sums 2 and 6: mean 4, deviation 2
    combination.update(given, lambda tensor: tensor)
    found = combination.of(given, {"half": len}, None)
    torch.testing.assert_close(found.dense, torch.tensor([[0.25, 0.25], [0.5, 1.0]]))
    torch.testing.assert_close(found.scores, torch.tensor([-0.5, 0.5]))


def test_steps_end_where_their_text_is_complete():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Mix flour, water.\n\nthen wait\n\nand bake it.")["input_ids"]
    texts = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    for mark in ("\n\n", ", ", "a", ".", "water.\n\nthen"):
        expected = [
            n for n in range(len(ids)) for _ in range(texts[n].count(mark) - (texts[n - 1].count(mark) if n else 0))
        ]
        assert step_ends(tokenizer, ids, mark) == expected != []
    assert step_ends(tokenizer, ids, "?") == []


def spelt(*tokens):
    """A tokenizer that spells bytes as Llama 2's does, and the ids of tokens, those of two hex digits being bytes."""
    tokenizer = single_bytes()
    return tokenizer, tokenizer.convert_tokens_to_ids([f"<0x{t}>" if t.isupper() or t.isdigit() else t for t in tokens])


@pytest.mark.parametrize(
    ("tokens", "mark", "expected"),
    [
        (("s", "0A", "0A", "t", "0A", "0A", "d"), "\n\n", [2, 5]),
        (("s", "0A", "0A", "</s>"), "\n\n", [2]),
        (("C3", "A9", "0A", "C3", "B1", "0A", "0A", "d"), "\n", [2, 5, 6]),
        (("s", "0A", "</s>", "0A", "C3", "B1", "d"), "\n", [1, 3]),
        (("s", "0A", "C3", "d"), "\n", []),  # bytes that are no characters in the end
    ],
)
def test_bytes_that_complete_a_step_end_it_themselves(tokens, mark, expected):
    """A response is whole, so no byte waits for the token that follows it."""
    tokenizer, ids = spelt(*tokens)
    assert step_ends(tokenizer, ids, mark) == expected


@given(data=st.data())
def test_a_step_ends_at_the_first_token_whose_text_holds_it(data):
    tokenizer, bytes_ = data.draw(st.sampled_from([spelt("0A", "0A", "C3", "A9"), (tiny_tokenizer(), [5, 6])]))
    some = [*bytes_, *tokenizer.encode("é ñ\n\n€ab", add_special_tokens=False)]
    ids = data.draw(st.lists(st.sampled_from(some) | st.integers(0, len(tokenizer) - 1), max_size=10))
    text, mark = decode_response(tokenizer, ids), data.draw(st.sampled_from(["\n", "\n\n", "a", " ", "é"]))
    expected = []
    while (at := text.find(mark, start := (expected[-1][0] if expected else 0))) >= start:
        end = at + len(mark)
        counts = range(1, len(ids) + 1)
        expected.append(
            (end, next(n for n in counts if decode_response(tokenizer, ids[:n]).startswith(text[:end])) - 1)
        )
    assert step_ends(tokenizer, ids, mark) == [token for _, token in expected]


def test_a_judge_shows_bytes_where_they_stand(tmp_path):
    tokenizer, ids = spelt("s", "0A", "0A", "C3", "A9", "t")
    base = save_llama(tmp_path / "base", tokenizer)
    judge = Judge.load(save_reward_model(tmp_path / "reward", base, tokenizer), dtype="float32", device="cpu")
    judge.scores_by.chat.encode_dialogue = lambda *_: (np.array([5]), np.array(ids))
    said = judge.token_scores(WrittenPrompt("a"), "")
    assert [token.text for token in said] == ["s", "\n", "\n", "", "é", "t"]


def test_a_special_token_ends_steps_though_it_has_no_text():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|step|>"]})
    ids = tokenizer("Mix flour<|step|>then wait<|step|>").input_ids
    places = [place for place, number in enumerate(ids) if number == len(tokenizer) - 1]
    assert step_ends(tokenizer, ids, "<|step|>") == places
    assert len(places) == 2
    assert step_ends(tokenizer, [*ids, tokenizer.eos_token_id], "<|end|>") == [len(ids)]


@pytest.mark.parametrize("mark", ["\\n\\n", "\\n", "Step.\\n"])
def test_a_line_s_end_that_a_shell_did_not_read_is_refused(mark):
    with pytest.raises(
        UserError, match=r"score\.step_end holds a backslash and an n .* \$'\\n\\n' in the shell$"
    ) as error:
        ScoreShaping(per_token="score", step_end=mark)
    assert "\n" not in str(error.value)
    assert ScoreShaping(per_token="score", step_end="\\neq").step_end == "\\neq"


# Whole runs.


@pytest.mark.parametrize(("mark", "times"), [("never said", 1), ("e", 0)])
def test_steps_that_the_first_rollout_does_not_hold_are_said_once(folder, reward_folder, recwarn, mark, times):
    score = ScoreShaping(per_token="score", step_end=mark)
    run(make(folder, reward_folder, score=score, micro_batch_size=4))
    said = [str(each.message) for each in recwarn if "no answer of the first rollout" in str(each.message)]
    assert len(said) == times
    assert all("holds the step_end 'never said' of reward 'main'" in each for each in said)


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_steps_that_only_another_rank_has_met_are_there(recwarn, elsewhere):
    scorer = SimpleNamespace(along=TokenRewards("score", "e", None))
    warn_without_steps({"main": scorer}, lambda found: found + elsewhere)
    assert len(recwarn) == (not elsewhere)


def make(folder, reward, kind=PPOModule, **settings):
    given = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    given |= {"samples_per_prompt": 2, "minibatch_size": 16} if kind is RLOOModule else {}
    given |= {"lr_schedule": "constant", "warmup_steps": 0, "optimizer": adamw(1e-3)}
    return kind(folder, reward, **given | settings)


def data(module, iterations=2, **settings):
    size = module.rollout_batch_size
    return PromptDataModule(
        module.model_name_or_path,
        prompt_rows(size * iterations),
        validation_split=0.0,
        max_prompt_length=40,
        rollout_batch_size=size,
        **settings,
    )


def run(module, iterations=2, **settings):
    disturb_random_numbers(0)
    return fit(module, data(module, iterations), **settings)


@pytest.mark.parametrize("score", [PLAIN, ScoreShaping(missing_eos_penalty=0.5)], ids=["plain", "shaped"])
def test_all_of_it_at_the_last_token_is_a_score(folder, reward_folder, score):
    end = ScoreShaping(**{**vars(score), "per_token": "difference", "step_end": "never said"})
    whole, along = make(folder, reward_folder, score=score), make(folder, reward_folder, score=end)
    logs = run(whole), run(along)
    assert_close_weights(weights(whole.policy), weights(along.policy))
    assert_close_weights(weights(whole.value), weights(along.value))
    for name in ("score", "raw_score", "reward"):
        torch.testing.assert_close(*(torch.tensor(log.series(f"train/{name}")) for log in logs))


def test_differences_change_where_a_score_stands_and_not_how_much_it_is(folder, reward_folder):
    whole = make(folder, reward_folder, score=PLAIN)
    along = make(folder, reward_folder, score=ScoreShaping(scaling=False, clip=None, per_token="difference"))
    logs = run(whole, 1), run(along, 1)
    for name in ("score", "raw_score", "reward"):
        torch.testing.assert_close(*(torch.tensor(log.series(f"train/{name}")) for log in logs))
    assert logs[0].series("train/value_loss") != logs[1].series("train/value_loss")


def test_rloo_sums_what_tokens_get(folder):
    modules = [make(folder, reward, RLOOModule) for reward in (even, number_of_even)]
    logs = [run(module) for module in modules]
    assert logs[0].series("train/score") == logs[1].series("train/score") != []
    assert_close_weights(*(weights(module.policy) for module in modules))


def test_micro_batches_and_shared_prompts_change_nothing(folder, reward_folder):
    score = ScoreShaping(scaling=False, clip=None, per_token="score", step_end="e")
    options = {
        "samples_per_prompt": 2,
        "minibatch_size": 16,
        "score": score,
        "other_rewards": {"even": {"reward": even}},
    }
    whole, pieces = (make(folder, reward_folder, **options, micro_batch_size=size) for size in (None, 2))
    logs = run(whole), run(pieces)
    assert_close_weights(weights(whole.policy), weights(pieces.policy))
    torch.testing.assert_close(*(torch.tensor(log.series("train/score")) for log in logs))


def test_validation_and_prediction_tell_the_sum(folder):
    module = make(folder, even)
    run(module, 1)
    rows = trainer().predict(module, data(module, predict_data=prompt_rows(3)))[0]
    assert all(row["score"] == int(row["score"]) and 0 <= row["score"] <= row["tokens"] for row in rows)


def test_a_dense_reward_is_learnt(folder):
    """Each token is rewarded by itself: discounted to nothing, only its own reward can teach it."""
    module = make(
        folder,
        even,
        rollout_batch_size=16,
        minibatch_size=16,
        ppo_epochs=2,
        optimizer=adamw(1e-2),
        score=PLAIN,
        kl=KLPenalty(0.0),
        objective=Objective(gamma=0.0, gae_lambda=0.0),
        sampling=Sampling(max_new_tokens=8, temperature=1.0),
    )
    log = run(module, 20)
    share = torch.tensor(log.series("train/score")) / torch.tensor(log.series("train/response_length"))
    assert share[:3].mean() < 0.65
    assert share[-3:].mean() > 0.9


# What is refused.


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[1.0], [1.0]], r"^reward function 'mine' returned 1 scores for the 2 tokens of row 10$"),
        ([[1.0, 2.0], [1.0, 2.0]], r"returned 2 scores for the 1 tokens of row 11$"),
        ([[1.0, 2.0], 1.0], r"returned float 1\.0 for row 11; return for each response a list of one number per token"),
        ([[1.0, None], [1.0]], r"returned None for a token of row 10; return for each response"),
        ([[1.0, 2.0]], r"returned 1 scores for 2 responses$"),
    ],
)
def test_other_numbers_than_tokens_are_refused(returned, message):
    function = ScoringFunction(lambda prompts, responses, token_ids: returned, "mine")
    with pytest.raises(UserError, match=message) as error:
        function.of_tokens(["a", "b"], ["c", "d"], [[], []], [10, 11], [[5, 6], [7]])
    assert "\n" not in str(error.value)


def test_a_function_of_tokens_judges_no_texts():
    with pytest.raises(UserError, match="'even' scores the tokens of a policy"):
        Judge.load(even).scores([WrittenPrompt("a")], ["b"])


def test_a_reward_model_with_other_tokens_is_refused(folder, tmp_path):
    base = save_gpt2(tmp_path / "base", dropout=0.0)
    other = save_reward_model(tmp_path / "reward", base, tiny_tokenizer(chat_template=True))
    module = make(folder, even, other_rewards={"steps": OtherReward(other, per_token="score")})
    with pytest.raises(UserError, match="per_token of reward 'steps' needs a reward model that reads the policy's ids"):
        run(module)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (
            lambda: OtherReward("f", step_end="x"),
            r"other_rewards\.step_end \('x'\) says where other_rewards\.per_token",
        ),
        (lambda: ScoreShaping(per_token="score", step_end=""), r"score\.step_end \(''\) says where score\.per_token"),
        (lambda: OtherReward("f", per_token="score", replaces_below=0.1), "replaces_below reads one score"),
        (
            lambda: make("x", even, score=ScoreShaping(per_token="score")),
            "per_token of reward 'main' is for reward models",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make_it, message):
    with pytest.raises(UserError, match=message) as error:
        make_it()
    assert "\n" not in str(error.value)


def test_rewards_of_tokens_are_scaled_like_their_score(folder):
    """By the deviation of the sums; the shift stands at the end, so that the sum of the rewards is the shaped score."""
    module = make(folder, even, kl=KLPenalty(0.0), score=ScoreShaping(clip=0.5))
    seen = []
    made = module.experience_of

    def watching(prompts, generation, measured, scores):
        seen.append((made(prompts, generation, measured, scores), scores, module.score_moments.std))
        return seen[-1][0]

    module.experience_of = watching
    run(module)
    assert len(seen) == 2
    for experience, scores, deviation in seen:
        mask = experience.response_mask
        last = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)
        each = (experience.response_ids % 2 == 0) / deviation
        torch.testing.assert_close(experience.rewards[mask & ~last], each[mask & ~last])
        torch.testing.assert_close(experience.rewards.sum(dim=1), scores)
