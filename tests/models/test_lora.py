"""Adapters beside frozen weights, and the plain weights that compute the same."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from helpers.lora import adapted, stirred, trained
from helpers.models import tiny_causal_lm, tiny_classifier
from rlhf_lightning import FineTune, UserError
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.output_layer import output_logits
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.merging import merged_state

IDS = torch.tensor([[40, 41, 42, 43, 44]])
FEW = ["llama", "gpt-neox", "gpt2", "opt"]
TIED = {"gpt2", "opt", "gpt-neo", "falcon", "bloom", "gemma", "gemma2", "cohere"}


@pytest.mark.parametrize("make", [tiny_causal_lm, tiny_classifier])
@pytest.mark.parametrize("family", FEW)
def test_fresh_adapters_change_nothing_and_only_they_get_a_gradient(family, make):
    plain, model = make(family), adapted(make(family))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert type(model) is type(plain)
    model(IDS).logits.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    linear = {name for name, module in plain.base_model.named_modules() if hasattr(module, "weight")}
    expected = {n for n in linear if len(plain.base_model.get_submodule(n).weight.shape) == 2 and "embed" not in n}
    prefix = f"{plain.base_model_prefix}."
    assert layers == {prefix + name for name in expected if not re.fullmatch(r".*wte|.*wpe", name)}


@pytest.mark.parametrize("family", FEW)
def test_backbone_and_output_layer_stay_where_they_are(family):
    model = stirred(adapted(tiny_causal_lm(family)))
    hidden = hidden_states(model, IDS, torch.ones_like(IDS).bool())
    torch.testing.assert_close(output_logits(model, hidden), model(IDS).logits, atol=1e-5, rtol=0)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_adapters_depend_on_the_seed_alone():
    first = adapted(tiny_causal_lm())
    torch.rand(5)
    again, other = adapted(tiny_causal_lm()), adapted(tiny_causal_lm(), seed=99)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    spread = first.get_parameter(name).abs().max()
    assert 0.2 < spread <= 16**-0.5


VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "both": {"use_dora": True, "use_rslora": True},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [  # Float64 shows that they are equal; float32 may differ by its epsilon for each of some hundred roundings.
        (tiny_causal_lm, torch.float64, 1e-12),
        (tiny_classifier, torch.float64, 1e-12),
        (tiny_causal_lm, torch.float32, 400 * 2**-23),  # a classifier's layers are the same
    ],
)
@pytest.mark.parametrize("family", FEW)
def test_merged_weights_compute_the_same_and_training_weights_stay_bit_for_bit(family, make, variant, dtype, tolerance):
    model = stirred(adapted(make(family).to(dtype), FineTune("lora", rank=4, **VARIANTS[variant])))
    before = copy.deepcopy(model.state_dict())
    merged = merged_state(model, model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    plain = make(family).to(dtype)
    untrained = plain(IDS).logits
    plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=tolerance, rtol=tolerance)
    assert (untrained - plain(IDS).logits).abs().max() > 1e-3


def test_a_merged_state_shares_what_was_not_merged():
    model = adapted(tiny_causal_lm("gpt2"))
    state = merged_state(model, weights := model.state_dict())
    assert state["transformer.wte.weight"] is weights["transformer.wte.weight"]
    plain = tiny_causal_lm().state_dict()
    assert merged_state(tiny_causal_lm(), plain) == plain


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 12), alpha=st.floats(0.1, 64), rslora=st.booleans(), seed=st.integers(0, 9))
def test_merging_by_hand(rank, alpha, rslora, seed):
    model = stirred(adapted(tiny_causal_lm("llama", seed), FineTune("lora", rank, alpha, use_rslora=rslora)))
    state = model.state_dict()
    name = "model.layers.1.self_attn.q_proj"
    a, b = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
    scaling = alpha / (rank**0.5 if rslora else rank)
    expected = state[f"{name}.base_layer.weight"] + scaling * (b @ a)
    torch.testing.assert_close(merged_state(model, state)[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)


def test_adapters_beside_bfloat16_are_float32():
    model = adapted(tiny_classifier().to(torch.bfloat16))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora" not in name} == {torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16
    assert {t.dtype for t in merged_state(model, model.state_dict()).values()} == {torch.bfloat16}


def test_dropout_of_adapters_is_off_unless_asked_for():
    for dropout in (0.0, 0.5):
        model = stirred(adapted(tiny_causal_lm(), FineTune("lora", dropout=dropout))).train()
        with torch.random.fork_rng([]):
            assert torch.equal(model(IDS).logits, model(IDS).logits) is (dropout == 0)


@pytest.mark.parametrize(
    ("targets", "adapted_layers"),
    [(["q_proj", "v_proj"], {"q_proj", "v_proj"}), (r".*layers\.1\..*(up|down)_proj", {"up_proj", "down_proj"})],
)
def test_targets_are_chosen_by_name(targets, adapted_layers):
    model = adapted(tiny_causal_lm(), FineTune("lora", target_modules=targets))
    names = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert {name.rpartition(".")[2] for name in names} == adapted_layers
    assert isinstance(targets, list) or all(".1." in name for name in names)


def test_an_untied_output_layer_may_have_an_adapter():
    model = stirred(adapted(tiny_causal_lm().double(), FineTune("lora", target_modules=["lm_head"])))
    plain = tiny_causal_lm().double()
    plain.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (
            tiny_causal_lm,
            ["q_proj", "qproj"],
            r"no layer is called 'qproj'; there are down_proj, .*, q_proj, up_proj, v_",
        ),
        (
            tiny_causal_lm,
            "q_proj",
            r"no layer is called 'q_proj'; a string is a regular expression for whole names; th",
        ),
        (tiny_causal_lm, ["mlp"], r"'model.layers.0.mlp' is not a linear layer; there are down_proj"),
        (tiny_causal_lm, ["embed_tokens"], r"'model.embed_tokens' is not a linear layer"),
        (tiny_classifier, ["score"], r"'score' can have no adapter, it is trained as a whole; leave it out"),
    ],
)
def test_targets_that_cannot_be(make, targets, message):
    with pytest.raises(UserError, match=message) as error:
        adapted(make(), FineTune("lora", target_modules=targets))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_output_layer_can_have_no_adapter(family):
    with pytest.raises(UserError, match="'lm_head' can have no adapter, it is tied to the input embeddings"):
        adapted(tiny_causal_lm(family), FineTune("lora", target_modules=["lm_head"]))


def test_add_adapter_does_nothing_in_other_modes():
    model = tiny_causal_lm()
    before = list(model.state_dict())
    add_adapter(model, FineTune("last_layer"))
    assert list(model.state_dict()) == before
