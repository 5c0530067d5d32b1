"""Random numbers that depend on where a run is only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.rng import derive_seed, forked_rng, generator

CPU = torch.device("cpu")
parts = st.lists(st.one_of(st.integers(), st.text(max_size=4)), min_size=1, max_size=3)


@given(parts, parts)
def test_seeds_agree_exactly_when_their_parts_do(a, b):
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert 0 <= derive_seed(*a) < 2**63


def test_seeds_never_change_between_versions():
    assert derive_seed(1, "rollout", 2) == 7763091218668521687


def test_generators_of_one_place_agree():
    first, again, other = (torch.rand(4, generator=generator(CPU, 7, step)) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forked_numbers_are_seeded_and_leave_no_trace():
    state = torch.get_rng_state()
    with forked_rng(CPU, 3, "dropout"):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    with forked_rng(CPU, 3, "dropout"):
        assert torch.equal(torch.rand(4), first)
    with forked_rng(CPU, 4, "dropout"):
        assert not torch.equal(torch.rand(4), first)


def test_the_state_comes_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(KeyError), forked_rng(CPU, 1):
        raise KeyError(torch.rand(1))
    assert torch.equal(torch.get_rng_state(), state)
