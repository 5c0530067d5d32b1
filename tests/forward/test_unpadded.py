"""Batches without their padding are computed as with it."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import FAMILIES, LAYOUTS, spread_weights, tiny_causal_lm
from rlhf_lightning.forward import numerics, row_attention
from rlhf_lightning.forward.hidden import (
    hidden_states,
    padded_hidden_states,
    unpadded_hidden_states,
    unpadding_obstacle,
)
from rlhf_lightning.forward.prefix import share_rows
from rlhf_lightning.models.finetune import enable_gradient_checkpointing

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ABLE = ["llama", "gpt-neox", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "opt"]
UNABLE = ["gemma2", "bloom", "falcon", "mamba", "qwen3_next"]


@cache
def model(family, **options):
    if family in FAMILIES:
        made = tiny_causal_lm(family, **options)
        return made.double() if family in ABLE else made
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **options)).eval()
        spread_weights(made)
    return made.double() if family in ABLE else made


def batch(lengths, side="right"):
    width = max(lengths)
    ids = torch.randint(1, 300, (len(lengths), width), generator=torch.Generator().manual_seed(sum(lengths)))
    column, lengths = torch.arange(width), torch.tensor(lengths).unsqueeze(1)
    mask = column < lengths if side == "right" else column >= width - lengths
    return ids, mask


def without(lm, ids, mask):
    return unpadded_hidden_states(lm, ids, mask)


@pytest.mark.parametrize("family", ABLE)
@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), side=st.sampled_from(["left", "right"]))
def test_hidden_states_and_gradients_are_those_of_the_padded_batch(family, lengths, side):
    lm = model(family)
    ids, mask = batch([14, *lengths], side)
    gradients = []
    for states in (without(lm, ids, mask), padded_hidden_states(lm, ids, mask)):
        lm.zero_grad()
        weights = torch.randn(states[mask].shape, generator=torch.Generator().manual_seed(1), dtype=states.dtype)
        (states[mask] * weights).sum().backward()
        gradients.append((states.detach()[mask], [p.grad.clone() for p in lm.base_model.parameters()]))
    torch.testing.assert_close(*gradients, **LAYOUTS)


@pytest.mark.parametrize("family", UNABLE)
def test_other_models_compute_their_padding(family):
    lm = model(family)
    ids, mask = batch([9, 2, 4])
    assert without(lm, ids, mask) is None
    torch.testing.assert_close(hidden_states(lm, ids, mask)[mask], padded_hidden_states(lm, ids, mask)[mask], **LAYOUTS)


def test_packed_rows_are_computed_as_transformers_does():
    lm = model("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 0]])
    mask = torch.tensor([[True] * 6 + [False], [True] * 6 + [False]])
    ids = torch.arange(14).view(2, 7) + 20
    found = hidden_states(lm, ids, mask, positions)
    assert not found[:, -1].any()  # so the padding was not computed
    torch.testing.assert_close(found[mask], padded_hidden_states(lm, ids, mask, positions)[mask], **LAYOUTS)


def test_shared_rows_are_computed_as_with_their_mask():
    lm = model("llama")
    ids = torch.tensor([[[5, 6, 7, 8, 9], [5, 6, 9, 0, 0]], [[4, 3, 0, 0, 0], [4, 2, 0, 0, 0]]])
    rows = share_rows(ids, ids > 0)
    found = rows.hidden_states(lm)
    assert not found[~rows.mask].any()
    torch.testing.assert_close(found[rows.mask], rows.padded_hidden_states(lm)[rows.mask], **LAYOUTS)


class Numbers(TorchDispatchMode):
    """How many numbers all operations return together, views not counted."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize("rests", [0, 3])
def test_the_cost_of_attention_grows_with_the_tokens_alone(rests):
    """Of its gradient, too: that of a slice would fill the whole row for each sequence."""

    def cost(sequences):
        calls = row_attention.calls_of([[6, *[2] * rests]] * sequences)
        tokens = sequences * (6 + 2 * rests)
        query, key, value = (torch.randn(1, 2, tokens, 4, requires_grad=True) for _ in range(3))
        with Numbers() as numbers:
            attended, _ = row_attention.attend_in_turn(calls, torch.nn.Module(), query, key, value, None)
            attended.sum().backward()
        return numbers.count

    few, many = cost(4), cost(64)
    assert many < 1.1 * 16 * few


def test_a_window_that_would_be_felt_is_left_to_transformers():
    lm = model("mistral", sliding_window=6)
    assert without(lm, *batch([7, 1])) is None
    assert without(lm, *batch([6, 1])) is not None


def test_a_batch_with_little_padding_stays_as_it_is():
    lm = model("llama")
    assert without(lm, *batch([8, 8, 8])) is None
    assert without(lm, *batch([8, 8, 1])) is not None


def test_blocks_that_are_computed_again_find_the_attention_they_had():
    lm = tiny_causal_lm("llama", seed=3)
    enable_gradient_checkpointing(lm)
    lm.train()
    ids, mask = batch([9, 2])
    assert without(lm, ids, mask) is None
    with torch.no_grad():
        assert without(lm, ids, mask) is not None


def test_the_attention_is_changed_back_also_after_an_error(monkeypatch):
    lm = model("llama")
    ids, mask = batch([9, 2])
    without(lm, ids, mask)
    assert lm.config._attn_implementation == "sdpa"
    monkeypatch.setattr(row_attention, "sdpa_attention_forward", None)
    with pytest.raises(TypeError):
        without(lm, ids, mask)
    assert lm.config._attn_implementation == "sdpa"


def test_why_not(monkeypatch):
    assert unpadding_obstacle(model("bloom")) == "it takes no position_ids"
    assert unpadding_obstacle(model("falcon-alibi")) == "it uses ALiBi"
    assert unpadding_obstacle(model("llama")) is None
    lm = tiny_causal_lm("llama")
    forward = lm.base_model.forward

    def counts_places_otherwise(input_ids, attention_mask, position_ids, **kwargs):
        return forward(input_ids, attention_mask, position_ids * input_ids.shape[1], **kwargs)

    def needs_a_mask(input_ids, attention_mask, position_ids, **kwargs):
        return forward(input_ids, attention_mask.long(), position_ids, **kwargs)

    monkeypatch.setattr(lm.base_model, "forward", counts_places_otherwise)
    assert unpadding_obstacle(lm) == "its hidden states would not be the same"
    monkeypatch.setattr(lm.base_model, "forward", needs_a_mask)
    assert unpadding_obstacle(lm) == "its attention is of another kind"


def test_a_class_of_models_that_cannot_says_so_once(monkeypatch):
    said = []
    monkeypatch.setattr(numerics, "rank_zero_info", said.append)
    monkeypatch.setattr(numerics, "_said", set())
    for seed in (1, 2):
        lm = tiny_causal_lm("falcon-alibi", seed)
        for _ in range(2):
            assert without(lm, *batch([9, 2])) is None
    assert without(tiny_causal_lm("llama"), *batch([9, 2])) is not None
    assert said == ["FalconForCausalLM computes the padding of its batches, too: it uses ALiBi"]


def test_rows_of_nothing_but_padding_are_computed_as_ever():
    model, ids = tiny_causal_lm("llama").eval(), torch.ones(2, 3, dtype=torch.long)
    assert hidden_states(model, ids, torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 3, 16)
