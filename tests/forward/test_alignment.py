"""Which token is read where, on models whose every number is written by hand.

Vocabulary: 0 pad, 1 and 2 words, 3 EOS. The policy continues token i by token j with probability `P[i][j]`, so a
log-probability names the two positions it was computed from.
"""

import math

import pytest
import torch

from helpers.models import table_lm, table_scalar
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.models.scalar_lm import Calibration, response_values

EOS = 3
P = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.05, 0.15, 0.2, 0.6], [0.25, 0.35, 0.3, 0.1]]
SCALARS = [100.0, 1.0, 2.0, 30.0]

# name: prompt, response, then padded prompt length and padded response length.
CASES = {
    "ended": ([1, 2], [1, 2, EOS], 2, 3),
    "left padding": ([1, 2], [1, 2, EOS], 4, 3),
    "right padding": ([1, 2], [1, EOS], 2, 4),
    "both": ([2, 1, 1], [2, EOS], 5, 4),
    "full length without EOS": ([1, 2], [1, 2, 2], 3, 3),
    "only EOS": ([1, 2], [EOS], 3, 3),
    "one-token prompt": ([2], [1, 1, EOS], 1, 3),
    "one-token prompt, padded": ([2], [EOS], 3, 2),
    "prompt ends with EOS": ([1, EOS], [2, EOS], 3, 3),
}


def padded(prompt, response, width, length, pad_id):
    left, right = width - len(prompt), length - len(response)
    ids = [pad_id] * left + prompt + response + [pad_id] * right
    mask = [False] * left + [True] * (len(prompt) + len(response)) + [False] * right
    mask = torch.tensor([mask])
    return torch.tensor([ids]), mask, mask[:, width:]


@pytest.fixture(params=[0, EOS], ids=["own pad", "pad is EOS"])
def pad_id(request):
    return request.param


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, pad_id):
    prompt, response, width, length = request.param
    return prompt, response, padded(prompt, response, width, length, pad_id)


def by_hand(prompt, response, length, quantity):
    """`quantity(previous token, token)` for each response token, 0 after the last."""
    sequence = prompt + response
    before = sequence[len(prompt) - 1 : -1]
    numbers = [quantity(i, j) for i, j in zip(before, response, strict=True)]
    return numbers + [0.0] * (length - len(numbers))


def test_logprobs_come_from_the_position_before(case):
    prompt, response, (ids, mask, response_mask) = case
    logprobs, _ = response_logprobs(table_lm(P), ids, mask, response_mask)
    expected = by_hand(prompt, response, response_mask.shape[1], lambda i, j: math.log(P[i][j]))
    assert logprobs[0].tolist() == pytest.approx(expected)


def test_entropies_come_from_the_position_before(case):
    prompt, response, (ids, mask, response_mask) = case
    _, entropies = response_logprobs(table_lm(P), ids, mask, response_mask, with_entropy=True)
    expected = by_hand(prompt, response, response_mask.shape[1], lambda i, _: -sum(p * math.log(p) for p in P[i]))
    assert entropies[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_logprobs_are_of_the_distribution_that_is_sampled(pad_id):
    ids, mask, response_mask = padded([1], [2], 1, 1, pad_id)
    logprobs, _ = response_logprobs(table_lm(P), ids, mask, response_mask, temperature=0.5)
    # Half the temperature squares the probabilities after token 1: 0.01, 0.04, 0.09, 0.16 of 0.30.
    assert logprobs.item() == pytest.approx(math.log(0.09 / 0.30), rel=1e-5)


def test_values_are_those_before_the_token_is_chosen(case):
    prompt, response, (ids, mask, response_mask) = case
    values = response_values(table_scalar(SCALARS), ids, mask, response_mask)
    expected = by_hand(prompt, response, response_mask.shape[1], lambda i, _: SCALARS[i])
    assert values[0].tolist() == expected


def test_the_score_is_that_of_the_last_token_the_eos_if_there_is_one(case):
    _, response, (ids, mask, _) = case
    scalar = table_scalar(SCALARS)
    assert scalar.scores(ids, mask).tolist() == [SCALARS[response[-1]]]
    scalar.calibration = Calibration(mean=2.0, std=4.0)
    assert scalar.scores(ids, mask).tolist() == [(SCALARS[response[-1]] - 2.0) / 4.0]


def test_values_and_scores_are_on_one_scale():
    ids, mask, response_mask = padded([1, 2], [1, EOS], 3, 3, 0)
    value = table_scalar(SCALARS)
    value.calibration = Calibration(mean=2.0, std=4.0)
    assert response_values(value, ids, mask, response_mask).tolist() == [[0.0, -0.25, 0.0]]
    assert torch.equal(value(ids, mask), (value.raw(ids, mask) - 2.0) / 4.0)


def test_a_batch_of_all_cases_equals_each_alone(pad_id):
    examples = [padded(prompt, response, 5, 4, pad_id) for prompt, response, _, _ in CASES.values()]
    ids, mask, response_mask = (torch.cat(column) for column in zip(*examples, strict=True))
    policy, scalar = table_lm(P), table_scalar(SCALARS)
    together = [
        response_logprobs(policy, ids, mask, response_mask)[0],
        response_values(scalar, ids, mask, response_mask),
        scalar.scores(ids, mask),
    ]
    for row, example in enumerate(examples):
        assert torch.equal(response_logprobs(policy, *example)[0][0], together[0][row])
        assert torch.equal(response_values(scalar, *example)[0], together[1][row])
        assert torch.equal(scalar.scores(*example[:2])[0], together[2][row])
