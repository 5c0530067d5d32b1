"""A compiled decoding step says what the plain one says, and is compiled no more often than it must be."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.answers import LENGTHS, OTHERS, model_of, prompts, responses
from helpers.compiling import count_compiling, use_backend
from helpers.models import FAMILIES
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.models import compiled_step
from rlhf_lightning.models.compiled_step import COLUMNS, CompiledStep
from rlhf_lightning.models.finetune import FineTune, add_adapter
from rlhf_lightning.models.generation import Sampling, TransformersEngine

GIVEN_UP = "compile_decoding: the decoding step cannot be compiled"
EAGER = {"gpt-neo", "gpt-j", "gemma2"}
NOT_COMPILED = EAGER | {"bloom", "falcon-alibi", "gemma3", "mistral-window", "qwen3-next"}


@pytest.fixture
def counter(monkeypatch):
    return count_compiling(monkeypatch)


def answer(engine, lengths=LENGTHS, sampling=Sampling(max_new_tokens=9)):
    random = torch.Generator().manual_seed(0)
    return engine.generate(*prompts(lengths), sampling, random, with_logprobs=True, with_hidden=True)


def engines(model, batch_size=None):
    return [TransformersEngine(model, tiny_tokenizer(), batch_size, compiled) for compiled in (False, True)]


def assert_same(found, expected):
    assert responses(found) == responses(expected)
    assert torch.equal(found.ended, expected.ended)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in [*FAMILIES, *OTHERS] if name not in NOT_COMPILED])
def test_answers_are_those_of_the_plain_step(name, counter):
    plain, compiled = engines(model_of(name), batch_size=5)
    assert_same(answer(compiled), answer(plain))
    assert compiled.compiled_step.trusted
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", sorted(NOT_COMPILED))
def test_models_of_other_kinds_answer_as_without_it_and_say_so_once(name, counter, monkeypatch):
    model, warned = model_of(name), []
    monkeypatch.setattr(compiled_step, "rank_zero_warn", warned.append)
    plain, compiled = engines(model)
    for _ in range(2):
        assert_same(answer(compiled), answer(plain))
    (warning,) = warned
    assert warning.startswith(GIVEN_UP)
    assert not compiled.compiled_step.trusted


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=9), min_size=1, max_size=4),
    new=st.integers(2, 12),
)
def test_batches_of_any_size_share_the_step_until_one_is_larger(batches, new, monkeypatch):
    counter = count_compiling(monkeypatch)
    model, sampling = model_of("llama-grouped"), Sampling(max_new_tokens=new)
    model.generation_config.eos_token_id = list(range(2, 60))  # some end early, and stay in the batch
    plain, compiled = engines(model)
    rows, capacity, needed = 0, 0, 0
    for lengths in batches:
        found = answer(compiled, lengths, sampling)
        assert_same(found, answer(plain, lengths, sampling))
        columns = max(lengths) + new - 1
        if (len(lengths) > rows or columns > capacity) and found.response_ids.shape[1] > 1:
            needed += 1
        rows, capacity = compiled.compiled_step.num_rows, compiled.compiled_step.capacity
        assert capacity >= columns
        assert capacity % COLUMNS == 0
    assert counter.frame_count <= len(batches)
    assert counter.frame_count == needed


def test_a_cache_that_is_too_short_grows_by_half(counter):
    engine = engines(model_of("llama-grouped"))[1]
    for width, capacity in [(10, 64), (56, 64), (57, 128), (120, 128), (121, 192), (190, 320)]:
        answer(engine, [width])
        assert engine.compiled_step.capacity == capacity
    assert counter.frame_count == 4


def test_generated_code_says_the_same():
    model = model_of("llama-grouped")
    plain, compiled = engines(model)
    for lengths in (LENGTHS, LENGTHS[:4]):
        assert_same(answer(compiled, lengths), answer(plain, lengths))
    assert compiled.compiled_step.trusted


def test_weights_and_adapters_are_those_of_the_moment(counter):
    model = model_of("llama-grouped")
    add_adapter(model, FineTune(mode="lora", rank=4))
    plain, compiled = engines(model)
    answers = []
    for _ in range(3):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        answers.append(answer(compiled))
        assert_same(answers[-1], answer(plain))
    assert not torch.equal(answers[0].hidden[:, 1], answers[1].hidden[:, 1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("is_replayed", [False, True])
def test_adapters_are_not_merged_where_a_graph_is_replayed(is_replayed, counter, monkeypatch):
    model = model_of("llama-grouped")
    add_adapter(model, FineTune(mode="lora", rank=4))
    merged = []
    with monkeypatch.context() as patch:
        plain, compiled = engines(model)
        run = compiled.compiled_step._compiled
        patch.setattr(CompiledStep, "is_replayed", property(lambda _: is_replayed))
        patch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
        watched = lambda *inputs: merged.append(_is_merged(model)) or run(*inputs)  # noqa: E731
        patch.setattr(compiled.compiled_step, "_compiled", watched)
        assert_same(answer(compiled), answer(plain))
    assert set(merged) == {not is_replayed}


def _is_merged(model):
    return any(getattr(module, "merged", False) for module in model.modules())


def test_a_step_that_says_something_else_is_not_used(counter, monkeypatch):
    original = CompiledStep._run
    monkeypatch.setattr(CompiledStep, "_run", lambda self, *inputs: original(self, *inputs) + 1)
    plain, compiled = engines(model_of("llama-grouped"))
    with pytest.warns(UserWarning, match=r"it changes the hidden states by \d+.\d% of their norm"):
        found = answer(compiled)
    assert_same(found, answer(plain))
    assert_same(answer(compiled), answer(plain))


def test_a_failing_compiler_is_named_and_done_without(monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    use_backend(monkeypatch, broken)
    plain, compiled = engines(model_of("llama-grouped"))
    with pytest.warns(UserWarning, match=f"{GIVEN_UP}.*no compiler here"):
        found = answer(compiled)
    assert_same(found, answer(plain))


def test_other_errors_are_not_taken_for_the_compilers(counter, monkeypatch):
    compiled = engines(model_of("llama-grouped"))[1]

    def broken(*inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compiled.compiled_step, "_compiled", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(compiled)
