"""Attention of rows without padding by one call: runs, their keys, and what the model makes of them."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import LAYOUTS, tiny_causal_lm
from rlhf_lightning.compat import attention_function
from rlhf_lightning.forward import hidden, numerics, varlen
from rlhf_lightning.forward.hidden import hidden_states, padded_hidden_states
from rlhf_lightning.forward.prefix import share_rows

PARTS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)


def by_mask(rows, query, key, value, scaling):
    """Of all tokens at once, with a mask that is written from the meaning of the parts."""
    row, owner = [], []
    for number, parts in enumerate(rows):
        for part, length in enumerate(parts):
            row += [number] * length
            owner += [part] * length
    row, owner = torch.tensor(row), torch.tensor(owner)
    related = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    sees = (row[:, None] == row[None, :]) & related & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    weights = torch.einsum("qhd,khd->hqk", query, key) * scaling
    weights = weights.masked_fill(~sees, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@given(rows=PARTS, scaling=st.sampled_from([None, 0.3]))
def test_each_token_attends_to_its_beginning_and_its_own_rest(rows, scaling):
    total = sum(map(sum, rows))
    source = torch.Generator().manual_seed(total)
    query, key, value = (
        torch.randn(1, heads, total, 4, generator=source, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    found, weights = varlen.attend(varlen.runs_of(rows), torch.nn.Identity(), query, key, value, None, scaling)
    assert weights is None
    assert found.shape == (1, total, 4, 4)
    expected = by_mask(rows, *(each[0].transpose(0, 1) for each in (query, key, value)), scaling or 0.5)
    torch.testing.assert_close(found[0], expected)
    upstream = torch.randn(found.shape, generator=source, dtype=torch.float64)
    gradients = (torch.autograd.grad(out, (query, key, value), upstream) for out in (found, expected[None]))
    torch.testing.assert_close(*gradients)


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=3), min_size=1, max_size=3))
def test_a_beginning_or_a_rest_may_be_empty(rows):
    if not sum(map(sum, rows)):
        rows[0][0] = 1
    runs = varlen.runs_of(rows)
    assert runs.query_starts[-1] == sum(map(sum, rows))
    assert len(runs.keys) == runs.key_starts[-1]
    assert (runs.query_starts.diff() > 0).all()
    assert runs.most_queries == runs.query_starts.diff().max()
    assert (runs.key_starts.diff() >= runs.query_starts.diff()).all()
    assert runs.most_keys == runs.key_starts.diff().max()


@pytest.fixture
def by_runs(monkeypatch):
    """Models on the CPU attend as they would on a GPU, by the kernel's plain twin; yields how often they did."""
    used = []

    def attend(runs, *args, **kwargs):
        used.append(runs)
        return varlen.attend(runs, *args, **kwargs)

    def run_row(model, ids, positions, parts, **kwargs):
        with attention_function(model, hidden.UNPADDED, partial(attend, varlen.runs_of(parts)), None):
            row = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": None}
            return model.base_model(**row, **kwargs).last_hidden_state[0]

    monkeypatch.setattr(hidden, "_run_row", run_row)
    return used


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gpt2"])
def test_a_model_computes_by_runs_what_it_computes_padded(family, by_runs):
    lm = tiny_causal_lm(family).double()
    ids = torch.arange(30).view(3, 10) + 11
    mask = torch.arange(10) < torch.tensor([[9], [2], [5]])
    torch.testing.assert_close(hidden_states(lm, ids, mask)[mask], padded_hidden_states(lm, ids, mask)[mask], **LAYOUTS)
    assert by_runs


def test_shared_rows_are_computed_by_runs_as_with_their_mask(by_runs):
    lm = tiny_causal_lm("llama").double()
    ids = torch.tensor([[[5, 6, 7, 8, 9], [5, 6, 9, 0, 0]], [[4, 3, 0, 0, 0], [4, 3, 2, 0, 0]], [[1, 2, 0, 0, 0]] * 2])
    rows = share_rows(ids, ids > 0)
    assert rows.parts() == [[2, 3, 1], [2, 0, 1], [2, 0, 0]]
    found = rows.hidden_states(lm)
    torch.testing.assert_close(found[rows.mask], rows.padded_hidden_states(lm)[rows.mask], **LAYOUTS)
    assert by_runs


