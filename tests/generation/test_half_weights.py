"""Products with few rows read copies of the weights in half precision, and are right within its rounding."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from helpers.models import tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.half_weights import MOST, HalfWeights
from rlhf_lightning.generation.sampling import Sampling

EPSILON = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def layers():
    """Makes the same layer twice, of which the second one uses half weights."""
    with ExitStack() as stack:

        def make(bias=True, weights=torch.randn):
            plain, half = nn.Linear(7, 5, bias=bias), nn.Linear(7, 5, bias=bias)
            for mine, theirs in zip(plain.parameters(), half.parameters(), strict=True):
                mine.data.copy_(weights(*mine.shape))
                theirs.data.copy_(mine)
            stack.enter_context(HalfWeights(nn.Sequential(half)).used())
            return plain, half

        yield make


def whole_numbers(*shape):
    """Numbers whose products of seven and their sums bfloat16 holds."""
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (MOST, 7), (2, 2, 7), (1, 1, 7), (MOST + 1, 7), (0, 7)])
def test_products_of_what_bfloat16_holds_are_those_of_the_layer(layers, shape, bias):
    plain, half = layers(bias, whole_numbers)
    inputs = whole_numbers(*shape)
    assert torch.equal(half(inputs), plain(inputs))
    assert half(inputs).dtype is torch.float32


def test_few_rows_are_rounded_to_bfloat16_and_more_are_not(layers):
    torch.manual_seed(0)
    plain, half = layers()
    inputs = torch.randn(MOST + 1, 7)
    assert torch.equal(half(inputs), plain(inputs))
    for rows in range(1, MOST + 1):
        found, expected = half(inputs[:rows]), plain(inputs[:rows])
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < EPSILON * expected.norm()


def test_a_bias_is_added_in_float32(layers):
    plain, half = layers(weights=whole_numbers)
    for layer in (plain, half):
        layer.bias.data.fill_(1 / 3)
    inputs = whole_numbers(1, 7)
    assert torch.equal(half(inputs), plain(inputs))


class Scaled(nn.Linear):
    """A linear layer of somebody else's."""


def test_other_layers_types_and_devices_are_left_alone():
    wrapped, adapted = nn.Linear(7, 5), nn.Module()
    wrapped.forward = lambda inputs: inputs
    adapted.base_layer = nn.Linear(7, 5)
    elsewhere = [nn.Linear(7, 5, device="meta"), nn.Linear(7, 5, dtype=torch.float64)]
    others = [Scaled(7, 5), wrapped, *elsewhere, adapted.base_layer]
    kinds = [type(layer) for layer in others]
    with HalfWeights(nn.ModuleList([*others[:-1], adapted])).used():
        assert [type(layer) for layer in others] == kinds


def test_afterwards_the_layers_are_as_before_even_after_an_exception():
    layer = nn.Linear(7, 5)
    before = vars(layer).copy()
    half = HalfWeights(nn.Sequential(layer))
    with half.used():
        assert type(layer) is not nn.Linear
    with pytest.raises(RuntimeError), half.used():
        layer(torch.ones(1, 8))
    assert type(layer) is nn.Linear
    assert vars(layer) == before


def test_answers_are_written_from_them_and_prompts_are_not_read_from_them():
    model = tiny_causal_lm()
    rows = torch.arange(30, 38).view(MOST, 2)

    def answers(**options):
        engine = TransformersEngine(model, tiny_tokenizer(), **options)
        sampling = Sampling(temperature=0.0, max_new_tokens=3, min_new_tokens=3)
        return engine.generate(rows, torch.ones_like(rows).bool(), sampling, with_hidden=True)

    half, whole = answers(half_weights=True), answers()
    assert torch.equal(half.hidden[:, 0], whole.hidden[:, 0])
    assert torch.equal(half.response_ids[:, 0], whole.response_ids[:, 0])
    distance = (half.hidden[:, 1] - whole.hidden[:, 1]).norm()
    assert 0 < distance < 4 * EPSILON * whole.hidden[:, 1].norm()
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}
