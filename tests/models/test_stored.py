"""Models that will be sharded stay in the type of their files until then; only that is later, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_lightning import FineTune
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.scalar_lm import new_scalar_lm
from rlhf_lightning.models.sharing import frozen_twin, scalar_beside
from rlhf_lightning.models.stored import load_pretrained, stored_dtype
from rlhf_lightning.training.sharded import dtype_ahead, to_be_sharded, widen_now, widens_later

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a model in bfloat16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16().save_pretrained(path)
    return str(path)


def types(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


def test_what_will_be_sharded_stays_in_the_type_of_its_file(folder: str) -> None:
    with to_be_sharded():
        model = load_causal_lm(folder)
    assert types(model) == {torch.bfloat16}
    assert all(map(widens_later, model.parameters()))
    assert model.config.dtype == torch.float32
    assert {dtype_ahead(p) for p in model.parameters()} == {torch.float32}
    widen_now(model)
    assert not any(map(widens_later, model.parameters()))
    for (name, weight), (_, expected) in zip(
        model.named_parameters(), load_causal_lm(folder).named_parameters(), strict=True
    ):
        assert weight.dtype == expected.dtype == torch.float32
        assert torch.equal(weight, expected), name


def test_what_will_not_be_sharded_is_float32_at_once(folder: str) -> None:
    assert types(load_causal_lm(folder)) == {torch.float32}


def test_files_of_several_types_are_not_rounded(folder: str, tmp_path: Path) -> None:
    load_causal_lm(folder).bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    last = max(weights)
    weights[last] = torch.full_like(weights[last], 1 / 3, dtype=torch.float32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert stored_dtype(str(tmp_path)) == torch.float32
    with to_be_sharded():
        model, _ = load_pretrained(AutoModelForCausalLM, str(tmp_path))
    assert types(model) == {torch.float32}
    assert model.state_dict()[last].ravel()[0] == torch.tensor(1 / 3)


def test_models_that_compute_tables_in_their_own_type_are_loaded_whole(folder: str) -> None:
    class Kind:
        """Makes models with a table, as some families do."""

        @staticmethod
        def from_pretrained(name: str, dtype: torch.dtype, **options: Any) -> Any:
            model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
            model.register_buffer("table", torch.tensor(1 / 3, dtype=dtype))
            return model, info

    with to_be_sharded():
        model, _ = load_pretrained(Kind, folder)
    assert types(model) == {torch.float32}
    assert model.table == torch.tensor(1 / 3)
    assert not any(map(widens_later, model.parameters()))


def test_a_fresh_head_is_drawn_in_float32(folder: str) -> None:
    torch.manual_seed(3)
    with to_be_sharded():
        head = new_scalar_lm(folder).model.score.weight
    torch.manual_seed(3)
    assert head.dtype == torch.float32
    assert torch.equal(head, new_scalar_lm(folder).model.score.weight)


def test_twins_and_heads_beside_a_backbone_become_float32_too(folder: str) -> None:
    with to_be_sharded():
        model = load_causal_lm(folder)
        choose_trained(model, FineTune(mode="last_layer"))
        twin: Any = frozen_twin(model)
        assert all(map(widens_later, twin.parameters()))
        choose_trained(model, FineTune(mode="lora"))
        assert scalar_beside(model).model.score.weight.dtype == torch.float32


def test_adapters_that_need_norms_of_the_weights_take_those_of_float32(folder: str) -> None:
    magnitudes = []
    for ahead in (True, False):
        with to_be_sharded() if ahead else torch.no_grad():
            model = load_causal_lm(folder)
            finetune = FineTune(mode="lora", use_dora=True)
            choose_trained(model, finetune)
            add_adapter(model, finetune)
        magnitudes.append([p.tolist() for name, p in model.named_parameters() if "magnitude" in name])
    assert magnitudes[0] == magnitudes[1] != []
