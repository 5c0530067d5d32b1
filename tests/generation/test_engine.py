"""The engine says what transformers says, and its shortcuts change nothing."""

import gc
import math
import weakref
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from helpers.answers import EOS, LENGTHS, OTHERS, model_of, prompts, responses
from helpers.models import FAMILIES, LAYOUTS, closeness, precise, tiny_causal_lm
from helpers.stages import same_weights, weights
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import response_hidden, response_logprobs
from rlhf_lightning.generation import cache as rollout_cache
from rlhf_lightning.generation import decoding, engine
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling, draw_tokens, uniforms
from rlhf_lightning.models import merging
from rlhf_lightning.models.merging import merged_adapters


def run(model, sampling, lengths=LENGTHS, batch_size=None, order=None, extra=0, **options):
    ids, mask = prompts(lengths, extra)
    if order is not None:
        ids, mask = ids[order], mask[order]
    answering = TransformersEngine(model, tiny_tokenizer(), batch_size)
    return answering.generate(ids, mask, sampling, generator=torch.Generator().manual_seed(0), **options)


@pytest.fixture
def small_parts(monkeypatch):
    """Several groups of prompts to be read, several of rows to be continued."""
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 24)
    monkeypatch.setattr(rollout_cache, "ROWS_PER_GROUP", 2)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.usefixtures("small_parts")
def test_greedy_answers_are_those_of_transformers(family):
    model = model_of(family)
    # An EOS that comes soon for some rows, so that they leave while others stay.
    ids, mask = prompts()
    options = {"do_sample": False, "max_new_tokens": 14, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]
    model.generation_config.eos_token_id = [EOS, Counter(plain[:, 2:7].flatten().tolist()).most_common(1)[0][0]]
    theirs = model.generate(ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]
    before = model.config._attn_implementation
    ours = run(model, Sampling(temperature=0.0, max_new_tokens=14))
    assert model.config._attn_implementation == before
    expected = [row[: n + 1].tolist() for row, n in zip(theirs, _ends(theirs, model), strict=True)]
    assert responses(ours) == expected
    assert len({len(response) for response in expected}) > 1


def _ends(ids, model):
    ends = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id))
    return [row.index(True) if any(row) else len(row) for row in ends.tolist()]


def read_as_rows(monkeypatch, model):
    """Lengths of the prompts that each forward pass reads as one row."""
    read = []
    run(model, Sampling(max_new_tokens=1))  # it is tried out before its first use
    original = decoding.read_row
    monkeypatch.setattr(
        decoding,
        "read_row",
        lambda model, ids, lengths, cache: read.append(lengths) or original(model, ids, lengths, cache),
    )
    return read


@pytest.mark.parametrize("name", ["llama-grouped", "qwen2", "qwen3"])
@pytest.mark.usefixtures("small_parts")
def test_prompts_read_as_one_row_are_continued_as_if_read_with_their_padding(name, monkeypatch):
    model, sampling = model_of(name).double(), Sampling(max_new_tokens=9)
    read = read_as_rows(monkeypatch, model)
    found = run(model, sampling, with_logprobs=True, with_hidden=True)
    assert read == [[20], [17], [12, 9], [9, 6, 5, 4], [3, 2, 1, 1]]  # up to 24 tokens
    monkeypatch.setattr(decoding, "reads_rows", lambda *args: False)
    expected = run(model, sampling, with_logprobs=True, with_hidden=True)
    assert torch.equal(found.response_ids, expected.response_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, **LAYOUTS)
    torch.testing.assert_close(found.hidden, expected.hidden, **LAYOUTS)


@pytest.mark.parametrize(
    ("name", "lengths"), [("mistral-window", LENGTHS), ("gemma3", LENGTHS), ("qwen3-next", LENGTHS), ("llama", [4, 0])]
)
def test_windows_states_and_empty_prompts_are_read_with_their_padding(name, lengths, monkeypatch):
    model = model_of(name)
    read = read_as_rows(monkeypatch, model)
    assert run(model, Sampling(max_new_tokens=2), lengths).response_ids.shape[0] == len(lengths)
    assert not read


