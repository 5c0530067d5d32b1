"""Exports take the memory of a few weights, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.distributed import run_in_processes
from helpers.tokenizers import tiny_tokenizer

LORA = {"mode": "lora", "rank": 4}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"name": "auto"}),
    "one-lora": (1, {"name": "auto", **LORA}),
    "zero3": (2, {"name": "zero3"}),
    "zero3-lora": (2, {"name": "zero3", **LORA}),
}
"""Processes, and what they run."""
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 12}
SHARE = 0.45
"""Of the model's size, about 25 of its largest weights; a copy of the model is 1, one in bfloat16 0.5."""


@pytest.fixture(scope="module")
def size(root: Path) -> int:
    """Bytes of the model."""
    return (root / "lm" / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 85 MB, `lm`."""
    root = tmp_path_factory.mktemp("memory")
    tokenizer = tiny_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ids)).save_pretrained(root / "lm")
    tokenizer.save_pretrained(root / "lm")
    return root


@pytest.fixture(scope="module")
def peaks(root: Path) -> dict[str, list[int]]:
    """Bytes that the export at the end of each run took, by rank."""
    found: dict[str, list[int]] = {}
    for world_size in (1, 2):
        named = {name: settings for name, (processes, settings) in RUNS.items() if processes == world_size}
        runs = [{**settings, "folder": str(root / "lm"), "root": str(root / name)} for name, settings in named.items()]
        ranks = run_in_processes("helpers.export_runs:run_all", world_size, runs=runs)
        found |= {name: [rank[place] for rank in ranks] for place, name in enumerate(named)}
    return found


@pytest.mark.parametrize("name", RUNS)
def test_no_process_holds_the_model_a_second_time(peaks, size, name):
    assert max(peaks[name]) < SHARE * size


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_checkpoint_is_exported_without_holding_the_model(peaks, root, size, name, dtype):
    settings = {"checkpoint": str(root / name / "checkpoints" / "last.ckpt"), "out": str(root / name / dtype)}
    ((peak,),) = run_in_processes("helpers.export_runs:export_all", 1, exports=[settings | {"dtype": dtype}])
    assert peak < SHARE * size
    assert (root / name / dtype / "model.safetensors").stat().st_size > 0.4 * size
