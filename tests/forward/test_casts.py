"""Weights cast once for many passes under autocast: the same numbers to the last bit, from fewer casts."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.answers import generate
from helpers.lora import adapted, stirred
from helpers.models import FAMILIES, WITHOUT_CLASSIFIER, tiny_causal_lm, tiny_classifier
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.forward import casts
from rlhf_lightning.forward.casts import CastWeights, cast_once, own_weights
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.numerics import self_test
from rlhf_lightning.forward.output_layer import cross_entropy_at, logprobs_from_hidden
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.sharing import frozen_twin

IDS = torch.arange(30, 60).reshape(3, 2, 5)  # three micro-batches
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


class CastsOf(TorchDispatchMode):
    """How often each of some weights is cast."""

    def __init__(self, model):
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        self.times = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::_to_copy" and args[0].data_ptr() in self.names:
            self.times[self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast():
    """As Lightning's, which keeps no casts."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        yield


def test_weights_that_two_models_hold_are_cast_once_for_both():
    model = tiny_causal_lm("llama").requires_grad_(False)
    twin = frozen_twin(model)
    kept = CastWeights(model, twin)
    for _ in range(2):  # the second time the casts are written over
        with autocast():
            expected = hidden_states(twin, IDS[0], MASK)
            with CastsOf(model) as seen, kept.used():
                found = [hidden_states(each, IDS[0], MASK) for each in (model, twin)]
        assert torch.equal(found[1], expected)
        assert set(seen.times.values()) <= {1}
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1)


def gradients(model, loss, once):
    """Losses of three micro-batches and the sum of their gradients."""
    model.zero_grad()
    losses = []
    with torch.random.fork_rng([]), autocast(), cast_once(model) if once else nullcontext():
        torch.manual_seed(0)  # of dropout
        for ids in IDS:
            losses.append(loss(model, ids))
            losses[-1].backward()
    return losses, {name: weight.grad for name, weight in model.named_parameters()}


def language_loss(model, ids):
    hidden = hidden_states(model, ids, MASK)
    loss, _ = cross_entropy_at(model, hidden[:, :-1], ids[:, 1:], MASK[:, 1:])
    logprobs, _ = logprobs_from_hidden(model, hidden[:, :-1], ids, MASK[:, 1:])
    return loss + logprobs.square().sum()


def score_loss(model, ids):
    return model(ids, MASK).square().sum()


def assert_same(found, expected):
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert torch.equal(ours, theirs)
    for name, gradient in expected[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        assert gradient is None or torch.equal(found[1][name], gradient), name
        assert gradient is None or gradient.dtype is torch.float32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_plain_autocast(family, tied):
    model = tiny_causal_lm(family, tie_word_embeddings=tied).train()
    assert_same(gradients(model, language_loss, once=True), gradients(model, language_loss, once=False))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_CLASSIFIER])
def test_so_are_those_of_a_scalar_model_whose_head_stays_in_float32(family):
    model = ScalarLM(tiny_classifier(family))
    expected = gradients(model, score_loss, once=False)
    assert_same(gradients(model, score_loss, once=True), expected)
    with autocast(), cast_once(model):
        assert model.model.score.weight.dtype is torch.float32


def test_so_are_those_of_adapters_on_a_frozen_base():
    model = stirred(adapted(tiny_causal_lm()))
    assert_same(gradients(model, language_loss, once=True), gradients(model, language_loss, once=False))


def test_each_weight_is_cast_once():
    model = tiny_causal_lm(tie_word_embeddings=False)
    linear = {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    with CastsOf(model) as seen:
        gradients(model, language_loss, once=True)
    assert seen.times == dict.fromkeys(linear, 1)
    with CastsOf(model) as seen:
        gradients(model, language_loss, once=False)
    assert seen.times == {name: 6 if name == "lm_head.weight" else 3 for name in linear} | {"lm_head.weight": 9}


def test_a_rollout_casts_each_weight_once_and_draws_the_same():
    model, prompts = tiny_causal_lm(), IDS[0]
    sampling = Sampling(max_new_tokens=6, min_new_tokens=6)

    def answer():
        with autocast(), CastsOf(model) as seen:
            source = torch.Generator().manual_seed(0)
            generation = generate(model, prompts, MASK.flip(1), sampling, tiny_tokenizer(), generator=source)
        return generation.response_ids, seen.times

    answer()  # the model is tested before its first use
    found, times = answer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts.CastWeights, "used", lambda self: nullcontext())
        expected, plain_times = answer()
    assert torch.equal(found, expected)
    assert set(times.values()) == {1}
    assert set(plain_times.values()) == {6}


def test_optimizers_and_state_dicts_keep_seeing_the_weights_themselves():
    model = tiny_causal_lm()
    before = {name: weight.data_ptr() for name, weight in model.state_dict(keep_vars=True).items()}

    def raise_inside():
        with autocast(), cast_once(model):
            assert {name: weight.data_ptr() for name, weight in model.state_dict(keep_vars=True).items()} == before
            assert {weight.dtype for weight in model.parameters()} == {torch.float32}
            raise KeyError

    with pytest.raises(KeyError):
        raise_inside()
    assert not any({"weight", casts.PRODUCT_WEIGHT} & vars(layer).keys() for layer in model.modules())


def test_self_tests_see_the_weights_themselves():
    model = tiny_causal_lm()
    layer = model.model.layers[0].mlp.up_proj

    def test():
        assert layer.weight.dtype is torch.float32
        return layer(torch.ones(1, 16)).dtype

    with autocast(), cast_once(model):
        assert self_test(model, test) is torch.float32
        assert layer.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("where", [nullcontext, lambda: torch.autocast("cpu", enabled=False)])
def test_nothing_is_cast_without_autocast(where):
    model = tiny_causal_lm()
    with where(), cast_once(model):
        assert not any("weight" in vars(layer) for layer in model.modules())


def test_weights_of_half_precision_are_not_cast():
    model = tiny_causal_lm().bfloat16()
    with autocast(), cast_once(model):
        assert not any("weight" in vars(layer) for layer in model.modules())


@torch.no_grad()
def test_casts_that_are_kept_follow_the_weights_without_moving():
    model = tiny_causal_lm()
    layer, kept = model.model.layers[0].mlp.up_proj, CastWeights(model)
    with autocast(), kept.used():
        place = layer.weight.data_ptr()
    layer.weight.mul_(2)
    with autocast(), kept.used():
        assert layer.weight.data_ptr() == place
        assert torch.equal(layer.weight, layer._parameters["weight"].bfloat16())
        with own_weights(model):
            assert layer.weight is layer._parameters["weight"]


def test_gradients_reach_the_weights_of_a_layer_before_those_of_the_layers_below():
    model, arrived = tiny_causal_lm(), []
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    gradients(model, language_loss, once=True)
    blocks = [int(name.split(".")[2]) for name in arrived if ".layers." in name]
    assert blocks == [*([1] * 9 + [0] * 9), *([1] * 9 + [0] * 9), *([1] * 9 + [0] * 9)]
