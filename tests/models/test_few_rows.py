"""Products with few rows, taken the other way round, are the same products."""

import pytest
import torch
from torch import nn

from rlhf_lightning.models.few_rows import FEWEST, MOST, few_row_products


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (FEWEST,), (MOST,), (MOST + 1,), (2, 3), (4, 1), (0,)])
def test_the_product_is_that_of_the_layer(shape, bias):
    layer, inputs = nn.Linear(7, 5, bias=bias), torch.randn(*shape, 7)
    expected = layer(inputs)
    with few_row_products(nn.Sequential(layer)):
        found = layer(inputs)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_it_is_used_for_few_rows_only_and_the_layers_are_changed_back(monkeypatch):
    layer = nn.Linear(3, 3)
    calls = []
    monkeypatch.setattr(nn.functional, "linear", lambda x, *_: calls.append(len(x)) or x)
    with few_row_products(layer):
        for rows in (FEWEST - 1, FEWEST, MOST, MOST + 1):
            layer(torch.ones(rows, 3))
    assert calls == [FEWEST - 1, MOST + 1]
    assert "forward" not in vars(layer)


def test_other_types_and_layers_are_left_alone():
    half, quantized = nn.Linear(3, 3, dtype=torch.bfloat16), type("Quantized", (nn.Linear,), {})(3, 3)
    with few_row_products(nn.Sequential(half, quantized)):
        assert "forward" not in vars(half)
        assert "forward" not in vars(quantized)
        assert half(torch.ones(8, 3, dtype=torch.bfloat16)).dtype is torch.bfloat16
