"""What stays float32 when everything around it is cast."""

import copy

import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric
from transformers import AutoModelForCausalLM

from helpers.models import FAMILIES, save_folder, tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.dtypes import keep_dtype, keep_tables
from rlhf_lightning.models.scalar_lm import new_scalar_lm

CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
}


def logits(model):
    ids = torch.arange(3, 63).unsqueeze(0)  # far enough for wrong angles to show
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_that_is_cast_is_the_one_that_transformers_loads_in_that_type(family, tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm(family), tiny_tokenizer())
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    assert torch.equal(logits(load_causal_lm(folder).to(torch.bfloat16)), expected)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("load", [load_causal_lm, lambda folder: new_scalar_lm(folder).model])
def test_only_the_rotary_tables_stay(cast, load, tmp_path):
    model = cast(load(save_folder(tmp_path, tiny_causal_lm("llama"), tiny_tokenizer())))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tables = dict(model.named_buffers())
    assert [name.rpartition(".")[2] for name in tables] == ["inv_freq", "original_inv_freq"]
    assert {table.dtype for table in tables.values()} == {torch.float32}


def test_a_copy_keeps_its_own_tables():
    model = tiny_causal_lm("llama")
    keep_tables(model)
    twin = copy.deepcopy(model)
    twin.to(torch.bfloat16)
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    twin.to("meta")
    assert twin.model.rotary_emb.inv_freq.is_meta
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_buffers_beside_weights_are_cast_with_them():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    keep_tables(model)
    model.to(torch.bfloat16)
    assert model[0].running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_metric_counts_beyond_what_bfloat16_can(cast):
    module = nn.ModuleDict({"mean": keep_dtype(MeanMetric()), "all": keep_dtype(CatMetric())})
    cast(module)
    for _ in range(1000):
        module["mean"].update(torch.tensor([1.0]), torch.tensor([1.0]))
    module["mean"].update(torch.tensor([1001.0]), torch.tensor([1.0]))
    module["all"].update(torch.tensor([1.001]))
    assert module["mean"].compute().item() == pytest.approx(2001 / 1001)
    assert module["all"].compute().item() == pytest.approx(1.001)
