"""A rollout's parts, on models and numbers written by hand."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.models import LAYOUTS, table_lm, table_scalar, table_tokenizer, tiny_causal_lm, tiny_classifier
from helpers.threads import in_two_threads
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.algorithms.online.controllers import RunningMoments
from rlhf_lightning.algorithms.online.experience import Measurements
from rlhf_lightning.algorithms.online.losses import clipped_policy_loss
from rlhf_lightning.algorithms.online.models import TrunkValue
from rlhf_lightning.algorithms.online.rollout import (
    experience_metrics,
    explained_variance,
    measure,
    raw_score,
    shape_scores,
    weigh_draws,
)
from rlhf_lightning.algorithms.online.settings import KLPenalty, Objective, ScoreShaping
from rlhf_lightning.algorithms.online.sharing import Piece
from rlhf_lightning.algorithms.ppo import build_experience
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.masked import identity
from rlhf_lightning.generation.engine import Generation, TransformersEngine, respond
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.reward_functions import ScoringFunction
from rlhf_lightning.models.scalar_lm import Calibration, ScalarLM
from rlhf_lightning.models.scorers import FunctionScorer, ModelScorer, Responses, TextScorer

NAN = float("nan")
EOS = 3
P = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.05, 0.15, 0.2, 0.6], [0.25, 0.35, 0.3, 0.1]]
Q = [[0.25] * 4, [0.2, 0.2, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4], [0.25] * 4]
CHAIN = [[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0], [0, 1.0, 0, 0]]
VALUES, SCORES = [9.0, 0.5, -1.0, 2.0], [7.0, 1.0, 3.0, 4.0]

PROMPTS = PromptBatch(
    prompt_ids=torch.tensor([[0, 1], [1, 2]]),
    prompt_mask=torch.tensor([[False, True], [True, True]]),
    prompts=["a", "ab"],
    row_ids=torch.tensor([10, 11]),
)
# `b` and the EOS after the first prompt, an EOS alone after the second.
GENERATION = Generation(
    response_ids=torch.tensor([[2, EOS], [EOS, 0]]),
    response_mask=torch.tensor([[True, True], [True, False]]),
    ended=torch.tensor([True, True]),
)


def take(rows):
    fields = [[field[row] for row in rows] if isinstance(field, list) else field[rows] for field in PROMPTS[:4]]
    return PromptBatch(*fields)


def measure_all(policy, reference, scorer, value, prompts, generation, texts, temperature, pieces, report=None):
    models = {"policy": policy, "reference": reference, "scorer": scorer, "value": value}
    return measure(
        prompts, generation, texts, **models, temperature=temperature, pieces=[*map(Piece, pieces)], report=report
    )


def measured(batch_size=2, value=True, temperature=1.0, report=None):
    options = {} if report is None else {"report": report}
    return measure_all(
        table_lm(P),
        table_lm(Q),
        ModelScorer(table_scalar(SCORES)),
        table_scalar(VALUES) if value else None,
        PROMPTS,
        GENERATION,
        ["b", ""],
        temperature,
        list(torch.arange(2).split(batch_size)),
        **options,
    )


def test_measurements_by_hand():
    measurements = measured()
    log = math.log
    assert measurements.logprobs.tolist() == [pytest.approx([log(0.3), log(0.6)]), pytest.approx([log(0.6), 0])]
    assert measurements.ref_logprobs.tolist() == [pytest.approx([log(0.2), log(0.4)]), pytest.approx([log(0.4), 0])]
    entropies = [-sum(p * log(p) for p in row) for row in P]
    expected = [pytest.approx([entropies[1], entropies[2]]), pytest.approx([entropies[2], 0])]
    assert measurements.entropy.tolist() == expected
    assert measurements.values.tolist() == [[0.5, -1.0], [-1.0, 0.0]]
    assert measurements.scores.tolist() == [4.0, 4.0]  # the EOS of both
    assert not any(field.requires_grad for field in measurements[:6])


def test_the_kl_of_a_response_is_the_sum_over_its_tokens():
    log = math.log
    assert measured().kl.tolist() == pytest.approx([log(0.3 / 0.2) + log(0.6 / 0.4), log(0.6 / 0.4)])


def test_without_a_value_model_values_are_0():
    assert not measured(value=False).values.any()


def test_a_temperature_changes_both_log_probabilities():
    measurements = measured(temperature=0.5)
    assert measurements.logprobs[1, 0].item() == pytest.approx(math.log(0.36 / (0.0025 + 0.0225 + 0.04 + 0.36)))
    assert measurements.ref_logprobs[1, 0].item() == pytest.approx(math.log(0.16 / (0.01 + 0.04 + 0.09 + 0.16)))


def test_measuring_in_parts_changes_nothing():
    tokenizer = tiny_tokenizer()
    policy, reference = tiny_causal_lm(seed=1).double(), tiny_causal_lm(seed=2).double()
    scorer, value = (ScalarLM(tiny_classifier(seed=seed).double()) for seed in (3, 4))
    ids, lengths = torch.arange(40, 75).view(7, 5), torch.tensor([1, 2, 3, 4, 5, 5, 3]).unsqueeze(1)
    prompts = PromptBatch(ids, torch.arange(5) >= 5 - lengths, ["x"] * 7, torch.arange(7))
    random = torch.Generator().manual_seed(0)
    generation, texts = respond(
        TransformersEngine(policy, tokenizer), tokenizer, prompts, Sampling(max_new_tokens=6), generator=random
    )
    progress = []
    order = torch.tensor([6, 0, 3, 5, 1, 2, 4])
    whole, parts = (
        measure_all(
            policy,
            reference,
            ModelScorer(scorer),
            value,
            prompts,
            generation,
            texts,
            0.7,
            pieces,
            lambda *d: progress.append(d),
        )
        for pieces in ([torch.arange(7)], list(order.split(3)))
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, **LAYOUTS)
    # Policy and value model together, the reference, the reward model.
    assert progress == [(done, 21) for done in (7, 14, 21, 3, 6, 7, 10, 13, 14, 17, 20, 21)]


class Witness:
    """Scores each response by the number of columns that it is shown in, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def __call__(self, responses):
        self.shown.append([field.tolist() if isinstance(field, torch.Tensor) else field for field in responses])
        return torch.full((len(responses.sequences),), float(responses.sequences.shape[1]))


