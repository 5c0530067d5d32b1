"""vLLM in this process keeps the contract of every engine, and leaves the process as it was."""

import pytest

from helpers.engine_contract import CONTRACT
from rlhf_lightning.generation.vllm_engine import VLLMEngine

TINY = {"enforce_eager": True, "kv_cache_memory_bytes": 2**24}


def make(model, tokenizer, batch_size):
    return VLLMEngine(model, tokenizer, batch_size, options=TINY)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_engine_keeps_the_contract(check):
    check(make)
