"""What is written weight by weight is, to the byte, what transformers writes of the whole model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, WeightConverter

from helpers.models import FAMILIES, tiny_causal_lm
from helpers.other_families import other_causal_lm
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.finetune import prepare_for_training
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import lora_layers
from rlhf_lightning.models.merging import merged_state
from rlhf_lightning.models.safetensors_files import TensorFile
from rlhf_lightning.models.saving import WeightPlan, check_shard_size

EXPERTS = ("mixtral", "qwen3_next")
"""Families that the hub has one tensor of for each expert, and transformers one of all."""


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def streamed(model: PreTrainedModel, folder: Path, **options: Any) -> WeightPlan:
    """Write a model, each weight by itself."""
    folder.mkdir()
    plan = WeightPlan(model, **options)
    own = model.state_dict()
    plan.write(folder, ({name: own[name] for name in group.sources} for group in plan.groups))
    return plan


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
@pytest.mark.parametrize("loaded", [True, False])
def test_the_files_are_those_of_transformers(tmp_path, family, loaded):
    """A model that was loaded is written as it was found, with one that was made there is nothing to go by."""
    model = other_causal_lm(family) if family in EXPERTS else tiny_causal_lm(family)
    if loaded:
        model.save_pretrained(tmp_path / "first")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "a")
    plan = streamed(model, tmp_path / "b")
    assert written(tmp_path / "b") == written(tmp_path / "a")
    assert max(len(group.plain) for group in plan.groups) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_large_model_gets_several_files_and_an_index(tmp_path, family):
    model = tiny_causal_lm(family)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    streamed(model, tmp_path / "b", max_shard_size="20KB")
    assert len(written(tmp_path / "b")) > 2
    assert written(tmp_path / "b") == written(tmp_path / "a")


def test_experts_go_into_files_by_their_own_size(tmp_path):
    """transformers counts all experts of a layer where there is one, as they lie in one piece of its memory."""
    model = other_causal_lm("mixtral")
    model.save_pretrained(tmp_path / "a")
    streamed(model, tmp_path / "b", max_shard_size="25KB")
    model.config.save_pretrained(tmp_path / "b")
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 25_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_larger_than_a_file_has_one_of_its_own(tmp_path):
    model = tiny_causal_lm("llama")
    streamed(model, tmp_path / "b", max_shard_size=1)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(index["weight_map"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_type_is_that_of_a_cast(tmp_path, dtype):
    model = tiny_causal_lm("llama")
    streamed(model, tmp_path / "b", dtype=dtype)
    model.to(dtype).save_pretrained(tmp_path / "a")
    assert written(tmp_path / "b") == written(tmp_path / "a")


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_are_merged_one_weight_at_a_time(tmp_path, variant):
    plain = tiny_causal_lm("llama")
    model = tiny_causal_lm("llama")
    prepare_for_training(model, FineTune("lora", rank=2, **variant))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=generator)
    plain.save_pretrained(tmp_path / "a", state_dict=merged_state(model, model.state_dict()))
    plan = streamed(model, tmp_path / "b")
    assert written(tmp_path / "b") == written(tmp_path / "a")
    assert max(len(group.sources) for group in plan.groups) == 3 + len(variant.keys() & {"use_dora"})


def joined(pattern: str, parts: list[str], into: Any) -> WeightConverter:
    """Several weights of the model that the hub has as one."""
    return WeightConverter(pattern, parts, operations=[into])


def test_weights_that_become_one_are_asked_for_together(tmp_path):
    model = tiny_causal_lm("phi")
    parts = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    model._weight_conversions = [joined("self_attn.qkv.weight", parts, Chunk(dim=0))]
    model.save_pretrained(tmp_path / "a")
    plan = streamed(model, tmp_path / "b")
    assert written(tmp_path / "b") == written(tmp_path / "a")
    assert "model.layers.0.self_attn.qkv.weight" in load_file(tmp_path / "b" / "model.safetensors")
    assert sorted(len(group.plain) for group in plan.groups)[-3:] == [1, 3, 3]


def test_weights_of_different_blocks_that_become_one_are_there_with_all_others(tmp_path):
    """No family does so; if one did, its export would need memory, and be right."""
    model = tiny_causal_lm("phi")
    parts = [f"layers.{number}.mlp.fc1.weight" for number in (0, 1)]
    model._weight_conversions = [joined("all.fc1.weight", parts, Chunk(dim=0))]
    model.save_pretrained(tmp_path / "a")
    plan = streamed(model, tmp_path / "b")
    assert written(tmp_path / "b") == written(tmp_path / "a")
    assert len(plan.groups) == 1


KINDS = {
    "b.weight": torch.arange(15.0).view(3, 5).T,  # not as it lies in memory
    "a": torch.tensor(3.0),
    'é"x': torch.arange(7),
    "half": torch.ones(4).half(),
    "n10": torch.ones(3, 1).bfloat16(),
    "n9": torch.ones(2).bfloat16(),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 3),
    "double": torch.ones(2).double(),
    "eight": torch.ones(3).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("order", [list, partial(sorted, reverse=True)])
def test_a_file_is_that_of_safetensors_in_whatever_order_its_tensors_come(tmp_path, order):
    save_file({n: t.contiguous() for n, t in KINDS.items()}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with TensorFile(tmp_path / "b.safetensors", {name: tensor.to("meta") for name, tensor in KINDS.items()}) as file:
        for name in order(KINDS):
            file.write(name, KINDS[name])
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_file_does_not_end_before_all_tensors_are_there(tmp_path):
    file = TensorFile(tmp_path / "b.safetensors", KINDS)
    for name in KINDS.keys() - {"half"}:
        file.write(name, KINDS[name])
    with pytest.raises(AssertionError, match="half"):
        file.__exit__(None, None, None)


@pytest.mark.parametrize("size", ["5", "GB", "5 GiB", "-5GB", 0, -1])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(UserError, match=r"x is '.*'; give bytes, or a number with KB, MB, GB or TB, like 5GB"):
        check_shard_size(size, "x")


@pytest.mark.parametrize("size", [1, "5GB", "1.5 mb"])
def test_what_is_a_size_is_taken(size):
    check_shard_size(size, "x")