class WitnessModel(Witness, torch.nn.Module):
    """The same, as a model."""


def test_scorers_are_shown_what_was_asked_and_said():
    written = [WrittenPrompt("a", ({"name": "find"},)), WrittenPrompt("ab")]
    prompts = PROMPTS._replace(written=written)
    generation = GENERATION._replace(ended=torch.tensor([True, False]))
    function, model = Witness(), WitnessModel()
    for scorer in (function, model):
        pieces = [torch.tensor([1]), torch.tensor([0])]
        measure_all(table_lm(P), table_lm(Q), scorer, None, prompts, generation, ["b", ""], 1.0, pieces)
    sequences, mask = [[0, 1, 2, EOS], [1, 2, EOS, 0]], [[False, True, True, True], [True, True, True, False]]
    assert function.shown == [[sequences, mask, [True, False], ["a", "ab"], ["b", ""], [10, 11], written, None]]
    cut = [[1, 2, EOS]], [[True] * 3]  # both without their padding
    assert model.shown == [
        [*cut, [False], ["ab"], [""], [11], written[1:], None],
        [*cut, [True], ["a"], ["b"], [10], written[:1], None],
    ]


def test_a_value_head_reads_kept_hidden_states_or_the_policy_s_own():
    policy, value = tiny_causal_lm(), TrunkValue(tiny_causal_lm().config.hidden_size)
    torch.nn.init.normal_(value.score.weight, generator=torch.Generator().manual_seed(0))
    others = tiny_causal_lm(seed=2), Witness(), value, PROMPTS
    whole = [torch.arange(2)]
    expected = measure_all(policy, *others, GENERATION, ["", ""], 1.0, whole).values
    assert expected[GENERATION.response_mask].all()
    told = GENERATION._replace(logprobs=torch.zeros(2, 2))
    torch.testing.assert_close(measure_all(policy, *others, told, ["", ""], 1.0, whole).values, expected)
    hidden = torch.randn(2, 2, policy.config.hidden_size, generator=torch.Generator().manual_seed(1))
    values = measure_all(policy, *others, told._replace(hidden=hidden), ["", ""], 1.0, whole).values
    torch.testing.assert_close(values, value(hidden) * GENERATION.response_mask)


