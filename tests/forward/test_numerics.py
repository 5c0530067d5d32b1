"""How far two ways of computing the same may lie apart."""

import pytest
import torch

from helpers.models import tiny_causal_lm
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.numerics import (
    allowed_rounding,
    is_float32_exact,
    relative_distance,
    self_test,
    tolerance,
)

REAL = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("terms", [16, 4096])
def test_two_orders_of_the_same_sums_are_within_it(dtype, terms):
    """As one order and its reverse, number by number, which is the worst that a processor can do."""
    x = torch.randn(64, terms, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    ways = [order.cumsum(dim=1)[:, -1] for order in (x, x.flip(1))]
    assert relative_distance(*ways) < allowed_rounding(dtype, terms)


@pytest.mark.parametrize("dtype", REAL)
def test_it_stays_far_below_what_a_leak_does(dtype):
    assert allowed_rounding(dtype, terms=8192, sums=200) <= 0.1


def test_it_follows_the_precision_that_a_model_is_computed_in():
    model = tiny_causal_lm("llama")
    single = tolerance(model)
    assert single == pytest.approx(256 * 2**-23 * (model.config.hidden_size * 2 * 2) ** 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert tolerance(model) == 0.1
    assert tolerance(tiny_causal_lm("llama").to(torch.float64)) == single  # its norms are float32
    assert tolerance(tiny_causal_lm("llama").to(torch.float16)) == 0.1


@pytest.mark.parametrize(("precision", "exact"), [("highest", True), ("high", False), ("medium", False)])
def test_float32_that_is_not_computed_as_such_is_allowed_more(precision, exact):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert is_float32_exact("cuda") is is_float32_exact("cpu") is exact
        assert (tolerance(tiny_causal_lm("llama")) < 0.01) is exact
    finally:
        torch.set_float32_matmul_precision(before)


def test_distances_are_measured_in_the_precision_of_the_numbers():
    one = torch.ones(1, 3, dtype=torch.float64)
    assert 0 < relative_distance(one + 1e-12, one) < 1e-11


def test_a_self_test_runs_in_evaluation_without_gradients_or_autocast():
    model = tiny_causal_lm("llama").train()

    def look():
        return model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.autocast("cpu", torch.bfloat16):
        assert self_test(model, look) == (False, False, False)
    assert model.training


def fail(error):
    raise error


@pytest.mark.parametrize("error", [NotImplementedError("no"), AttributeError("no"), AssertionError("no")])
def test_a_self_test_returns_what_a_model_that_cannot_be_run_raises(error):
    assert self_test(tiny_causal_lm("llama"), lambda: fail(error)) is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), UserError("refused"), KeyboardInterrupt()])
def test_what_says_nothing_of_the_model_is_raised(error):
    """A process that is out of memory would otherwise go another way than the others."""
    model = tiny_causal_lm("llama").train()
    with pytest.raises(type(error)):
        self_test(model, lambda: fail(error))
    assert model.training