@pytest.mark.parametrize("name", ["llama-grouped", "gpt-neox", "gpt2", "opt", "qwen3", "mistral-window", "gemma3"])
@pytest.mark.usefixtures("small_parts")
def test_padding_is_not_read(name, monkeypatch):
    """Rows are really attended in groups where the model lets them, and nothing else is."""
    widths = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        widths.append((key.shape[0], key.shape[2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    run(model_of(name), Sampling(temperature=0.0, max_new_tokens=2, min_new_tokens=2))
    grouped = [(2, 21), (2, 13), (2, 10), (2, 6), (2, 4), (2, 2)]
    layers = {"mistral-window": 0, "gemma3": 1}.get(name, 2)
    assert sum(widths[i : i + 6] == grouped for i in range(len(widths))) == layers


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    batch_size=st.none() | st.integers(1, 12),
    extra=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_neither_order_nor_batch_size_nor_padding_matters(lengths, batch_size, extra, seed):
    model = model_of("llama-grouped", seed)
    sampling = Sampling(max_new_tokens=8)
    model.generation_config.eos_token_id = list(range(2, 60))
    plain = run(model, sampling, lengths)
    other = run(model, sampling, lengths, batch_size, extra=extra)
    assert responses(other) == responses(plain)
    assert torch.equal(other.ended, plain.ended)


def test_greedy_answers_do_not_depend_on_the_order():
    model, sampling = model_of("llama-grouped"), Sampling(temperature=0.0, max_new_tokens=8)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(4))
    plain, other = responses(run(model, sampling)), responses(run(model, sampling, order=order))
    assert other == [plain[i] for i in order]


@pytest.mark.parametrize(
    "patch",
    [
        {"LEAVING_SHARE": 0},  # rows never leave
        {"LEAVING_SHARE": 99},  # each leaves at once
        {"STEPS_BETWEEN_LOOKS": {"cpu": 5}},
        {"PREFILL_TOKENS": {"cpu": 1}},
        {"rollout_cache": lambda *_: None},
        {"attention_by_rows": None},
    ],
    ids=["never leave", "leave at once", "looked for seldom", "read one by one", "library's cache", "library's mask"],
)
def test_when_rows_leave_does_not_matter(patch, monkeypatch):
    model = model_of("llama-grouped").double()
    model.generation_config.eos_token_id = list(range(2, 60))
    sampling = Sampling(max_new_tokens=20, temperature=1.5, stop_strings=["e"])
    plain = run(model, sampling, with_logprobs=True)
    assert len(set(plain.response_mask.sum(dim=1).tolist())) > 4
    for name, value in patch.items():
        if name == "attention_by_rows":
            monkeypatch.setattr(rollout_cache, "attention_function", lambda *_: nullcontext())
        else:
            monkeypatch.setattr(decoding, name, value)
    other = run(model, sampling, with_logprobs=True)
    assert responses(other) == responses(plain)
    assert torch.equal(other.ended, plain.ended)
    torch.testing.assert_close(other.logprobs, plain.logprobs, **LAYOUTS)


def test_nothing_holds_on_to_the_cache_afterwards(monkeypatch):
    caches, original = weakref.WeakSet(), decoding.rollout_cache

    def watched(*args):
        cache = original(*args)
        caches.add(cache)
        return cache

    monkeypatch.setattr(decoding, "rollout_cache", watched)
    run(model_of("llama-grouped"), Sampling(max_new_tokens=3))
    gc.collect()
    assert not caches


def test_the_same_call_gives_the_same_bits():
    model, sampling = model_of("llama-grouped"), Sampling(max_new_tokens=8)
    first, again = (run(model, sampling, with_logprobs=True, with_hidden=True) for _ in range(2))
    assert first.sampler_logprobs is again.sampler_logprobs is None
    for a, b in zip(first[:5], again[:5], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_the_cache_holds_what_autocast_multiplies_and_answers_to_the_same_bits(name, monkeypatch):
    model, types = model_of(name), set()
    held = rollout_cache.as_multiplied

    def answered():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return run(model, Sampling(max_new_tokens=8), with_logprobs=True)

    def watched(states):
        types.add(held(states).dtype)
        return held(states)

    answered()  # the model is tested, without autocast
    monkeypatch.setattr(rollout_cache, "as_multiplied", watched)
    found = answered()
    assert types == {torch.bfloat16}
    monkeypatch.setattr(rollout_cache, "as_multiplied", lambda states: states)
    expected = answered()
    assert torch.equal(found.response_ids, expected.response_ids)
    assert torch.equal(found.logprobs, expected.logprobs)


def test_random_numbers_consumed_do_not_depend_on_the_answers():
    model, states = model_of("llama-grouped"), []
    for eos in (EOS, list(range(250))):
        model.generation_config.eos_token_id = eos
        random, (ids, mask) = torch.Generator().manual_seed(0), prompts()
        TransformersEngine(model, tiny_tokenizer(), 5).generate(ids, mask, Sampling(max_new_tokens=8), generator=random)
        states.append(random.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=9),
        Sampling(max_new_tokens=9, temperature=0.7, top_k=3, top_p=0.8, min_new_tokens=3),
        Sampling(max_new_tokens=9, temperature=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama-grouped", "gemma3", "gpt2", "cohere", "gemma2"])
def test_logprobs_are_those_of_response_logprobs(name, sampling):
    model = precise(model_of(name))
    model.generation_config.eos_token_id = list(range(2, 60))
    generation = run(model, sampling, batch_size=7, with_logprobs=True, with_hidden=True)
    (ids, mask), temperature = prompts(), sampling.temperature or 1.0
    whole = torch.cat([ids, generation.response_ids], dim=1), torch.cat([mask, generation.response_mask], dim=1)
    expected, _ = response_logprobs(model, *whole, generation.response_mask, temperature)
    assert generation.logprobs.dtype is torch.float32
    torch.testing.assert_close(generation.logprobs, expected, **closeness(model))
    assert not generation.logprobs[~generation.response_mask].any()

    hidden = response_hidden(model, *whole, generation.response_mask.shape[1])
    assert not generation.hidden[~generation.response_mask].any()
    torch.testing.assert_close(
        generation.hidden[generation.response_mask], hidden[generation.response_mask], **closeness(model)
    )


def test_log_probabilities_only_where_asked_for():
    assert run(model_of("llama-grouped"), Sampling(max_new_tokens=2)).logprobs is None


def test_an_error_in_between_leaves_the_model_as_it_was():
    model = model_of("llama-grouped").train()

    def interrupt(count):
        assert model.config._attn_implementation == rollout_cache.BY_ROWS
        raise KeyError(count)

    with pytest.raises(KeyError, match="1") as error:
        run(model, Sampling(), on_token=interrupt)
    assert error.traceback  # which keeps the frames alive
    assert model.training
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("first", "second"), [((8, 8, 8, 2), (8,) * 9 + (2,)), ((8,) * 9 + (2,), (8, 8, 8, 2))])
def test_streams_of_two_models_may_take_turns(first, second):
    """More than eight rows are read in groups, each of which sees the columns it needs."""
    sampling, expected, streams = Sampling(temperature=0.0, max_new_tokens=6, min_new_tokens=6), [], []
    for seed, lengths in enumerate((first, second)):
        mask = torch.arange(8) >= 8 - torch.tensor(lengths).unsqueeze(1)
        asked = torch.randint(3, 60, mask.shape, generator=torch.Generator().manual_seed(seed)), mask
        engine = TransformersEngine(precise(tiny_causal_lm("llama", seed)), tiny_tokenizer())
        expected.append(engine.generate(*asked, sampling).response_ids)
        streams.append(engine.stream(*asked, sampling))
    *_, answers = zip(*streams, strict=True)
    for found, wanted in zip(answers, expected, strict=True):
        assert torch.equal(found.response_ids, wanted)


def test_tokens_of_several_batches_are_counted_together():
    counts = []
    run(model_of("llama-grouped"), Sampling(max_new_tokens=3, min_new_tokens=3), batch_size=5, on_token=counts.append)
    assert counts == list(range(1, 10))


@pytest.mark.parametrize("size", [5, 256, 257, 1000])
def test_tokens_are_drawn_with_their_probabilities(size):
    """Chi-square test at 0.1% over a vocabulary of several blocks, the rarest tokens pooled."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2
    draws, random = 0, torch.Generator().manual_seed(1)
    counts = torch.zeros(size)
    for _ in range(20):
        drawn = draw_tokens(logits.expand(2000, size), uniforms((2000,), random), temperature=1.3)
        counts += drawn.bincount(minlength=size)
        draws += len(drawn)
    expected = torch.softmax(logits.double() / 1.3, dim=0) * draws
    common = expected >= 10
    observed = torch.cat([counts[common].double(), counts[~common].sum().double().view(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().view(1)])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    # Wilson and Hilferty's approximation of the 99.9% quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((observed - wanted) ** 2 / wanted).sum() < bound


@given(st.integers(1, 700), st.integers(0, 10**6), st.data())
@settings(max_examples=50, deadline=None)
def test_the_drawn_token_is_where_the_running_sum_reaches_the_number(size, seed, data):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=random) * 3
    allowed = torch.rand(4, size, generator=random) < 0.5
    allowed[:, data.draw(st.integers(0, size - 1))] = True
    logits = logits.masked_fill(~allowed, float("-inf"))
    smallest, largest = 2.0**-53, 1.0
    uniform = torch.tensor([smallest, largest, 0.5, data.draw(st.floats(smallest, largest))], dtype=torch.float64)
    drawn = draw_tokens(logits, uniform)
    assert allowed.gather(1, drawn.unsqueeze(1)).all()
    sums = torch.softmax(logits.double(), dim=1).cumsum(dim=1)
    assert (sums.gather(1, drawn.unsqueeze(1)).squeeze(1) >= uniform - 1e-6).all()
    below = torch.where(drawn > 0, sums.gather(1, (drawn - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0)
    assert (below <= uniform + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_that_has_diverged_is_refused(temperature):
    model = model_of("llama-grouped")
    torch.nn.init.constant_(model.lm_head.weight[5], float("nan"))
    with pytest.raises(UserError, match="not a number"):
        run(model, Sampling(temperature=temperature))


def adapted(targets="all-linear", tied=False, **options):
    model = tiny_causal_lm("llama", seed=3, tie_word_embeddings=tied)
    config = LoraConfig(r=2, target_modules=targets, **options)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
def test_merging_adapters_changes_nothing_and_leaves_no_trace(options, monkeypatch):
    model, sampling = adapted(**options).double().train(), Sampling(temperature=0.0, max_new_tokens=8)
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    merged = run(model, sampling, with_logprobs=True)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][1]
        assert torch.equal(value, before[name][2])
    monkeypatch.setattr(engine, "merged_adapters", lambda *_, **__: nullcontext())
    apart = run(model, sampling, with_logprobs=True)
    assert responses(merged) == responses(apart)
    torch.testing.assert_close(merged.logprobs, apart.logprobs, **LAYOUTS)


@pytest.mark.parametrize("in_place", [False, True])
def test_adapters_are_merged_inside_and_apart_after_an_error(in_place):
    model = adapted(["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight
    before, place = weight.clone(), weight.data_ptr()
    with merged_adapters(model, in_place):
        assert layer.merged
        assert (weight.data_ptr() == place) is in_place
        torch.testing.assert_close(weight, before + layer.get_delta_weight("default"))
    with pytest.raises(KeyError, match="True"), merged_adapters(model, in_place):
        raise KeyError(layer.merged)
    assert not layer.merged
    assert weight.data_ptr() == place
    assert torch.equal(weight, before)


def test_adapters_that_cannot_all_be_merged_leave_no_weight_changed(monkeypatch):
    model = adapted(["q_proj"])
    before = weights(model)
    merge, calls = merging._merged_weight, []

    def second_fails(*parts):
        calls.append(parts)
        if len(calls) > 1:
            raise MemoryError
        return merge(*parts)

    monkeypatch.setattr(merging, "_merged_weight", second_fails)
    with pytest.raises(MemoryError), merged_adapters(model, in_place=True):
        pass
    assert same_weights(weights(model), before)


def test_adapters_that_must_stay_apart_do():
    model = adapted(["q_proj", "lm_head"], tied=True)
    model.model.layers[1].self_attn.q_proj.base_layer.bfloat16()
    with merged_adapters(model):
        assert not model.lm_head.merged  # its weight is the embedding's
        assert model.model.layers[0].self_attn.q_proj.merged
        assert not model.model.layers[1].self_attn.q_proj.merged


def test_adapters_of_other_kinds_stay_apart():
    """What adds to the bias as well, or changes the layer otherwise, is not what the formula adds."""
    layers = [adapted(["q_proj"], **options).model.layers[0].self_attn.q_proj for options in ({}, {"lora_bias": True})]
    of_both = adapted(["q_proj"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"]), of_both, "other")
    for layer in of_both.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(["default", "other"])
    layers.append(of_both.model.layers[0].self_attn.q_proj)
    for layer, merges in zip(layers, [True, False, False], strict=True):
        with merged_adapters(layer):
            assert layer.merged == merges
        assert not layer.merged
