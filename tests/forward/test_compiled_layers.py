"""Compiled layers say what plain ones say, whatever the layout, and are compiled a few times whatever the batches."""

import copy
import pickle
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.answers import generate
from helpers.compiling import use_backend
from helpers.models import LAYOUTS, closeness, precise, table_lm, tiny_causal_lm, with_dropout
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.forward import compiled_layers as module
from rlhf_lightning.forward.casts import cast_once
from rlhf_lightning.forward.compiled_layers import compiled_layers, layers_are_compiled
from rlhf_lightning.forward.hidden import hidden_states, padded_hidden_states
from rlhf_lightning.forward.numerics import allowed_rounding, relative_distance
from rlhf_lightning.forward.prefix import share_rows
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.finetune import enable_gradient_checkpointing
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import add_adapter

LENGTHS = [[7, 4, 9], [3, 12], [5, 5, 2, 8], [11], [6, 13, 2], [2, 4], [17, 3, 9, 9, 4], [10, 9], [8], [4, 4, 4]]
"""Of the sequences of ten batches."""

GIVEN_UP = "compile: the layers of LlamaForCausalLM cannot be compiled, and go on as they are"


@pytest.fixture
def counter(monkeypatch):
    """Traced forwards and backwards, and run as it is; `frame_count` says how often."""
    made = CompileCounterWithBackend("aot_eager")
    use_backend(monkeypatch, made)
    return made


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(module, "_states", type(module._states)())


def batch_of(lengths):
    """Ids and mask, both `[B, T]`; every sequence begins with the same two tokens."""
    length = max(lengths)
    ids = 3 + (torch.arange(len(lengths) * length).view(len(lengths), length) * 7 + len(lengths)) % 300
    ids[:, :2] = 5
    return ids, torch.arange(length) < torch.tensor(lengths).unsqueeze(1)


def unpadded(model, lengths):
    ids, mask = batch_of(lengths)
    return hidden_states(model, ids, mask)[mask]


def padded(model, lengths):
    ids, mask = batch_of(lengths)
    return padded_hidden_states(model, ids, mask)[mask]


def packed(model, lengths):
    ids, mask = batch_of(lengths)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return hidden_states(model, ids, mask, torch.where(places < 2, places, places - 2) * mask)[mask]


def shared(model, lengths):
    ids, mask = batch_of(lengths)
    rows = share_rows(ids[None], mask[None])
    return rows.hidden_states(model)[rows.mask]


def shared_padded(model, lengths):
    ids, mask = batch_of(lengths)
    rows = share_rows(ids[None], mask[None])
    return rows.padded_hidden_states(model)[rows.mask]


def layer_of(family="llama", layers=1):
    """A model to be trained, of one layer: what takes time here is tracing."""
    size = {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
    return tiny_causal_lm(family, **size).train()


WAYS = [unpadded, padded, *(pytest.param(way, marks=pytest.mark.long) for way in (packed, shared, shared_padded))]
ALL_WAYS = [unpadded, padded, packed, shared, shared_padded]


def results(model, way, lengths, compiled):
    """Hidden states of the real tokens, and the gradients of a sum of them, by name."""
    model.zero_grad()
    torch.manual_seed(1)
    with compiled_layers(model) if compiled else nullcontext():
        hidden = way(model, lengths)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {"hidden": hidden.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(model, way, lengths=LENGTHS[:3], **close):
    """The same for some batches, compiled."""
    for each in lengths:
        found, expected = (results(model, way, each, compiled) for compiled in (True, False))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], **(close or closeness(model)), msg=name)
    (state,) = module._states.values()
    assert not state.reason
    assert state.trusted


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_plain_layers(way, counter):
    assert_same(layer_of("llama").double(), way)
    assert counter.frame_count


@pytest.mark.long
@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt-neox"])
def test_and_so_they_are_in_other_families(family, way, counter):
    assert_same(precise(tiny_causal_lm(family).train()), way)
    assert counter.frame_count


@pytest.mark.long
@pytest.mark.parametrize("way", [unpadded, padded])
def test_adapters_are_compiled_with_their_layers(way, counter):
    model = layer_of().double()
    add_adapter(model, FineTune(mode="lora", rank=2))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert_same(model, way)


@pytest.mark.long
@pytest.mark.parametrize("way", [unpadded, shared])
def test_activations_may_be_computed_again(way, counter):
    model = layer_of().double()
    enable_gradient_checkpointing(model)
    assert_same(model, way)
    assert counter.frame_count <= 2  # rows are padded then, so that a layer is in one piece and not in four