def test_a_part_is_as_wide_as_its_longest_prompt_and_response():
    lengths = torch.tensor([[1, 2], [2, 1], [4, 1], [2, 3]])  # prompt and response
    prompts = PromptBatch(torch.ones(4, 4).long(), torch.arange(4) >= 4 - lengths[:, :1], ["x"] * 4, torch.arange(4))
    generation = Generation(torch.ones(4, 3).long(), torch.arange(3) < lengths[:, 1:], torch.ones(4).bool())
    pieces = list(torch.arange(4).split(2))
    models = table_lm(P), table_lm(Q), WitnessModel(), None
    assert measure_all(*models, prompts, generation, ["x"] * 4, 1.0, pieces).scores.tolist() == [4, 4, 7, 7]


def test_functions_see_all_texts_at_once():
    seen = []

    def function(prompts, responses):
        seen.append((prompts, responses))
        return [float(len(response)) for response in responses]

    scorer = FunctionScorer(ScoringFunction(function, "length"))
    measurements = measure_all(
        table_lm(P), table_lm(Q), scorer, None, PROMPTS, GENERATION, ["b", ""], 1.0, list(torch.arange(2).split(1))
    )
    assert seen == [(["a", "ab"], ["b", ""])]
    assert measurements.scores.tolist() == [1.0, 0.0]


def test_log_probabilities_of_the_sampler_are_taken_without_another_pass():
    told = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    measurements = measure_all(
        table_lm(P), table_lm(Q), ModelScorer(table_scalar(SCORES)), table_scalar(VALUES), PROMPTS,
        GENERATION._replace(logprobs=told), ["b", ""], 1.0, [torch.arange(2)],
    )  # fmt: skip
    assert torch.equal(measurements.logprobs, told)
    assert not measurements.entropy.any()
    assert torch.equal(measurements.ref_logprobs, measured().ref_logprobs)
    assert torch.equal(measurements.values, measured().values)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_answers_in_parts_are_joined(batch_size):
    progress = []
    generation, texts = respond(
        TransformersEngine(table_lm(CHAIN), table_tokenizer(), batch_size), table_tokenizer(), take([1, 0]),
        Sampling(temperature=0.0, max_new_tokens=5), on_token=progress.append,
    )  # fmt: skip
    assert generation.response_ids.tolist() == [[EOS, 0], [2, EOS]]
    assert generation.response_mask.tolist() == [[True, False], [True, True]]
    assert generation.ended.tolist() == [True, True]
    assert texts == ["", "b"]
    assert progress == ([1, 6, 7] if batch_size == 1 else [1, 2])


def test_scores_are_scaled_then_clipped_then_penalised():
    moments = RunningMoments()
    moments.update(torch.tensor([0.0, 4.0]))  # mean 2, standard deviation 2
    scores, ended = torch.tensor([4.0, 8.0, -20.0, 2.0]), torch.tensor([True, False, True, False])
    lengths = torch.tensor([3, 10, 8, 10])

    def shaped(**settings):
        return shape_scores(scores, ended, lengths, moments, ScoreShaping(**settings), 10)

    raw = {"scaling": False, "clip": None}
    assert torch.equal(shaped(**raw), scores)
    assert shaped(clip=None).tolist() == [1.0, 3.0, -11.0, 0.0]
    assert shaped(clip=2.0, missing_eos_penalty=1.0).tolist() == [1.0, 1.0, -2.0, -1.0]
    # Set, whatever the score was, not subtracted from it.
    assert shaped(clip=2.0, missing_eos_score=-3.0).tolist() == [1.0, -3.0, -2.0, -3.0]
    # The last four tokens before the limit of 10: a response of 8 is half way in, one of 10 at the end.
    assert shaped(**raw, overlong_buffer=4, overlong_penalty=2.0).tolist() == [4.0, 6.0, -21.0, 0.0]


def test_a_cut_response_is_either_fined_or_given_a_score():
    with pytest.raises(UserError, match=r"^score\.missing_eos_score and score\.missing_eos_penalty both speak of"):
        ScoreShaping(missing_eos_score=-1.0, missing_eos_penalty=1.0)


