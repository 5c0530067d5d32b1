"""How many tokens go through a model at once, by device, memory and model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning import RewardModule, SFTModule
from rlhf_lightning.training.token_budget import FEWEST, MOST, token_budget

GIB = 2**30


def llama(hidden, depth, inner, vocabulary=32000):
    """A model without memory."""
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": depth, "vocab_size": vocabulary}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=hidden // 64, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def one_billion():
    return llama(2048, 16, 8192, 128256)  # 1.2 billion, which take 18.4 GiB to train


@pytest.fixture(scope="module")
def frozen_8b():
    return llama(4096, 32, 14336, 128256).to(torch.bfloat16).requires_grad_(False)  # 13.9 GiB


def test_a_cpu_takes_512_whatever_the_model(one_billion):
    assert token_budget(one_billion, "cpu", 0) == 512
    assert token_budget(one_billion, "cpu", 0, sequences=2) == 1024


def test_a_gpu_takes_what_fits_beside_the_weights(one_billion):
    # (0.9 x 80 - 18.4) / 2 GiB, by 1.25 x 16 x (24 x 2048 + 8 x 8192) bytes a token, is 12,500.
    assert token_budget(one_billion, "cuda", 80 * GIB) == 8192
    assert token_budget(one_billion, "cuda", 140 * GIB) == MOST
    assert token_budget(one_billion, "cuda", 32 * GIB) == 2048
    assert token_budget(one_billion, "cuda", 16 * GIB) == FEWEST  # not even the weights fit


def test_half_precision_frozen_weights_and_checkpointing_leave_more_room(frozen_8b):
    # (0.9 x 80 - 13.9) / 2 GiB, by 32 x (24 x 4096 + 8 x 14336) bytes a token, is 4,600.
    assert token_budget(frozen_8b, "cuda", 80 * GIB) == 4096
    assert token_budget(frozen_8b, "cuda", 80 * GIB, checkpointing=True) == MOST


def test_sharded_weights_leave_more_room(one_billion):
    assert token_budget(one_billion, "cuda", 24 * GIB, share=1 / 8) > token_budget(one_billion, "cuda", 24 * GIB)


def test_a_device_that_nothing_is_known_of_takes_few(one_billion):
    assert token_budget(one_billion, "mps", 0) == FEWEST


@given(st.integers(0, 200), st.integers(0, 200))
def test_more_memory_never_takes_fewer(less, more):
    model = llama(256, 2, 512)
    small, large = (token_budget(model, "cuda", gib * GIB // 8) for gib in sorted((less, more)))
    assert FEWEST <= small <= large <= MOST
    assert small.bit_count() == large.bit_count() == 1


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({"micro_batch_size": 2}, None),
        ({"max_tokens_per_batch": 99}, 99),
        ({"max_tokens_per_batch": None}, None),
    ],
)
def test_what_is_given_is_taken(given, budget):
    assert SFTModule("nowhere", **given).token_budget == budget


def test_a_pair_has_two_sequences():
    assert (SFTModule.sequences_per_example, RewardModule.sequences_per_example) == (1, 2)