@pytest.mark.long
def test_dropout_draws_what_it_draws_without(counter):
    model = type(tiny_causal_lm("gpt2"))(with_dropout("gpt2")).double().train()
    assert_same(model, padded)


@pytest.mark.long
@pytest.mark.parametrize("way", ALL_WAYS)
def test_ten_more_batches_of_other_shapes_share_what_is_compiled(way, counter):
    model = layer_of().double()
    for lengths in LENGTHS:
        results(model, way, lengths, compiled=True)
    # Two halves of a layer, and of its attention; the whole layer with a mask, without one, and with one row.
    assert counter.frame_count <= 4 + 3
    before = counter.frame_count
    for lengths in LENGTHS:
        results(model, way, [length + 1 for length in lengths], compiled=True)
    assert counter.frame_count == before


def test_more_layers_and_another_model_are_compiled_already(counter):
    results(layer_of(), padded, LENGTHS[0], compiled=True)
    results(layer_of(layers=5), padded, LENGTHS[1], compiled=True)
    assert counter.frame_count == 1


def test_distributed_training_does_not_cut_the_graph(counter, monkeypatch):
    buckets = SimpleNamespace(bucket_bytes_cap=100)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 100)
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", buckets)
    results(layer_of(), padded, LENGTHS[0], compiled=True)
    assert counter.frame_count == 1


@pytest.mark.long
def test_weights_that_are_cast_once_are_not_cast_again(monkeypatch):
    """In a layer's graph; what autocast casts there are the hidden states."""
    casts = Counter()

    def watched(graph, inputs):
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default):
            if node.args[0].op == "placeholder":  # the sizes of others are open, and no keys
                casts[tuple(node.args[0].meta["val"].shape)] += 1
        return graph.forward

    use_backend(monkeypatch, aot_autograd(fw_compiler=watched, bw_compiler=lambda graph, _: graph.forward))
    model = layer_of()
    weights = {tuple(w.shape) for layer in model.model.layers for w in layer.parameters() if w.dim() == 2}
    found = {}
    for once in (False, True):
        torch._dynamo.reset()
        module._states.clear()
        casts.clear()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), cast_once(model) if once else nullcontext():
            found[once] = results(model, padded, LENGTHS[0], compiled=True)
        assert sum(casts[shape] for shape in weights) == (0 if once else 7)
    for name in found[True]:
        assert torch.equal(found[True][name], found[False][name]), name


@pytest.mark.long
@pytest.mark.parametrize("way", [unpadded, padded])
def test_mixed_precision_rounds_as_closely(way, counter):
    model = layer_of()
    exact = results(model, way, LENGTHS[0], compiled=False)["hidden"]
    allowed = allowed_rounding(torch.bfloat16, terms=16, sums=4)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), cast_once(model):
        assert relative_distance(results(model, way, LENGTHS[0], compiled=True)["hidden"], exact) <= allowed
    assert not next(iter(module._states.values())).reason


def test_the_model_is_as_it_was_outside_of_the_block(counter):
    model = layer_of()
    names, before = list(model.state_dict()), [dict(vars(layer)) for layer in model.modules()]
    with compiled_layers(model):
        assert layers_are_compiled(model)
        unpadded(model, LENGTHS[0])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not layers_are_compiled(other)
            assert torch.equal(padded(other, LENGTHS[0]), padded(copy.deepcopy(model), LENGTHS[0]))
        assert list(model.state_dict()) == names
    assert not layers_are_compiled(model)
    assert [dict(vars(layer)) for layer in model.modules()] == before


def test_self_tests_are_of_plain_layers(counter, monkeypatch):
    seen = []
    original = module._Call.__call__
    monkeypatch.setattr(module._Call, "__call__", lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs))
    model = layer_of()
    results(model, unpadded, LENGTHS[0], compiled=True)  # is tested on dummy tokens before
    assert len(seen) == len(model.model.layers)


def test_answers_are_written_by_plain_layers(counter):
    model, ids = layer_of().double(), torch.tensor([[5, 6, 7], [5, 8, 9]])
    asked = model, ids, torch.ones_like(ids).bool(), Sampling(max_new_tokens=4, temperature=0.0), tiny_tokenizer()
    expected = generate(*asked)
    results(model, unpadded, LENGTHS[0], compiled=True)
    before = counter.frame_count
    found = generate(*asked)
    assert counter.frame_count == before
    assert torch.equal(found.response_ids, expected.response_ids)


