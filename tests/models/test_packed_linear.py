"""Products with packed weights are the same products."""

import pytest
import torch
from torch import nn

from rlhf_lightning.models import packed_linear
from rlhf_lightning.models.packed_linear import FEWEST, MOST, packed_products

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="packing is oneDNN's")


@needs_onednn
def test_weights_can_be_packed_where_there_is_onednn_and_asking_draws_nothing():
    before = torch.get_rng_state()
    packed_linear._can_pack.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert packed_linear._can_pack()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (FEWEST,), (8,), (MOST,), (MOST + 1,), (2, 3), (4, 1), (2, 2, 4), (0,)])
def test_the_product_is_that_of_the_layer(shape, bias):
    layer, inputs = nn.Linear(7, 5, bias=bias), torch.randn(*shape, 7)
    expected = layer(inputs)
    with packed_products(nn.Sequential(layer)):
        found = layer(inputs)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_batch_may_shrink_and_grow():
    layer = nn.Linear(7, 5)
    with packed_products(layer):
        for rows in (32, 31, 25, 24, 5, 4, 3, 9, 32):
            inputs = torch.randn(rows, 1, 7)
            torch.testing.assert_close(layer(inputs), inputs @ layer.weight.T + layer.bias)


@torch.no_grad()
def test_inputs_may_be_slices():
    layer, inputs = nn.Linear(7, 5), torch.randn(8, 3, 7)
    with packed_products(layer):
        found = layer(inputs[:, -1])
    torch.testing.assert_close(found, layer(inputs[:, -1]))


@needs_onednn
@torch.no_grad()
def test_it_is_used_for_few_rows_only_and_the_layers_are_changed_back(monkeypatch):
    layer = nn.Linear(3, 3)
    packed_linear._can_pack()
    calls = []
    monkeypatch.setattr(nn.functional, "linear", lambda x, *_: calls.append(len(x)) or x)
    with packed_products(layer):
        for rows in (FEWEST - 1, FEWEST, MOST, MOST + 1):
            layer(torch.ones(rows, 3))
    assert calls == [FEWEST - 1, MOST + 1]
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_the_layers_are_changed_back_after_an_error_and_see_new_weights():
    layer, inputs = nn.Linear(3, 3, bias=False), torch.ones(8, 3)
    with pytest.raises(RuntimeError, match="shape"), packed_products(nn.Sequential(layer)):
        layer(inputs) @ inputs  # [8, 3] and [8, 3]
    layer.weight.zero_()
    with packed_products(layer):
        assert layer(inputs).eq(0).all()


@torch.no_grad()
def test_other_types_and_layers_are_left_alone():
    half, quantized = nn.Linear(3, 3, dtype=torch.bfloat16), type("Quantized", (nn.Linear,), {})(3, 3)
    with packed_products(nn.Sequential(half, quantized)):
        assert "forward" not in vars(half)
        assert "forward" not in vars(quantized)
        assert half(torch.ones(8, 3, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_it_stays_away_from_gradients_and_autocast(monkeypatch):
    layer = nn.Linear(3, 3)
    with packed_products(layer):
        assert layer(torch.ones(8, 3)).requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), packed_products(layer):
        assert layer(torch.ones(8, 3)).dtype is torch.bfloat16


@torch.no_grad()
def test_without_the_operators_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(packed_linear, "_can_pack", lambda: False)
    layer = nn.Linear(3, 3)
    with packed_products(layer):
        assert "forward" not in vars(layer)


@torch.no_grad()
def test_split_weights_are_left_alone():
    layer = nn.Linear(3, 3)
    layer.weight.ds_id = 0  # as DeepSpeed marks what it has split
    with packed_products(nn.Sequential(layer)):
        assert "forward" not in vars(layer)