def by_hand(objective, estimator="k1", rows=(0, 1), reduce=identity):
    measurements = Measurements(
        logprobs=torch.tensor([[-1.0, -2.0], [-1.0, NAN]]),
        ref_logprobs=torch.tensor([[-2.0, -1.0], [-3.0, NAN]]),
        entropy=torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        values=torch.tensor([[1.0, 2.0], [0.5, NAN]]),
        scores=torch.tensor([40.0, 50.0]),
        importance=torch.ones(2, 2),
    )
    kl, rows = KLPenalty(estimator=estimator), list(rows)
    generation = Generation(*(field[rows] for field in GENERATION[:3]))
    measurements = Measurements(*(field[rows] for field in measurements[:6]))
    shaped = torch.tensor([4.0, 5.0])[rows]
    return build_experience(take(rows), generation, measurements, shaped, kl, 0.5, objective, reduce)


def test_experience_by_hand():
    experience = by_hand(Objective(gamma=1.0, gae_lambda=0.5, whiten_advantages=False))
    # KL 1, -1 and 2 at weight 0.5; the shaped score with the last token.
    assert experience.rewards.tolist() == [[-0.5, 4.5], [4.0, 0.0]]
    # Row 0: delta_1 = 4.5 - 2 = 2.5, delta_0 = -0.5 + 2 - 1 = 0.5, A_0 = 0.5 + 0.5 * 2.5. Row 1: 4 - 0.5.
    assert experience.advantages.tolist() == [[1.75, 2.5], [3.5, 0.0]]
    assert experience.returns.tolist() == [[2.75, 4.5], [4.0, 0.0]]
    assert experience.scores.tolist() == [40.0, 50.0]  # raw
    assert experience.row_ids.tolist() == [10, 11]
    assert torch.equal(experience.prompt_ids, PROMPTS.prompt_ids)
    assert torch.equal(experience.prompt_mask, PROMPTS.prompt_mask)
    assert all(torch.equal(a, b) for a, b in zip(experience[2:5], GENERATION[:3], strict=True))


def test_rewards_of_tokens_are_whitened_with_and_without_their_mean():
    plain = by_hand(Objective(whiten_advantages=False)).rewards[GENERATION.response_mask]  # -0.5, 4.5, 4
    mean, std = plain.mean(), plain.std(correction=0)
    for how, shift in (("scale", mean), ("shift", 0.0)):
        found = by_hand(Objective(gamma=1.0, gae_lambda=1.0, whiten_advantages=False, whiten_rewards=how))
        rewards = found.rewards[GENERATION.response_mask]
        torch.testing.assert_close(rewards, (plain - mean) / std + shift)
        # Advantages and returns are those of the whitened rewards.
        torch.testing.assert_close(found.returns[0, 0], rewards[0] + rewards[1])
        assert found.rewards[1, 1] == 0


def test_advantages_and_returns_may_have_lambdas_of_their_own():
    plain = Objective(gae_lambda=0.5, whiten_advantages=False)
    same = replace(plain, value_gae_lambda=0.5)
    assert all(torch.equal(*both) for both in zip(by_hand(plain)[11:14], by_hand(same)[11:14], strict=True))
    apart = by_hand(replace(plain, value_gae_lambda=1.0))
    assert torch.equal(apart.advantages, by_hand(plain).advantages)
    assert apart.returns.tolist() == [[4.0, 4.5], [4.0, 0.0]]  # the sums of the rewards
    # alpha 1: two tokens have lambda 1/2, one has 0; returns keep gae_lambda.
    by_length = by_hand(replace(plain, gae_length_alpha=1.0))
    assert by_length.advantages.tolist() == [[1.75, 2.5], [3.5, 0.0]]
    assert torch.equal(by_length.returns, by_hand(plain).returns)
    assert by_hand(replace(plain, gae_lambda=0.9, gae_length_alpha=1.0)).advantages.tolist() == [
        [1.75, 2.5],
        [3.5, 0.0],
    ]


