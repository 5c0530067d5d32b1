"""Sequences that begin alike, run as one row, are computed as if each had been run alone."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import FAMILIES, LAYOUTS, spread_weights, table_lm, tiny_causal_lm
from helpers.prefixes import shared_hidden_states
from rlhf_lightning.forward import numerics, prefix
from rlhf_lightning.forward.hidden import padded_hidden_states
from rlhf_lightning.forward.prefix import (
    share_rows,
    shared_lengths,
    shared_prefix_length,
    sharing_obstacle,
    sharing_pays,
)

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
MORE_FAMILIES = ["mistral", "qwen2", "gemma3_text", "qwen3_next"]
SHARING = ["llama", "gpt-neox", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "opt", "gpt-j", "falcon"]
KERNELS = [*((family, None) for family in SHARING), *((family, "eager") for family in ("llama", "gpt2"))]


@cache
def model(family, kernel=None, **settings_):
    if family in FAMILIES:
        return tiny_causal_lm(family, **settings_, **({"attn_implementation": kernel} if kernel else {})).double()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SHAPE, **settings_)
        made = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
        spread_weights(made)
    return made if family == "qwen3_next" else made.double()  # whose experts have no float64


def padded(groups, pad=0):
    """Ids and mask `[B, K, T]` of groups of lists of ids."""
    width = max(len(ids) for group in groups for ids in group)
    ids = torch.tensor([[ids + [pad] * (width - len(ids)) for ids in group] for group in groups])
    mask = torch.tensor([[[t < len(ids) for t in range(width)] for ids in group] for group in groups])
    return ids, mask


def separate(lm, ids, mask):
    return padded_hidden_states(lm, ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])


def as_rows(lm, ids, mask):
    rows = share_rows(ids, mask)
    return rows.spread(rows.hidden_states(lm))


def assert_same(lm, ids, mask, compute=as_rows):
    """Hidden states of all real tokens and gradients of all weights agree."""
    found = []
    for way in (compute, separate):
        hidden = way(lm, ids, mask)
        assert torch.isfinite(hidden).all()
        directions = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
        lm.zero_grad()
        (hidden * directions)[mask].mean().backward()
        found.append((hidden[mask], [p.grad.clone() for p in lm.parameters() if p.grad is not None]))
    (shared, shared_grads), (apart, apart_grads) = found
    torch.testing.assert_close(shared, apart, **LAYOUTS)
    for a, b in zip(shared_grads, apart_grads, strict=True):
        torch.testing.assert_close(a, b, **LAYOUTS)


tokens = st.integers(0, 3)  # few, so that rests begin alike too, pads among them
sizes = {2: 7, 4: 5}


@st.composite
def groups(draw):
    count = draw(st.sampled_from(sorted(sizes)))

    def group():
        beginning = draw(st.lists(tokens, max_size=6))
        rests = [draw(st.lists(tokens, min_size=0 if beginning else 1, max_size=sizes[count])) for _ in range(count)]
        return [beginning + rest for rest in rests]

    return padded([group() for _ in range(draw(st.integers(1, 3)))])


@pytest.mark.parametrize(("family", "kernel"), KERNELS)
@settings(max_examples=12)
@given(groups())
def test_hidden_states_and_gradients_are_those_of_each_sequence_alone(family, kernel, batch):
    assert_same(model(family, kernel), *batch)


@settings(max_examples=50)
@given(groups())
def test_the_layout_by_hand(batch):
    """Every token of a row sees just what it sees in its own sequence, in the same order."""
    ids, mask = batch
    rows = share_rows(ids, mask)
    sees = rows.sees().squeeze(1)
    assert rows.mask.sum(dim=1).tolist() == shared_lengths(ids, mask).tolist()
    assert sees.diagonal(dim1=1, dim2=2).all()
    for b in range(len(ids)):
        sequences = [ids[b, k, : mask[b, k].sum()].tolist() for k in range(ids.shape[1])]
        beginning = 0
        while all(len(s) > beginning and s[beginning] == sequences[0][beginning] for s in sequences):
            beginning += 1
        laid_out = sequences[0][:beginning] + [token for s in sequences for token in s[beginning:]]
        assert rows.ids[b, rows.mask[b]].tolist() == laid_out
        assert shared_prefix_length(ids, mask)[b] == beginning
        for k, sequence in enumerate(sequences):
            places = rows.places[b, k, : len(sequence)]
            assert rows.ids[b, places].tolist() == sequence
            assert rows.positions[b, places].tolist() == list(range(len(sequence)))
            for t, place in enumerate(places):
                assert sees[b, place].nonzero().flatten().tolist() == places[: t + 1].tolist()


CASES = {
    "identical": [[[5, 6, 7], [5, 6, 7]]],
    "a rest that is empty": [[[5, 6, 7, 8], [5, 6]]],
    "nothing shared": [[[5, 6, 7], [8, 9]]],
    "pad is eos": [[[5, 6, 0], [5, 7, 8, 0]]],
    "only pads differ": [[[5, 0, 0], [5, 0]]],
    "one sequence": [[[5, 6, 7]], [[8]]],
    "uneven groups": [[[5, 6, 7, 8, 9], [5, 6, 7, 4]], [[3], [4]]],
    "four": [[[5, 6, 7], [5, 6, 8, 9], [5, 6], [5, 7]]],
}


@pytest.mark.parametrize("case", CASES)
def test_special_cases(case):
    assert_same(model("llama"), *padded(CASES[case]))


def test_columns_of_padding_and_padding_ids_change_nothing():
    ids, mask = padded(CASES["uneven groups"])
    expected = as_rows(model("llama"), ids, mask)[mask]
    wide, wide_mask = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    wide[~wide_mask] = 9
    torch.testing.assert_close(as_rows(model("llama"), wide, wide_mask)[wide_mask], expected, **LAYOUTS)


def test_what_is_shared_is_run_once():
    ids, mask = padded(CASES["four"])
    assert share_rows(ids, mask).ids.tolist() == [[5, 6, 7, 6, 8, 9, 6, 7]]
    assert shared_lengths(ids, mask).tolist() == [8]
    lm, shown = model("llama"), []
    hook = lm.base_model.embed_tokens.register_forward_hook(lambda _, args, __: shown.append(args[0].tolist()))
    shared_hidden_states(lm, *padded([[[5, 6, 7, 8], [5, 6, 9, 9]]]))
    hook.remove()
    assert shown[-1] == [[5, 6, 7, 8, 9, 9]]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_shares_or_is_run_apart(family):
    ids, mask = padded([[[5, 6, 7, 8, 9, 3, 4], [5, 6, 7, 8, 2, 1, 1]], [[5, 6, 7, 8, 9, 3], [5, 6, 7, 3]]])
    settings_ = {"num_experts": 2, "num_experts_per_tok": 1, "linear_num_value_heads": 2, "linear_num_key_heads": 2}
    lm = model(family, **settings_ if family == "qwen3_next" else {})
    assert_same(lm, ids, mask, shared_hidden_states)
    # Attention windows of 4 are felt; ALiBi, no positions, a state that is carried on.
    unable = {"gpt-neo", "gemma2", "falcon-alibi", "bloom", "qwen3_next"}
    assert (sharing_obstacle(lm) is None) == (family not in unable)


def test_why_not(monkeypatch):
    assert sharing_obstacle(model("bloom")) == "it takes no position_ids"
    assert sharing_obstacle(table_lm([[1.0]])) == "it takes no position_ids"
    assert sharing_obstacle(model("falcon-alibi")) == "it uses ALiBi"
    lm = model("llama")
    monkeypatch.setattr(lm.config, "_attn_implementation", "flash_attention_2")
    assert sharing_obstacle(lm) == "attention 'flash_attention_2' takes no mask of one's own"


def test_a_leak_and_an_error_are_found_by_trying(monkeypatch):
    lm = tiny_causal_lm("llama")
    forward = lm.base_model.forward

    def causal_only(input_ids, attention_mask, position_ids, **kwargs):
        return forward(input_ids, torch.ones_like(input_ids), position_ids, **kwargs)

    def two_dimensional_only(input_ids, attention_mask, position_ids, **kwargs):
        _, _ = attention_mask.shape
        return forward(input_ids, attention_mask, position_ids, **kwargs)

    monkeypatch.setattr(lm.base_model, "forward", causal_only)
    assert sharing_obstacle(lm) == "its hidden states would not be the same"
    monkeypatch.setattr(lm.base_model, "forward", two_dimensional_only)
    assert sharing_obstacle(lm) == "it takes no 4-D attention mask"


def test_the_model_is_tested_once_and_its_class_says_no_once(monkeypatch):
    said = []
    monkeypatch.setattr(numerics, "rank_zero_info", said.append)
    monkeypatch.setattr(numerics, "_said", set())
    ids, mask = padded(CASES["identical"])
    for lm in (tiny_causal_lm("bloom"), tiny_causal_lm("bloom", seed=1)):
        assert not sharing_pays(lm, ids, mask)
        assert not sharing_pays(lm, ids, mask)
    assert said == ["BloomForCausalLM runs sequences that begin alike one by one: it takes no position_ids"]
    able = tiny_causal_lm("llama").train()
    assert sharing_pays(able, ids, mask)
    assert able.training
    monkeypatch.setattr(prefix, "sharing_obstacle", None)
    assert sharing_pays(able, ids, mask)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sequences_longer_than_the_window_are_run_apart(family):
    lm = model(family, sliding_window=8)
    inside = padded([[[5, 6, 7, 8, 9, 3, 4, 5], [5, 6, 7, 8, 2, 1, 1, 4]]])
    outside = padded([[[5, 6, 7, 8, 9, 3, 4, 5, 2], [5, 6, 7, 8, 2, 1, 1, 4]]])
    assert sharing_pays(lm, *inside)  # though the row is longer than the window
    assert not sharing_pays(lm, *outside)
    for batch in (inside, outside):
        assert_same(lm, *batch, shared_hidden_states)


def test_rows_beyond_the_window_of_gpt_neo_are_run_apart():
    lm = model("gpt-neo", window_size=8)
    assert sharing_pays(lm, *padded([[[5, 6, 7, 8, 9, 3], [5, 6, 7, 8, 2, 1]]]))
    outside = padded([[[5, 6, 7, 8, 9, 3], [5, 6, 7, 8, 2, 1, 1]]])
    assert not sharing_pays(lm, *outside)
    assert_same(lm, *outside, shared_hidden_states)


def test_it_does_not_pay_where_nothing_or_little_of_many_long_rests_is_shared():
    lm = model("llama")  # 16 wide: attention outweighs the matrices from 96 tokens on
    assert not sharing_pays(lm, *padded([[[5, 6, 7], [8, 9, 1]]]))
    assert sharing_pays(lm, *padded(CASES["pad is eos"]))
    rests = [[5, 6, *[k] * 300] for k in range(8)]
    assert not sharing_pays(lm, *padded([rests]))
    assert sharing_pays(lm, *padded([[[5] * 300 + rest[2:22] for rest in rests]]))
