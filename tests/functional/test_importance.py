"""Truncated importance weights, against numbers by hand."""

import pytest
import torch

from rlhf_lightning.functional import truncated_importance

POLICY = torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.6, 0.3]], dtype=torch.float64).log()
SAMPLER = torch.tensor([[0.25, 0.4, 0.1], [0.2, 0.5, 0.7]], dtype=torch.float64).log()
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_each_token_weighs_by_its_own_ratio_up_to_the_cap():
    found = truncated_importance(POLICY.requires_grad_(), SAMPLER, MASK, cap=3.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.5, 3.0], [0.5, 1.2, 1.0]], dtype=torch.float64))
    assert not found.requires_grad


def test_a_response_weighs_by_the_ratio_of_all_its_tokens():
    found = truncated_importance(POLICY, SAMPLER, MASK, cap=5.0, per_response=True)
    torch.testing.assert_close(found, torch.tensor([[5.0, 5.0, 5.0], [0.6, 0.6, 1.0]], dtype=torch.float64))


def test_weighted_means_over_draws_are_means_over_the_policy():
    policy, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    values = torch.tensor([1.0, -2.0, 4.0])
    drawn = torch.multinomial(sampler, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    weights = truncated_importance(policy[drawn].log(), sampler[drawn].log(), torch.ones(len(drawn), dtype=bool), 9.0)
    assert float((weights * values[drawn]).mean()) == pytest.approx(float(policy @ values), abs=0.02)