def drawn_apart(cap, per_response=False):
    """Two tokens, twice and half as likely to the policy as to what drew them, and one four times."""
    policy = torch.tensor([[0.5, 0.2], [0.8, NAN]]).log()
    nothing = torch.zeros_like(policy)
    measured = Measurements(policy, nothing, nothing, nothing, nothing[:, 0], torch.ones_like(policy))
    sampler = torch.tensor([[0.25, 0.4], [0.2, 1.0]]).log()
    return weigh_draws(measured, GENERATION._replace(sampler_logprobs=sampler), cap, per_response)


def test_tokens_that_an_engine_drew_from_its_own_distribution_are_weighed():
    measured, logged = drawn_apart(3.0)
    torch.testing.assert_close(measured.importance, torch.tensor([[2.0, 0.5], [3.0, 1.0]]))
    assert logged["mismatch_kl"].item() == pytest.approx(-math.log(4) / 3)
    assert logged["importance"].item() == pytest.approx(5.5 / 3)
    assert logged["importance_capped"].item() == pytest.approx(1 / 3)
    measured, _ = drawn_apart(5.0, per_response=True)
    torch.testing.assert_close(measured.importance, torch.tensor([[1.0, 1.0], [4.0, 1.0]]))
    measured, logged = drawn_apart(None)
    assert measured.importance.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert logged["mismatch_kl"].item() == pytest.approx(-math.log(4) / 3)
    assert logged["importance_capped"].item() == 0


def test_tokens_that_the_policy_drew_weigh_1_and_nothing_is_logged():
    measured = drawn_apart(None)[0]
    assert weigh_draws(measured, GENERATION, 2.0) == (measured, {})


@pytest.mark.parametrize("per_response", [False, True])
def test_the_policy_loss_counts_each_token_by_its_weight(per_response):
    plain = by_hand(Objective(whiten_advantages=False))
    plain = plain._replace(advantages=plain.advantages.nan_to_num())
    logprobs = torch.tensor([[-0.9, -2.1], [-1.0, 0.0]])
    twice, halves = (plain._replace(importance=torch.full((2, 2), weight)) for weight in (2.0, 0.5))
    losses = [clipped_policy_loss(logprobs, each, 0.2, per_response=per_response)[0] for each in (plain, twice, halves)]
    assert losses[0].item() != 0
    assert losses[1].item() == pytest.approx(2 * losses[0].item())
    assert losses[2].item() == pytest.approx(losses[0].item() / 2)


def test_the_estimator_of_the_penalty_is_a_choice():
    rewards = by_hand(Objective(), estimator="k2").rewards
    assert rewards.tolist() == [[-0.25, 3.75], [4.0, 0.0]]


def test_advantages_are_whitened_over_all_tokens_and_returns_are_not():
    plain = by_hand(Objective(gae_lambda=0.5, whiten_advantages=False))
    white = by_hand(Objective(gae_lambda=0.5))
    mean = (1.75 + 2.5 + 3.5) / 3
    deviation = math.sqrt(((1.75 - mean) ** 2 + (2.5 - mean) ** 2 + (3.5 - mean) ** 2) / 3)
    expected = [(a - mean) / deviation for a in (1.75, 2.5, 3.5)]
    assert white.advantages[white.response_mask].tolist() == pytest.approx(expected, rel=1e-5)
    assert white.advantages[1, 1] == 0
    assert torch.equal(white.returns, plain.returns)


def test_advantages_are_whitened_over_all_processes():
    together = by_hand(Objective()).advantages
    apart = in_two_threads(lambda rows, reduce: by_hand(Objective(), rows=rows, reduce=reduce), [[0], [1]])
    torch.testing.assert_close(torch.cat([share.advantages for share in apart]), together)


def metrics_of(experience, reduce=identity, gamma=1.0):
    explained = {"explained_variance": explained_variance(experience, reduce, gamma)}
    return {name: metric.item() for name, metric in {**experience_metrics(experience, reduce), **explained}.items()}


