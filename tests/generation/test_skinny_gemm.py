"""Products with few rows, taken the other way round, are the same products, and taken only where they should be.

Weights and inputs are small whole numbers, whose products and sums float32 holds exactly in whatever order: equal means
equal, on every processor.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers.models import tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.generation.skinny_gemm import FEWEST, MOST, skinny_gemm

FEW = torch.ones(FEWEST, 7)


def whole_numbers(*shape):
    return torch.randint(-8, 9, shape).float()


def linear(bias=True, **options):
    layer = nn.Linear(7, 5, bias=bias)
    for parameter in layer.parameters():
        parameter.data.copy_(whole_numbers(*parameter.shape))
    return layer.to(**options)


@pytest.fixture
def plain_products(monkeypatch):
    """Rows of each product that was taken the usual way."""
    calls = []
    product = nn.functional.linear

    def watched(inputs, *weights):
        calls.append(inputs.numel() // inputs.shape[-1])
        return product(inputs, *weights)

    monkeypatch.setattr(nn.functional, "linear", watched)
    return calls


def results(layer, inputs):
    """The output and all gradients."""
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    (output * torch.arange(output.numel()).view_as(output)).sum().backward()
    return output, inputs.grad, *(parameter.grad.clone() for parameter in layer.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (FEWEST,), (MOST,), (MOST + 1,), (2, 3), (4, 1), (0,)])
def test_products_and_gradients_are_those_of_the_layer_in_double_precision(shape, bias, training):
    layer, inputs = linear(bias).train(training), whole_numbers(*shape, 7)
    twin = linear(bias, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    expected = results(twin, inputs.double())
    with skinny_gemm(nn.Sequential(layer)):
        found = results(layer, inputs)
    assert found[0].is_contiguous()
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.double(), theirs)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_used_for_few_rows_only(training, plain_products):
    layer = linear().train(training)
    with skinny_gemm(layer):
        for rows in (0, FEWEST - 1, FEWEST, MOST, MOST + 1):
            layer(torch.ones(rows, 7))
            layer(torch.ones(1, rows, 7))
    assert plain_products == [rows for rows in (0, FEWEST - 1, MOST + 1) for _ in range(2)]


def test_afterwards_the_layers_are_as_before(plain_products):
    layers = nn.Sequential(linear(), nn.Sequential(linear()))
    with skinny_gemm(layers):
        assert [layer(FEW).shape for layer in (layers[0], layers[1][0])] == [(FEWEST, 5)] * 2
    assert not plain_products
    assert [type(layer) for layer in (layers[0], layers[1][0])] == [nn.Linear] * 2
    layers[0](FEW)
    layers[1][0](FEW)
    assert plain_products == [FEWEST] * 2


def test_also_after_an_exception(plain_products):
    layer = linear()
    with pytest.raises(KeyError), skinny_gemm(layer):
        raise KeyError
    layer(FEW)
    assert type(layer) is nn.Linear
    assert plain_products == [FEWEST]


def test_the_inner_of_two_blocks_takes_nothing_from_the_outer_one(plain_products):
    layer, other = linear(), linear()
    with skinny_gemm(layer):
        with skinny_gemm(nn.Sequential(layer, other)):
            layer(FEW)
            other(FEW)
        assert not plain_products
        layer(FEW)
        assert not plain_products
        other(FEW)
        assert plain_products == [FEWEST]
    layer(FEW)
    assert plain_products == [FEWEST] * 2


class Scaled(nn.Linear):
    """A linear layer of somebody else's."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_alone(dtype, plain_products):
    layer = linear(dtype=dtype)
    with skinny_gemm(layer):
        assert type(layer) is nn.Linear
        assert layer(FEW.to(dtype)).dtype is dtype
    assert plain_products == [FEWEST]


def test_other_layers_and_devices_are_left_alone(plain_products):
    theirs, wrapped, elsewhere = Scaled(7, 5), linear(), linear(device="meta")
    wrapped.forward = lambda inputs: inputs + 1
    with skinny_gemm(nn.Sequential(theirs, wrapped, elsewhere)):
        assert [type(layer) for layer in (theirs, wrapped, elsewhere)] == [Scaled, nn.Linear, nn.Linear]
        theirs(FEW)
        assert torch.equal(wrapped(FEW), FEW + 1)
        elsewhere(FEW.to("meta"))
    assert plain_products == [FEWEST] * 2
    assert type(theirs) is Scaled


def test_under_autocast_the_layer_gives_what_it_always_gives(plain_products):
    layer = linear()
    with skinny_gemm(layer), torch.autocast("cpu", torch.bfloat16):
        assert layer(FEW).dtype is torch.bfloat16
    assert plain_products == [FEWEST]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_generation_takes_its_products_this_way_and_leaves_no_trace(training, fails, plain_products):
    model = tiny_causal_lm().train(training)
    engine = TransformersEngine(model, tiny_tokenizer())
    ids = torch.arange(30, 30 + 2 * FEWEST).view(FEWEST, 2)

    def on_token(done):
        if fails:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        engine.generate(ids, torch.ones_like(ids).bool(), Sampling(max_new_tokens=3), on_token=on_token)
    assert not [rows for rows in plain_products if FEWEST <= rows <= MOST]
    model(ids)
    assert plain_products[-1] == ids.numel()
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
