"""LoRA layers that add in place compute what PEFT's layers compute."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from helpers.models import tiny_causal_lm
from rlhf_lightning import FineTune
from rlhf_lightning.models import fused_lora
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.fused_lora import FusedLoraLinear, fuse_adapters
from rlhf_lightning.models.lora import add_adapter


def adapted(outputs=5, inputs=7, bias=True, dtype=torch.float64, **options):
    """A linear layer with an adapter whose B is not zero, as PEFT makes it."""
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["0"], **options})
    inject_adapter_in_model(config, model, "one")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def uses(monkeypatch):
    """Counts how often the quick way is taken."""
    calls = []
    apply = fused_lora._FusedLora.apply
    monkeypatch.setattr(fused_lora._FusedLora, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def results(model, inputs):
    model.zero_grad()
    inputs = inputs.clone().requires_grad_()
    output = model(inputs)
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "inputs": inputs.grad, **gradients}


@given(
    st.sampled_from([(4,), (2, 3), (1, 1, 2)]), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans()
)
def test_output_and_gradients_are_those_of_peft(shape, inputs, outputs, rank, bias):
    plain = adapted(outputs, inputs, bias, r=rank)
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    x = torch.randn(*shape, inputs, dtype=torch.float64)
    expected, found = results(plain, x), results(fused, x)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_by_hand(uses):
    model = adapted(lora_alpha=6)
    fuse_adapters(model)
    layer, x = model[0], torch.randn(4, 7, dtype=torch.float64)
    a, b = layer.lora_A["one"].weight, layer.lora_B["one"].weight
    expected = x @ (layer.base_layer.weight + 2 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(model(x), expected)
    assert len(uses) == 1


def test_frozen_inputs_and_frozen_adapters_get_no_gradient():
    model = adapted()
    fuse_adapters(model)
    model[0].lora_A["one"].weight.requires_grad_(False)
    x = torch.randn(4, 7, dtype=torch.float64)
    model(x).sum().backward()
    assert x.grad is None
    assert model[0].lora_A["one"].weight.grad is None
    assert model[0].lora_B["one"].weight.grad is not None


UNUSUAL = {
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "a bias of its own": {"lora_bias": True},
}


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_adapters_are_left_to_peft(options, uses):
    plain = adapted(**options).train()
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(fused(x), expected)
    assert not uses


def test_other_types_are_left_to_peft(uses):
    half = adapted(dtype=torch.bfloat16)
    cast_adapter_dtype(half, "one")  # as add_adapter does
    fuse_adapters(half)
    assert half(torch.ones(4, 7, dtype=torch.bfloat16)).dtype is torch.bfloat16
    whole = adapted(dtype=torch.float32)
    fuse_adapters(whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert whole(torch.ones(4, 7)).dtype is torch.bfloat16
    assert not uses


def test_a_trained_base_gets_its_gradient(uses):
    model = adapted()
    fuse_adapters(model)
    model[0].base_layer.weight.requires_grad_(True)
    model(torch.ones(4, 7, dtype=torch.float64)).sum().backward()
    assert model[0].base_layer.weight.grad.ne(0).any()
    assert not uses


def test_adapters_can_be_switched_off_merged_and_joined(uses):
    model = adapted()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, "two")
    fuse_adapters(model)
    layer, x = model[0], torch.randn(4, 7, dtype=torch.float64)
    layer.enable_adapters(False)
    torch.testing.assert_close(model(x), layer.base_layer(x))
    layer.enable_adapters(True)
    nn.init.normal_(layer.lora_B["two"].weight)
    outputs = {}
    for name in ("one", "two"):
        layer.set_adapter(name)
        outputs[name] = model(x)
    assert len(uses) == 2
    layer.set_adapter(["one", "two"])
    torch.testing.assert_close(model(x), outputs["one"] + outputs["two"] - layer.base_layer(x))
    layer.set_adapter("one")
    layer.merge()
    torch.testing.assert_close(model(x), outputs["one"])
    assert len(uses) == 2


def test_every_adapter_of_a_model_is_one_and_its_weights_are_called_the_same(uses):
    model = tiny_causal_lm()
    names = FineTune("lora", rank=2)
    choose_trained(model, names)
    add_adapter(model, names)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    assert {type(layer) for layer in layers} == {FusedLoraLinear}
    keys = list(model.state_dict())
    for layer in layers:
        layer.__class__ = LoraLinear
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    fuse_adapters(twin)
    ids = torch.arange(6).view(1, 6)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits)
    assert len(uses) == len(layers)


def test_split_weights_are_left_to_peft(monkeypatch):
    monkeypatch.setattr(fused_lora, "is_sharded", lambda model: True)
    model = adapted()
    fuse_adapters(model)
    assert type(model[0]) is LoraLinear
