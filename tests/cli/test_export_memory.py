"""Exports take the memory of a few weights, whatever the size of the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.distributed import run_in_processes
from helpers.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.matrix

LORA = {"mode": "lora", "rank": 4}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"name": "auto"}),
    "one-lora": (1, {"name": "auto", **LORA}),
    "zero3": (2, {"name": "zero3"}),
    "fsdp2-lora": (2, {"name": "fsdp2", **LORA}),
}
"""Processes, and what they run."""
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 12}
SHARE = {"one": 0.3, "one-lora": 0.4, "zero3": 0.8, "fsdp2-lora": 0.4}
"""Of the model's size, which a copy of it takes once; 0.02 is its largest weight.

Under ZeRO-3 the half that a process holds anyway may come into its memory anew.
"""


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
def peak_of(root: Path) -> Any:
    """The most bytes that the export at the end of a run took on any process; each is made once."""

    @functools.cache
    def peak(name: str) -> int:
        processes, settings = RUNS[name]
        run = {**settings, "folder": str(root / "lm"), "root": str(root / name)}
        ranks = run_in_processes("helpers.export_runs:run_all", processes, runs=[run])
        return max(peak for (peak,) in ranks)

    return peak


@pytest.mark.parametrize("name", RUNS)
def test_no_process_holds_the_model_a_second_time(peak_of, size, name):
    assert peak_of(name) < SHARE[name] * size


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_checkpoint_is_exported_without_holding_the_model(peak_of, root, size, name, dtype):
    peak_of(name)
    settings = {"checkpoint": str(root / name / "checkpoints" / "last.ckpt"), "out": str(root / name / dtype)}
    ((peak,),) = run_in_processes("helpers.export_runs:export_all", 1, exports=[settings | {"dtype": dtype}])
    assert peak < 0.3 * size
    assert (root / name / dtype / "model.safetensors").stat().st_size > 0.4 * size