@pytest.mark.long
def test_a_compiled_decoding_step_stays_compiled_between_updates(counter):
    model, ids = tiny_causal_lm(num_hidden_layers=1).double(), torch.tensor([[5, 6, 7], [5, 8, 9]])
    plain, compiled = (TransformersEngine(model, tiny_tokenizer(), 2, compiled) for compiled in (False, True))
    sampling, counts = Sampling(max_new_tokens=4, temperature=0.0), []
    for lengths in LENGTHS[:3]:
        found, expected = (
            engine.generate(ids, torch.ones_like(ids).bool(), sampling, with_hidden=True)
            for engine in (compiled, plain)
        )
        assert torch.equal(found.response_ids, expected.response_ids)
        torch.testing.assert_close(found.hidden, expected.hidden, **LAYOUTS)
        assert compiled.compiled_step.trusted
        results(model, unpadded, lengths, compiled=True)
        with torch.no_grad(), compiled_layers(model):  # as answers are scored
            unpadded(model, lengths)
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]


def test_layers_that_say_something_else_are_not_used(counter, monkeypatch):
    model = layer_of().double()
    compiled = module._State(model)
    run = compiled.compiled
    compiled.compiled = lambda *args: run(*args) + 1
    module._states[model] = compiled
    with pytest.warns(UserWarning, match=rf"{GIVEN_UP}: it changes the hidden states by \d+\.\d% of their norm"):
        found = results(model, padded, LENGTHS[0], compiled=True)
    expected = results(model, padded, LENGTHS[0], compiled=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pads_without_a_number_are_not_compared(counter):
    model = layer_of().double()
    model.get_input_embeddings().weight.data[0] = 0
    ids, mask = torch.tensor([[5, 6, 7], [0, 0, 5]]), torch.tensor([[True] * 3, [False, False, True]])
    with compiled_layers(model):
        padded_hidden_states(model, ids, mask)
    assert not module.uncompiled_reason(model)


@pytest.mark.parametrize("way", [unpadded, padded])
def test_a_failing_compiler_is_named_and_done_without(way, monkeypatch):
    asked = []

    def broken(graph, inputs):
        asked.append(graph)
        raise OSError("no compiler here")

    use_backend(monkeypatch, broken)
    model = layer_of().double()
    with pytest.warns(UserWarning, match=f"{GIVEN_UP}: .*no compiler here"):
        found = results(model, way, LENGTHS[0], compiled=True)
    again = results(model, way, LENGTHS[1], compiled=True)
    assert len(asked) == 1
    for lengths, each in ((LENGTHS[0], found), (LENGTHS[1], again)):
        expected = results(model, way, lengths, compiled=False)
        assert all(torch.equal(each[name], expected[name]) for name in expected)


def test_one_that_fails_at_the_backward_pass_is_noticed_before_it(monkeypatch):
    def broken(graph, inputs):
        raise OSError("no backward pass here")

    use_backend(monkeypatch, aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken))
    model = layer_of().double()
    with pytest.warns(UserWarning, match=f"{GIVEN_UP}: .*no backward pass here"):
        found = results(model, padded, LENGTHS[0], compiled=True)
    expected = results(model, padded, LENGTHS[0], compiled=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_errors_of_a_layer_are_not_taken_for_the_compilers(counter, monkeypatch):
    model = layer_of()
    module._states[model] = state = module._State(model)

    def broken(*args):
        raise RuntimeError("out of memory")

    state.compiled = broken
    with pytest.raises(RuntimeError, match="out of memory"), compiled_layers(model):
        padded(model, LENGTHS[0])
    assert not layers_are_compiled(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: table_lm([[0.5, 0.5], [0.5, 0.5]]), "its layers are not found"),
        (lambda: _marked(tiny_causal_lm(), "linear_attention"), "it has layers of type 'linear_attention'"),
        (lambda: _sharded(tiny_causal_lm()), "its weights are sharded over processes"),
    ],
)
def test_models_of_other_kinds_go_uncompiled_and_say_so_once(make, reason, monkeypatch):
    model, warned = make(), []
    monkeypatch.setattr(module, "rank_zero_warn", warned.append)
    for _ in range(2):
        with compiled_layers(model):
            assert not layers_are_compiled(model)
    (warning,) = warned
    assert warning.endswith(f"cannot be compiled, and go on as they are: {reason}")


def _marked(model, kind):
    model.config.layer_types = [kind] * 2
    return model


def _sharded(model):
    next(model.parameters()).ds_id = 0
    return model


@pytest.mark.long
@pytest.mark.parametrize("way", [unpadded, padded])
def test_generated_code_says_the_same(way):
    torch._dynamo.reset()
    assert_same(layer_of().double(), way)


@pytest.mark.long
def test_generated_code_draws_the_same_dropout():
    torch._dynamo.reset()
    assert_same(type(tiny_causal_lm("gpt2"))(with_dropout("gpt2")).double().train(), padded)
