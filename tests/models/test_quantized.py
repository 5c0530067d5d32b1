"""Weights in four bits say the same on every processor, in evaluation and in training, or are refused in one line."""

import logging

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from helpers.models import tiny_causal_lm
from helpers.stages import save_llama, save_reward_model
from rlhf_lightning import UserError, load_causal_lm, load_reward_model
from rlhf_lightning.forward.numerics import tolerance
from rlhf_lightning.models.quantized import settle_nf4

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


@pytest.fixture
def bfloat16_processor(monkeypatch):
    """bitsandbytes takes this processor for one that multiplies in bfloat16."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def test_processors_with_bfloat16_instructions_compute_what_the_others_do(folder, bfloat16_processor, monkeypatch):
    found = load_causal_lm(folder, nf4=True)
    monkeypatch.undo()
    expected = load_causal_lm(folder, nf4=True)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=0, atol=0)
    layer = next(module for module in found.modules() if isinstance(module, Linear4bit))
    assert layer.weight.quant_state.nested  # as it was stored, not laid out anew
    x = torch.ones(1, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("fault", ["values", "error", "no gradient", "nan"])
def test_a_layer_that_is_wrong_is_refused(folder, reward_folder, fault, monkeypatch):
    original = Linear4bit.forward

    def broken(self, x):
        if fault == "error":
            raise RuntimeError("shape '[32, 0]' is invalid for input of size 16")
        return {
            "values": lambda: original(self, x) * 1.5,
            "no gradient": lambda: original(self, x.detach()),
            "nan": lambda: original(self, x) * float("nan"),
        }[fault]()

    monkeypatch.setattr(Linear4bit, "forward", broken)
    for load, name in [(load_causal_lm, folder), (load_reward_model, reward_folder)]:
        with pytest.raises(
            UserError, match=r"^frozen_dtype nf4 does not work on this processor \(.*_proj.*leave it out$"
        ):
            load(name, nf4=True)


def test_too_little_memory_is_called_by_its_name(folder, monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Linear4bit, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_causal_lm(folder, nf4=True)


def test_what_trials_allow_follows_from_what_four_bits_are_computed_in(folder):
    model = load_causal_lm(folder, nf4=True)
    assert tolerance(model) == tolerance(load_causal_lm(folder))
    model.config.quantization_config.bnb_4bit_compute_dtype = torch.bfloat16  # as on a GPU
    assert tolerance(model) == 0.1


def test_a_model_without_such_layers_is_left_as_it_is():
    settle_nf4(tiny_causal_lm("llama"))


def test_loading_changes_no_logger(folder, caplog):
    caplog.set_level(logging.INFO, "bitsandbytes.backends.cpu.ops")
    load_causal_lm(folder, nf4=True)
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.INFO