def emulated(shift=0, error=None):
    """What torch's kernel does, on a CPU; with a mistake where one is asked for."""

    def attend(query, key, value, query_starts, key_starts, most_queries, most_keys, scaling):
        if error is not None:
            raise error
        assert most_queries == query_starts.diff().max()
        assert most_keys == key_starts.diff().max()
        runs = varlen.Runs(query_starts, key_starts, None, most_queries, most_keys)
        return varlen.attend_by_runs(runs, query.roll(shift, 0), key, value, scaling)

    return attend


@pytest.mark.parametrize(
    ("kernel", "right"),
    [
        (emulated(), True),
        (emulated(shift=1), False),
        (emulated(error=RuntimeError("no kernel")), False),
        (emulated(error=ImportError("an old torch")), False),
    ],
)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_a_kernel_is_used_only_where_it_computes_what_it_should(monkeypatch, kernel, right):
    monkeypatch.setattr(varlen, "varlen_attention", kernel)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):  # Lightning validates first
        varlen.kernel_is_right.cache_clear()
        with mode():
            assert varlen.kernel_is_right(torch.device("cpu"), torch.bfloat16, 4, 2, 16) is right
    varlen.kernel_is_right.cache_clear()


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize(
    ("width", "dropout", "reason"),
    [(8, 0.0, None), (6, 0.0, "queries of 8 and values of 6 in torch.bfloat16"), (8, 0.1, "attention dropout")],
)
def test_what_the_kernel_does_not_take_goes_run_by_run_and_says_so(monkeypatch, width, dropout, reason):
    calls, said = [], []
    monkeypatch.setattr(varlen, "say_once", said.append)
    monkeypatch.setattr(varlen, "_by_kernel", lambda *args: calls.append(args) or args[1])
    monkeypatch.setattr(varlen, "kernel_is_right", lambda *args: True)
    query, key, value = (torch.zeros(1, 2, 5, each).bfloat16() for each in (8, 8, width))
    found, _ = varlen.attend(varlen.runs_of([[5]]), torch.nn.Identity(), query, key, value, None, dropout=dropout)
    assert found.shape == (1, 5, 2, width)
    assert bool(calls) is (reason is None)
    assert [line.partition("does not take ")[2] for line in said] == ([] if reason is None else [reason])


def test_a_model_without_heads_has_no_such_kernel_and_one_whose_kernel_is_wrong_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(varlen, "kernel_is_right", lambda *args: False)
    monkeypatch.setattr(varlen, "say_once", said.append)
    cuda = torch.device("cuda")
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4)
    assert not varlen.has_kernel(AutoModelForCausalLM.from_config(config).bfloat16(), cuda)
    assert not said
    assert not varlen.has_kernel(tiny_causal_lm("llama").bfloat16(), cuda)
    assert len(said) == 1
    assert "LlamaForCausalLM computes the padding of its batches, too" in said[0]


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@given(rows=PARTS)
def test_in_half_precision_the_kernel_is_given_rows_keys_and_borders(rows):
    total = sum(map(sum, rows))
    tensors = [torch.randn(1, heads, total, 8) for heads in (4, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attention", emulated())
        patch.setattr(varlen, "kernel_is_right", lambda *args: True)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = varlen.attend(varlen.runs_of(rows), torch.nn.Identity(), *tensors, None)
    assert found.dtype == torch.bfloat16
    expected, _ = varlen.attend(varlen.runs_of(rows), torch.nn.Identity(), *tensors, None)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_attention_of_another_kind_is_refused():
    tensors = [torch.zeros(1, 1, 2, 4)] * 3
    with pytest.raises(NotImplementedError):
        varlen.attend(varlen.runs_of([[2]]), torch.nn.Identity(), *tensors, None, softcap=1.0)
    with pytest.raises(NotImplementedError):
        varlen.attend(varlen.runs_of([[2]]), torch.nn.Identity(), *tensors, torch.ones(1))


def test_only_a_gpu_is_kept_from_planning_for_each_shape():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        numerics.self_test(tiny_causal_lm("llama"), bool)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        numerics.avoid_plans(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_cpu_has_no_such_kernel():
    assert not varlen.has_kernel(tiny_causal_lm("llama").bfloat16(), torch.device("cpu"))
