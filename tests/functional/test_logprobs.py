"""Log-probabilities and entropies of given logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional import cross_entropy_sum, entropy, token_logprobs

PROBABILITIES = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.25, 0.5]])

vectors = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6)


def test_logprobs_by_hand():
    logprobs = token_logprobs(PROBABILITIES.log(), torch.tensor([2, 0]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.7), math.log(0.25)]))


def test_logits_are_divided_by_the_temperature():
    # Half the temperature squares the probabilities: 0.01, 0.04, 0.49 of 0.54.
    logprobs = token_logprobs(PROBABILITIES[:1].log(), torch.tensor([1]), temperature=0.5)
    assert logprobs.item() == pytest.approx(math.log(0.04 / 0.54), rel=1e-5)
    squared = torch.tensor([0.01, 0.04, 0.49]) / 0.54
    by_hand = -(squared * squared.log()).sum()
    torch.testing.assert_close(entropy(PROBABILITIES[:1].log(), temperature=0.5), by_hand.unsqueeze(0))


def test_entropy_by_hand():
    expected = -(0.1 * math.log(0.1) + 0.2 * math.log(0.2) + 0.7 * math.log(0.7))
    torch.testing.assert_close(entropy(PROBABILITIES.log()), torch.tensor([expected, 1.5 * math.log(2)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_reduced_in_float32(dtype):
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.tensor([0, 1, 2, 3])
    assert torch.equal(token_logprobs(logits, ids), token_logprobs(logits.float(), ids))
    assert torch.equal(entropy(logits), entropy(logits.float()))
    assert token_logprobs(logits, ids).dtype == entropy(logits).dtype == torch.float32


def test_leading_shape_is_free():
    logits, ids = torch.stack([PROBABILITIES.log(), PROBABILITIES.flip(1).log()]), torch.tensor([[2, 0], [1, 2]])
    flat = token_logprobs(logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(token_logprobs(logits, ids), flat.view(2, 2))
    torch.testing.assert_close(entropy(logits), entropy(logits.flatten(0, 1)).view(2, 2))


@given(vectors, st.floats(0.1, 5), st.floats(-50, 50))
def test_logprobs_against_plain_arithmetic(logits, temperature, shift):
    total = sum(math.exp(x / temperature - max(logits) / temperature) for x in logits)
    for token, x in enumerate(logits):
        expected = (x - max(logits)) / temperature - math.log(total)
        shifted = torch.tensor([logits]) + shift  # a constant on all logits changes nothing
        logprob = token_logprobs(shifted, torch.tensor([token]), temperature).item()
        assert logprob == pytest.approx(expected, abs=1e-3, rel=1e-4)


@given(vectors, st.floats(0.1, 5))
def test_entropy_is_the_expected_negative_logprob(logits, temperature):
    row = torch.tensor(logits)
    everywhere = token_logprobs(row.expand(len(row), -1), torch.arange(len(row)), temperature)
    expected = -(everywhere.exp() * everywhere).sum()
    torch.testing.assert_close(entropy(row, temperature), expected, atol=1e-4, rtol=1e-4)


def test_cross_entropy_is_a_sum_over_targets():
    targets = torch.tensor([2, 0])
    assert cross_entropy_sum(PROBABILITIES.log(), targets).item() == pytest.approx(-math.log(0.7) - math.log(0.25))
    assert cross_entropy_sum(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).item() == 0.0


def test_label_smoothing_spreads_the_target_over_the_vocabulary():
    # 0.3 of the target is spread over 3 tokens: weights 0.1, 0.1 and 0.7 + 0.1.
    expected = -(0.1 * math.log(0.1) + 0.1 * math.log(0.2) + 0.8 * math.log(0.7))
    loss = cross_entropy_sum(PROBABILITIES[:1].log(), torch.tensor([2]), label_smoothing=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
