"""Loss and log-probabilities of every family, chunk by chunk, and through output layers that are not plain."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.models import FAMILIES, LAYOUTS, tiny_causal_lm
from rlhf_lightning.forward import output_layer
from rlhf_lightning.forward.hidden import hidden_states, response_logprobs
from rlhf_lightning.forward.output_layer import cross_entropy_at, output_logits
from rlhf_lightning.functional import cross_entropy_sum, entropy, linear_loss, token_logprobs

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.arange(30, 48).reshape(2, 9)
MASK = torch.ones_like(IDS).bool()
RESPONSE_MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
WEIGHTS = torch.linspace(-1, 2, 10).reshape(2, 5)  # a gradient of its own for each token


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three rows at once."""
    for module in (linear_loss, output_layer):
        monkeypatch.setattr(module, "rows_on", lambda device, vocab_size: 3)


def gradients(model, value):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(value, parameters, allow_unused=True)


def plain_logits(model):
    """Logits that predict the last five tokens."""
    return output_logits(model, hidden_states(model, IDS, MASK)[:, -6:-1])


def assert_logprobs_are_plain(model):
    ours, entropies = response_logprobs(model, IDS, MASK, RESPONSE_MASK, temperature=0.7, with_entropy=True)
    logits = plain_logits(model)
    theirs = token_logprobs(logits, IDS[:, -5:], 0.7) * RESPONSE_MASK
    torch.testing.assert_close(ours, theirs, **LAYOUTS)
    torch.testing.assert_close(entropies, entropy(logits, 0.7) * RESPONSE_MASK, **LAYOUTS)
    mine, plain = gradients(model, (WEIGHTS * ours).sum()), gradients(model, (WEIGHTS * theirs).sum())
    torch.testing.assert_close(mine, plain, **LAYOUTS)


def assert_cross_entropy_is_plain(model, smoothing):
    hidden = hidden_states(model, IDS, MASK)[:, -6:-1]
    loss, nll = cross_entropy_at(model, hidden, IDS[:, -5:], RESPONSE_MASK, smoothing)
    logits, targets = plain_logits(model)[RESPONSE_MASK], IDS[:, -5:][RESPONSE_MASK]
    expected = cross_entropy_sum(logits, targets, smoothing)
    torch.testing.assert_close(loss.double(), expected.double(), **LAYOUTS)
    torch.testing.assert_close(nll.double(), cross_entropy_sum(logits, targets).detach().double(), **LAYOUTS)
    assert not nll.requires_grad
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), **LAYOUTS)


@EVERY_FAMILY
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_and_their_gradients_are_those_of_the_logits(family, tied):
    assert_logprobs_are_plain(tiny_causal_lm(family, tie_word_embeddings=tied).double())


@EVERY_FAMILY
def test_cross_entropy_and_its_gradients_are_those_of_the_logits(family):
    assert_cross_entropy_is_plain(tiny_causal_lm(family).double(), smoothing=0.1)


@pytest.mark.parametrize("family", ["phi", "gemma2"])
def test_an_adapter_on_the_output_layer_is_not_passed_by(family):
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_causal_lm(family, tie_word_embeddings=False), config).base_model.model.double().eval()
    assert type(model.get_output_embeddings()) is not nn.Linear
    assert_logprobs_are_plain(model)
    assert_cross_entropy_is_plain(model, smoothing=0.1)
    assert_cross_entropy_is_plain(model, smoothing=0.0)


class OtherLinear(nn.Linear):
    """Not a plain layer, as far as anybody can tell."""


def with_counted_calls(model):
    hidden_states(model, IDS, MASK)  # a model is tried out before its first use
    calls = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: calls.append(args[0].shape[:-1].numel())
    )
    return calls


def other_head(model):
    head = model.get_output_embeddings()
    head.__class__ = OtherLinear
    return head


def test_any_other_output_layer_is_called_chunk_by_chunk_and_again_in_the_backward_pass():
    model = tiny_causal_lm("llama", tie_word_embeddings=False)
    other_head(model)
    calls = with_counted_calls(model)
    logprobs, _ = response_logprobs(model, IDS, MASK, RESPONSE_MASK)
    assert calls == [3, 3, 2]
    logprobs.sum().backward()
    assert len(calls) == 6


def test_a_forward_that_somebody_put_there_is_used_and_stays():
    model = tiny_causal_lm("llama", tie_word_embeddings=False).double()
    head = model.get_output_embeddings()

    def doubled(hidden):
        return nn.functional.linear(hidden, head.weight) * 2

    head.forward = doubled
    assert_logprobs_are_plain(model)
    assert_cross_entropy_is_plain(model, smoothing=0.0)
    assert head.forward is doubled


def test_double_precision_is_handed_back_in_float32():
    ours = [
        response_logprobs(model, IDS, MASK, RESPONSE_MASK, with_entropy=True)
        for model in (tiny_causal_lm("llama"), tiny_causal_lm("llama").double())
    ]
    torch.testing.assert_close(*ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plain", [True, False])
def test_a_partitioned_output_layer_is_called_once_however_many_rows(plain):
    model = tiny_causal_lm("llama", tie_word_embeddings=False).double()
    head = model.get_output_embeddings() if plain else other_head(model)
    head.weight.ds_id = 7  # as DeepSpeed marks what ZeRO-3 splits
    calls = with_counted_calls(model)
    assert_logprobs_are_plain(model)
    nothing = torch.zeros_like(RESPONSE_MASK)
    logprobs, _ = response_logprobs(model, IDS, MASK, nothing)
    loss, nll = cross_entropy_at(model, hidden_states(model, IDS, MASK)[:, -6:-1], IDS[:, -5:], nothing)
    assert calls == [8, 10, 0, 0]  # the second is the plain version's
    assert not logprobs.any()
    assert loss.item() == nll.item() == 0.0
    (logprobs.sum() + loss).backward()


@torch.no_grad()
def test_the_weight_may_exist_only_while_the_output_layer_is_called():
    model = tiny_causal_lm("llama", tie_word_embeddings=False)
    expected, _ = response_logprobs(model, IDS, MASK, RESPONSE_MASK)
    head = model.get_output_embeddings()
    whole, nothing = head.weight.data, torch.empty(0)

    def swap(data):
        head.weight.data = data

    swap(nothing)
    head.register_forward_pre_hook(lambda *_: swap(whole))
    head.register_forward_hook(lambda *_: swap(nothing))
    assert torch.equal(response_logprobs(model, IDS, MASK, RESPONSE_MASK)[0], expected)
    assert "forward" not in vars(head)