def test_metrics_by_hand():
    experience = by_hand(Objective(gae_lambda=0.5))._replace(ended=torch.tensor([True, False]))
    k3 = sum(math.exp(-d) - 1 + d for d in (1.0, -1.0, 2.0))
    # Rewards -0.5, 4.5 and 4 sum to 4, 4.5 and 4 from each token on; the values are 1, 2 and 0.5.
    outcomes, errors = torch.tensor([4.0, 4.5, 4.0]), torch.tensor([3.0, 2.5, 3.5])
    assert metrics_of(experience) == pytest.approx(
        {
            "score": 45.0,
            "score_std": 5.0,
            "reward": (-0.5 + 4.5 + 4.0) / 2,
            "kl": (1 - 1 + 2) / 2,
            "kl_k3": k3 / 2,
            "response_length": 1.5,
            "eos_rate": 0.5,
            "entropy": 2.0,
            "explained_variance": (1 - errors.var(correction=0) / outcomes.var(correction=0)).item(),
        },
        rel=1e-5,
    )
    assert explained_variance(experience) == metrics_of(experience, gamma=1.0)["explained_variance"]


def test_explained_variance_of_a_perfect_and_of_a_constant_value():
    experience = by_hand(Objective())
    mask, outcomes = experience.response_mask, torch.tensor([[2.5, 3.0], [8.0, NAN]])
    rewards = torch.tensor([[1.0, 3.0], [8.0, 0.0]])  # with half of what is a token away
    for values, expected in [(outcomes, 1.0), (outcomes - 5, 1.0), (torch.full_like(outcomes, 2.0), 0.0)]:
        perfect = experience._replace(values=torch.where(mask, values, 0), rewards=rewards)
        assert metrics_of(perfect, gamma=0.5)["explained_variance"] == pytest.approx(expected, abs=1e-6)


def random_experience(scores, values):
    """Responses of three tokens that a score follows, no KL."""
    mask, nothing = torch.ones_like(values).bool(), torch.zeros_like(values)
    ids = torch.zeros_like(values).long()
    prompts = PromptBatch(ids, mask, ["x"] * len(scores), ids[:, 0])
    generation = Generation(ids, mask, mask[:, 0])
    measurements = Measurements(nothing, nothing, nothing, values, scores, importance=torch.ones_like(values))
    return build_experience(prompts, generation, measurements, scores, KLPenalty(), 0.5, Objective())


def test_values_that_know_nothing_of_the_score_explain_nothing_of_it():
    torch.manual_seed(0)
    scores, values = torch.randn(4000), torch.randn(4000, 3)
    for strength in (0.3, 1.0):
        explained = metrics_of(random_experience(scores, strength * values))["explained_variance"]
        assert explained == pytest.approx(-(strength**2), abs=0.05)  # they only add their own variance


@pytest.mark.parametrize("score", [0.0, 0.1, -3.0, 1e4, 10_000.1])
def test_there_is_nothing_to_explain_where_all_outcomes_are_alike(score):
    experience = random_experience(torch.full((7,), score), torch.randn(7, 3))
    assert metrics_of(experience)["explained_variance"] == 0


def test_little_is_explained_too_where_it_is_more_than_rounding():
    scores = 1e4 + torch.tensor([-0.1, 0.0, 0.1])
    experience = random_experience(scores, scores.unsqueeze(1).repeat(1, 3))
    assert metrics_of(experience)["explained_variance"] == 1


def test_raw_scores_are_those_before_calibration():
    scalar = table_scalar(SCORES)
    scalar.calibration = Calibration(mean=3.0, std=2.0)
    ids = torch.tensor([[0, 1], [0, EOS]])
    responses = Responses(ids, torch.ones_like(ids).bool(), torch.tensor([True, True]), ["", ""], ["", ""])
    for scorer in (ModelScorer(scalar), TextScorer(scalar, ChatEncoder(table_tokenizer()))):
        calibrated = ModelScorer(scalar)(responses)
        assert calibrated.tolist() == [-1.0, 0.5]
        assert raw_score(scorer, calibrated)["raw_score"].tolist() == [1.0, 4.0]
    assert raw_score(FunctionScorer(ScoringFunction(lambda prompts, responses: [0.0], "nothing")), calibrated) == {}


def test_metrics_of_two_processes_are_those_of_one():
    experience = by_hand(Objective())._replace(ended=torch.tensor([True, False]))
    shares = [experience.select(torch.tensor([row])) for row in range(2)]
    for metrics in in_two_threads(metrics_of, shares):
        assert metrics == pytest.approx(metrics_of(experience), rel=1e-5)
