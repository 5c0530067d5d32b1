"""Loss and log-probabilities without the logits, against the same from the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lightning.functional import (
    LogitScaling,
    cross_entropy_sum,
    entropy,
    linear_cross_entropy_sum,
    linear_token_logprobs,
    rows_on,
    rows_per_chunk,
    token_logprobs,
)

SCALINGS = st.builds(LogitScaling, st.sampled_from([1.0, 0.5, 4.0]), st.sampled_from([None, 2.0]))
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.0, "rtol": 1e-2}}


@st.composite
def layers(draw, dtype):
    """Hidden states, output matrix, bias or None, token ids; all but the ids want a gradient."""
    rows, size, vocab = draw(st.integers(0, 9)), draw(st.integers(1, 6)), draw(st.integers(2, 12))
    shapes = [(rows, size), (vocab, size), (vocab,)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden, weight, bias = (torch.randn(s, generator=random).to(dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias if draw(st.booleans()) else None, torch.randint(vocab, (rows,), generator=random)


def plain_logits(hidden, weight, bias, scaling):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scaling.scale
    return logits if scaling.soft_cap is None else torch.tanh(logits / scaling.soft_cap) * scaling.soft_cap


def gradients(value, *inputs):
    inputs = [tensor for tensor in inputs if tensor is not None]
    return torch.autograd.grad(value, inputs)


def assert_close(ours, theirs, dtype):
    """Each element to 1e-5 in float32; in bfloat16 the whole, as elements near 0 are all rounding."""
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        assert mine.shape == expected.shape
        if dtype is torch.float32:
            torch.testing.assert_close(mine, expected, **TOLERANCE[dtype])
        elif expected.numel():
            error = torch.linalg.vector_norm(mine.float() - expected.float())
            assert error <= 1e-2 * torch.linalg.vector_norm(expected.float()) + 1e-5


def check_cross_entropy(layer, dtype, scaling, smoothing, rows):
    *inputs, targets = layer
    loss, nll = linear_cross_entropy_sum(*inputs, targets, scaling, smoothing, rows)
    # The plain version in float32 from the same (rounded) numbers: what low precision is to come near to.
    exact = [None if x is None else x.detach().float().requires_grad_() for x in inputs]
    logits = plain_logits(*exact, scaling)
    expected = cross_entropy_sum(logits, targets, smoothing)
    assert not nll.requires_grad
    assert_close([loss, nll], [expected, cross_entropy_sum(logits, targets)], dtype)
    theirs = [grad.to(dtype) for grad in gradients(expected / 3, *exact)]
    assert_close(gradients(loss / 3, *inputs), theirs, dtype)


def check_logprobs(layer, dtype, scaling, temperature, rows):
    *inputs, ids = layer
    logprobs, entropies = linear_token_logprobs(*inputs, ids, scaling, temperature, with_entropy=True, chunk_rows=rows)
    exact = [None if x is None else x.detach().float().requires_grad_() for x in inputs]
    logits = plain_logits(*exact, scaling)
    expected, expected_entropies = token_logprobs(logits, ids, temperature), entropy(logits, temperature)
    assert_close([logprobs, entropies], [expected, expected_entropies], dtype)
    alone, none = linear_token_logprobs(*inputs, ids, scaling, temperature, chunk_rows=rows)
    assert none is None
    assert torch.equal(alone, logprobs)

    weights = torch.linspace(-1, 2, len(ids))  # a gradient of its own for each token
    theirs = [grad.to(dtype) for grad in gradients((weights * expected).sum(), *exact)]
    assert_close(gradients((weights * alone).sum(), *inputs), theirs, dtype)
    logits = plain_logits(*exact, scaling)
    both = weights * token_logprobs(logits, ids, temperature) + weights.flip(0) * entropy(logits, temperature)
    theirs = [grad.to(dtype) for grad in gradients(both.sum(), *exact)]
    assert_close(gradients((weights * logprobs + weights.flip(0) * entropies).sum(), *inputs), theirs, dtype)


SMOOTHINGS, TEMPERATURES, ROWS = st.sampled_from([0.0, 0.1]), st.sampled_from([1.0, 0.7, 2.0]), st.integers(1, 10)


@given(layers(torch.float32), SCALINGS, SMOOTHINGS, ROWS)
def test_cross_entropy_is_that_of_the_logits(layer, scaling, smoothing, rows):
    check_cross_entropy(layer, torch.float32, scaling, smoothing, rows)


@given(layers(torch.float32), SCALINGS, TEMPERATURES, ROWS)
def test_logprobs_and_entropies_are_those_of_the_logits(layer, scaling, temperature, rows):
    check_logprobs(layer, torch.float32, scaling, temperature, rows)


def wide_layer(with_bias=True, rows=40, size=64, vocab=300, dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=random).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, size, generator=random) * 0.2).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=random).to(dtype).requires_grad_() if with_bias else None
    return hidden, weight, bias, torch.randint(vocab, (rows,), generator=random)


@settings(max_examples=20)
@given(st.booleans(), SCALINGS, SMOOTHINGS, TEMPERATURES, st.integers(1, 50))
def test_bfloat16_comes_within_a_hundredth(with_bias, scaling, smoothing, temperature, rows):
    scaling = scaling._replace(scale=min(scaling.scale, 1.0))
    check_cross_entropy(wide_layer(with_bias), torch.bfloat16, scaling, smoothing, rows)
    check_logprobs(wide_layer(with_bias), torch.bfloat16, scaling, temperature, rows)


def test_the_temperature_is_1_where_none_is_said():
    *inputs, ids = wide_layer(rows=5, vocab=6, dtype=torch.float32)
    expected = token_logprobs(plain_logits(*inputs, LogitScaling()), ids)
    assert_close([linear_token_logprobs(*inputs, ids)[0]], [expected], torch.float32)


def test_rows_of_very_different_size_share_a_chunk():
    inputs, ids = [torch.tensor([[0.0], [1.0]]), torch.tensor([[200.0], [0.0]])], torch.tensor([0, 0])
    inputs = [tensor.requires_grad_() for tensor in inputs]
    loss, _ = linear_cross_entropy_sum(*inputs, None, ids)
    expected = cross_entropy_sum(plain_logits(*inputs, None, LogitScaling()), ids)
    assert_close([loss, *gradients(loss, *inputs)], [expected, *gradients(expected, *inputs)], torch.float32)


def test_gradients_of_many_chunks_are_summed_in_float32():
    hidden, ids = torch.ones(600, 1, dtype=torch.bfloat16), torch.ones(600, dtype=torch.long)
    inputs = [torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in [(2, 1), (2,)]]
    loss, _ = linear_cross_entropy_sum(hidden, *inputs, ids, chunk_rows=1)
    logprobs, _ = linear_token_logprobs(hidden, *inputs, ids, chunk_rows=1)
    for grads in (gradients(loss, *inputs), gradients(-logprobs.sum(), *inputs)):
        # A half and minus a half 600 times; a sum in bfloat16 comes no further than 128.
        assert [grad.flatten().tolist() for grad in grads] == [[300, -300], [300, -300]]


@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(2.0, 3.0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_finite_differences(scaling, with_bias):
    *inputs, ids = wide_layer(with_bias, rows=3, size=2, vocab=4, dtype=torch.float64)

    def loss(*inputs):
        return linear_cross_entropy_sum(*inputs, ids, scaling, label_smoothing=0.2, chunk_rows=2)[0]

    def logprobs(*inputs):
        return linear_token_logprobs(*inputs, ids, scaling, temperature=0.7, with_entropy=True, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(logprobs, inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen):
    *inputs, ids = wide_layer(rows=5, dtype=torch.float32)
    for compute in (
        lambda *x: linear_cross_entropy_sum(*x, ids)[0],
        lambda *x: linear_token_logprobs(*x, ids)[0].sum(),
    ):
        expected = gradients(compute(*inputs), *inputs)
        some = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
        compute(*some).backward()
        for i, (tensor, grad) in enumerate(zip(some, expected, strict=True)):
            assert tensor.grad is None if i == frozen else torch.equal(tensor.grad, grad)


def test_a_matrix_used_twice_gets_both_gradients():
    hidden, weight, _, ids = wide_layer(False, rows=5, vocab=6, dtype=torch.float32)
    embedded = torch.nn.functional.embedding(ids, weight) + hidden
    ours = gradients(linear_cross_entropy_sum(embedded, weight, None, ids, chunk_rows=2)[0], weight)
    embedded = torch.nn.functional.embedding(ids, weight) + hidden
    theirs = gradients(cross_entropy_sum(embedded @ weight.T, ids), weight)
    assert_close(ours, theirs, torch.float32)


@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(1.0, 5.0)])
def test_autocast_multiplies_in_bfloat16_and_reduces_in_float32(scaling):
    *inputs, ids = wide_layer(dtype=torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in inputs]
    for compute in (
        lambda *x: linear_cross_entropy_sum(*x, ids, scaling, 0.1, 7)[0],
        lambda *x: linear_token_logprobs(*x, ids, scaling, 0.7, chunk_rows=7)[0].sum(),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            value = compute(*inputs)
            ours = gradients(value, *inputs)  # as in manual optimisation, where the backward pass is inside too
        expected = compute(*low)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
        assert [grad.dtype for grad in ours] == [torch.float32] * 3
        assert torch.equal(ours[0], ours[0].bfloat16().float())  # a product in bfloat16 in the backward pass too
        assert_close([g.bfloat16() for g in ours], gradients(expected, *low), torch.bfloat16)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(0.5, 3.0)])
def test_the_logits_of_all_tokens_never_exist(with_grad, scaling):
    rows, size, vocab, chunk = 60, 4, 50, 5
    *inputs, ids = wide_layer(rows=rows, size=size, vocab=vocab, dtype=torch.float32)
    with LargestTensor() as seen, torch.set_grad_enabled(with_grad):
        loss, _ = linear_cross_entropy_sum(*inputs, ids, scaling, 0.1, chunk)
        logprobs, entropies = linear_token_logprobs(*inputs, ids, scaling, 0.7, True, chunk)
        if with_grad:
            (loss + logprobs.sum() + entropies.sum()).backward()
    assert seen.elements == max(chunk * vocab, rows * size)
    with LargestTensor() as seen:
        plain_logits(*inputs, scaling)
    assert seen.elements == rows * vocab  # the instrument sees what it must


def test_nothing_is_kept_for_a_backward_pass_that_will_not_be():
    *inputs, ids = wide_layer(rows=100, size=64, vocab=7, dtype=torch.float32)
    with LargestTensor() as seen, torch.no_grad():
        linear_cross_entropy_sum(*inputs, ids, chunk_rows=2)
    assert seen.elements < inputs[0].numel()


def test_chunks_keep_to_one_size_whatever_the_vocabulary():
    assert rows_per_chunk(2**10) == 2**14
    assert rows_per_chunk(2**20) == 256
    assert rows_on(torch.device("cpu"), 2**10) == 2**14


def test_chunks_grow_with_the_memory_of_a_gpu():
    assert [rows_per_chunk(2**15, gib * 2**30) for gib in (4, 16, 24, 80, 140)] == [512, 1024, 1024, 4096, 8192]


class Counted(TorchDispatchMode):
    """How often operations of a name ran."""

    def __init__(self, name):
        super().__init__()
        self.name, self.times = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func._schema.name == self.name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learnt", [False, True])
def test_entropies_that_are_only_logged_cost_the_backward_pass_nothing(learnt):
    *inputs, ids = wide_layer(rows=8, size=4, vocab=7, dtype=torch.float32)
    logprobs, entropies = linear_token_logprobs(*inputs, ids, with_entropy=True, chunk_rows=4)
    with Counted("aten::_log_softmax") as seen:
        (logprobs.sum() + (entropies if learnt else entropies.detach()).sum()).backward()
    assert seen.times == (2 if learnt else 0)  # one for each chunk


def test_entropies_alone_have_their_gradient():
    *inputs, ids = wide_layer(rows=5, size=4, vocab=7, dtype=torch.float32)
    _, entropies = linear_token_logprobs(*inputs, ids, with_entropy=True, chunk_rows=2)
    expected = gradients(entropy(plain_logits(*inputs, LogitScaling())).sum(), *inputs)
    assert_close(gradients(entropies.sum(), *inputs), expected, torch.float32)
