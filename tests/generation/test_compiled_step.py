"""A compiled decoding step says what the plain one says, and is compiled no more often than it must be."""

import warnings
from inspect import Signature, signature
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from helpers.answers import LENGTHS, OTHERS, model_of, prompts, responses
from helpers.compiling import count_compiling, use_backend
from helpers.models import FAMILIES, LAYOUTS, precise
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.forward.backbone import cache_argument
from rlhf_lightning.forward.output_layer import output_logits
from rlhf_lightning.generation import cache as rollout_cache
from rlhf_lightning.generation import compiled_step, decoding
from rlhf_lightning.generation.compiled_step import COLUMNS, CompiledStep, compiling_pays
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.picking import CompiledPick, Rules
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import add_adapter

GIVEN_UP = "compile_decoding: the decoding step cannot be compiled"
# Of these some versions of transformers have no SDPA.
EAGER = {name for name in ("gpt-neo", "gpt-j") if model_of(name).config._attn_implementation == "eager"}
NOT_COMPILED = EAGER | {"bloom", "falcon-alibi", "gemma2", "gemma3", "mistral-window", "qwen3-next"}


def test_a_model_whose_attention_is_not_sdpa_is_not_compiled():
    model = model_of("llama")
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match=f"{GIVEN_UP}.*: its attention is eager, not sdpa"):
        assert CompiledStep(model).reason


@pytest.fixture
def counter(monkeypatch):
    return count_compiling(monkeypatch)


def grouped():
    """Heads that share keys, in one layer: what takes time here is tracing, half a second for each layer."""
    return model_of("llama-grouped", layers=1)


def answer(engine, lengths=LENGTHS, sampling=Sampling(max_new_tokens=9)):
    random = torch.Generator().manual_seed(0)
    return engine.generate(*prompts(lengths), sampling, generator=random, with_logprobs=True, with_hidden=True)


def engines(model, batch_size=None):
    return [TransformersEngine(model, tiny_tokenizer(), batch_size, compiled) for compiled in (False, True)]


def assert_same(found, expected):
    assert responses(found) == responses(expected)
    assert torch.equal(found.ended, expected.ended)
    torch.testing.assert_close(found.logprobs, expected.logprobs, **LAYOUTS)
    torch.testing.assert_close(found.hidden, expected.hidden, **LAYOUTS)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in [*FAMILIES, *OTHERS] if name not in NOT_COMPILED])
def test_answers_are_those_of_the_plain_step(name, counter):
    layers = 2 if name in OTHERS else 1  # that layers are told apart does not depend on the family
    plain, compiled = engines(precise(model_of(name, layers=layers)), batch_size=5)
    assert_same(answer(compiled), answer(plain))
    assert compiled.compiled_step.trusted
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", sorted(NOT_COMPILED))
def test_models_of_other_kinds_answer_as_without_it_and_say_so_once(name, counter, monkeypatch):
    model, warned = precise(model_of(name)), []
    monkeypatch.setattr(compiled_step, "rank_zero_warn", warned.append)
    plain, compiled = engines(model)
    for _ in range(2):
        assert_same(answer(compiled), answer(plain))
    (warning,) = warned
    assert warning.startswith(GIVEN_UP)
    assert not compiled.compiled_step.trusted


@pytest.mark.long
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=9), min_size=1, max_size=3),
    new=st.integers(2, 12),
)
def test_batches_of_any_size_share_the_step_until_one_is_larger(batches, new, monkeypatch):
    counter = count_compiling(monkeypatch)
    model, sampling = grouped().double(), Sampling(max_new_tokens=new)
    model.generation_config.eos_token_id = list(range(2, 60))  # some end early, and stay in the batch
    plain, compiled = engines(model)
    step, sizes = compiled.compiled_step, set()
    for lengths in batches:
        before = step.num_rows, step.capacity
        found = answer(compiled, lengths, sampling)
        assert_same(found, answer(plain, lengths, sampling))
        columns = max(lengths) + new - 1
        if len(lengths) <= before[0] and columns <= before[1]:
            assert (step.num_rows, step.capacity) == before
        assert step.num_rows >= len(lengths)
        assert step.capacity >= columns
        assert step.capacity % COLUMNS == 0
        if found.response_ids.shape[1] > 1:
            sizes.add((step.num_rows, step.capacity))
    assert counter.frame_count == len(sizes)


def test_the_usual_number_of_prompts_is_allocated_at_once(counter):
    compiled = engines(grouped(), batch_size=5)[1]
    for lengths in ([3, 4], LENGTHS, LENGTHS[:3]):
        answer(compiled, lengths)
    assert compiled.compiled_step.num_rows == 5
    assert counter.frame_count == 1


@pytest.mark.parametrize("first", [True, False])
def test_validation_between_rollouts_leaves_nothing_that_training_cannot_write(first, counter):
    plain, compiled = engines(grouped().double())
    for inference in (first, not first, first):
        with torch.inference_mode(inference):
            assert_same(answer(compiled), answer(plain))
    assert counter.frame_count == 1


def test_distributed_training_does_not_cut_the_graph(counter, monkeypatch):
    buckets = SimpleNamespace(bucket_bytes_cap=100)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 100)
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", buckets)
    plain, compiled = engines(grouped().double())
    assert_same(answer(compiled), answer(plain))
    assert counter.frame_count == 1


@pytest.mark.long
def test_in_mixed_precision_it_is_compared_by_that_precision():
    with torch.autocast("cpu", torch.bfloat16):
        plain, compiled = engines(grouped())
        found, expected = answer(compiled), answer(plain)
    assert compiled.compiled_step.trusted
    assert found.response_ids[:, 0].equal(expected.response_ids[:, 0])


def renamed(model):
    """A model that calls its cache as another version of transformers does: `cache` for `past_key_values`."""
    usual = cache_argument(model)
    other = {"past_key_values": "cache", "cache": "past_key_values"}[usual]
    plain = model.model.forward

    def forward(**kwargs):
        assert kwargs.get(usual) is None
        return plain(**kwargs | {usual: kwargs.pop(other, None)})

    parameters = signature(plain).parameters.values()
    forward.__signature__ = Signature([p.replace(name=other) if p.name == usual else p for p in parameters])
    model.model.forward = forward
    return model


def test_a_cache_is_given_by_the_name_that_the_model_has_for_it(counter):
    plain = engines(grouped().double())[0]
    for engine in engines(renamed(grouped().double())):
        assert_same(answer(engine), answer(plain))
    assert engine.compiled_step.trusted


def test_heads_that_share_a_key_are_not_copied(counter, monkeypatch):
    asked = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        asked.append((query.shape, key.shape))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(rollout_cache.torch.nn.functional, "scaled_dot_product_attention", watched)
    answer(engines(grouped())[1], sampling=Sampling(max_new_tokens=2))  # each token is traced anew: `asked` has changed
    shape = len(LENGTHS), 2, 2, 8  # 4 heads on 2 keys
    assert asked[-1] == (shape, (len(LENGTHS), 2, COLUMNS, 8))


@pytest.mark.long
def test_a_cache_that_is_too_short_grows_by_half(counter):
    engine = engines(grouped())[1]
    for width, capacity in [(10, 64), (56, 64), (57, 128), (120, 128), (121, 192), (190, 320)]:
        answer(engine, [width])
        assert engine.compiled_step.capacity == capacity
    assert counter.frame_count == 4


@pytest.mark.long
def test_generated_code_says_the_same():
    model = grouped().double()
    plain, compiled = engines(model)
    for lengths in (LENGTHS, LENGTHS[:4]):
        assert_same(answer(compiled, lengths), answer(plain, lengths))
    assert compiled.compiled_step.trusted


@pytest.fixture(params=[False, True])
def is_replayed(request, monkeypatch):
    """Whether the step is taken for a CUDA graph, but for its being one."""
    monkeypatch.setattr(CompiledStep, "is_replayed", property(lambda _: request.param))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    return request.param


def adapted():
    model = grouped().double()
    add_adapter(model, FineTune(mode="lora", rank=4))
    return model


def test_weights_and_adapters_are_those_of_the_moment(counter, is_replayed):
    model = adapted()
    plain, compiled = engines(model)
    answers = []
    for _ in range(3):
        for name, parameter in model.named_parameters():
            if "lora_" in name or "norm" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        answers.append(answer(compiled))
        assert_same(answers[-1], answer(plain))
    assert not torch.equal(answers[0].hidden[:, 1], answers[1].hidden[:, 1])
    assert counter.frame_count == 1


def test_a_graph_finds_what_it_reads_where_it_was(is_replayed, counter, monkeypatch):
    """In mixed precision, too, where casts are made of the merged weights."""
    model = adapted().float()
    read, places = CompiledStep._read, []

    def watched(step):
        layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
        places.append([part.data_ptr() for part in (*model.parameters(), *(layer.weight for layer in layers))])
        return read(step)

    monkeypatch.setattr(CompiledStep, "_read", watched)
    compiled = engines(model)[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            answer(compiled)
        model(*prompts(LENGTHS)).logits.square().mean().backward()
        optimizer.step()
    moved = [before for before in places if before != places[0]]
    assert len(places) > 6
    assert not (moved and is_replayed)
    assert moved or is_replayed  # or nothing has been seen


def test_nothing_of_adapters_is_left_in_the_graph(is_replayed, monkeypatch):
    products = []

    def backend(graph, inputs):
        names = [str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes]
        products.append(sum(name in ("linear", "matmul", "mm", "addmm") for name in names))
        return graph.forward

    use_backend(monkeypatch, backend)
    for model in (grouped().double(), adapted()):
        answer(engines(model)[1])
    assert products[0] == products[1] > 0


def test_a_step_that_says_something_else_is_not_used(counter, monkeypatch):
    original = CompiledStep._run
    monkeypatch.setattr(CompiledStep, "_run", lambda self, *inputs: original(self, *inputs) + 1)
    plain, compiled = engines(grouped().double())
    with pytest.warns(UserWarning, match=r"it changes the hidden states by \d+.\d% of their norm"):
        found = answer(compiled)
    assert_same(found, answer(plain))
    assert_same(answer(compiled), answer(plain))


WAYS = [
    Sampling(max_new_tokens=9),
    Sampling(temperature=0.7, top_k=5, max_new_tokens=9, min_new_tokens=4),
    Sampling(temperature=1.3, top_p=0.8, max_new_tokens=9, stop_strings=["a"]),
    Sampling(temperature=0.0, max_new_tokens=9, min_new_tokens=2),
]


@pytest.mark.parametrize("generated", [False, pytest.param(True, marks=pytest.mark.long)])
def test_tokens_are_drawn_in_the_step_as_without_it(generated, monkeypatch):
    use_backend(monkeypatch, "eager", picking="inductor" if generated else "eager")
    model = grouped()
    model.generation_config.eos_token_id = list(range(2, 30))  # some end early
    plain, compiled = engines(model, batch_size=len(LENGTHS) + 1)
    expected = [answer(plain, sampling=sampling) for sampling in WAYS]
    assert not expected[0].response_mask.all()
    assert len({length for row in expected for length in row.response_mask.sum(dim=1).tolist()}) > 3
    drawn = []
    monkeypatch.setattr(decoding, "output_logits", lambda *given: drawn.append(given) or output_logits(*given))
    for _ in range(2):
        for sampling, response in zip(WAYS, expected, strict=True):
            assert_same(answer(compiled, sampling=sampling), response)
    assert len(drawn) == 2 * len(WAYS)  # of each batch the first token


def test_random_numbers_keep_their_digits_after_a_greedy_batch(counter):
    model = grouped()
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are as likely
    compiled = CompiledPick(model, 3, replayed=False)
    hidden, over, ends = torch.zeros(2, 32), torch.zeros(2, dtype=torch.bool), torch.tensor([1])
    size = model.config.vocab_size
    close = torch.tensor([8 - 1e-9, 8 + 1e-9], dtype=torch.float64) / size
    for temperature, uniform, tokens in ((0.0, torch.ones(2), [0, 0]), (1.0, close, [7, 8])):
        rules = Rules(Sampling(temperature=temperature), filler=0, with_logprobs=False)
        assert compiled(hidden, uniform, over, ends, True, rules).ids.tolist() == tokens


def test_a_way_to_draw_is_compiled_once(monkeypatch):
    counter = CompileCounter()
    use_backend(monkeypatch, "eager", picking=counter)
    compiled = engines(grouped())[1]
    for _ in range(2):
        for sampling in (Sampling(max_new_tokens=4), Sampling(max_new_tokens=6, stop_strings=["a"]), Sampling(top_k=3)):
            for lengths in (LENGTHS, LENGTHS[:3]):
                answer(compiled, lengths, sampling)
    assert counter.frame_count == 2


@pytest.mark.parametrize("fault", ["no compiler here", "it draws 12 of 12 otherwise"])
def test_where_drawing_cannot_be_compiled_it_goes_on_without(fault, monkeypatch):
    def broken(graph, inputs):
        if "compiler" in fault:
            raise OSError(fault)
        return lambda *given: [torch.zeros_like(part) for part in graph.forward(*given)]

    use_backend(monkeypatch, "eager", picking=broken)
    plain, compiled = engines(grouped())
    with pytest.warns(UserWarning, match=f"compile_decoding: tokens are drawn from the logits as without it.*{fault}"):
        found = answer(compiled)
    assert_same(found, answer(plain))
    longer = (COLUMNS + 1, *LENGTHS)  # room is made for more columns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(answer(compiled, longer), answer(plain, longer))
    assert_same(answer(compiled), answer(plain))
    assert compiled.compiled_step.trusted
    resumed = engines(grouped())[1]
    with pytest.warns(UserWarning, match=fault):
        resumed.compiled_step.go_on_with(*compiled.compiled_step.said)
    assert resumed.compiled_step.said == compiled.compiled_step.said
    assert_same(answer(resumed), answer(plain))


def test_one_that_says_nothing_is_not_used_either(counter, monkeypatch):
    monkeypatch.setattr(CompiledStep, "_read", lambda self: torch.full((self.num_rows, 32), float("nan")))
    plain, compiled = engines(grouped().double())
    with pytest.warns(UserWarning, match=r"it changes the hidden states by nan%"):
        found = answer(compiled)
    assert_same(found, answer(plain))


def test_a_failure_after_the_cache_has_grown_is_survived(monkeypatch):
    graphs = []

    def second_fails(graph, inputs):
        graphs.append(graph)
        if len(graphs) > 1:
            raise OSError("no compiler any more")
        return graph.forward

    use_backend(monkeypatch, second_fails)
    plain, compiled = engines(grouped().double())
    assert_same(answer(compiled), answer(plain))
    assert compiled.compiled_step.trusted
    with pytest.warns(UserWarning, match="no compiler any more"):
        found = answer(compiled, [*LENGTHS, 5])
    assert_same(found, answer(plain, [*LENGTHS, 5]))
    assert not compiled.compiled_step.is_replayed


def test_a_failing_compiler_is_named_and_done_without(monkeypatch):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    use_backend(monkeypatch, broken)
    plain, compiled = engines(grouped().double())
    with pytest.warns(UserWarning, match=f"{GIVEN_UP}.*no compiler here"):
        found = answer(compiled)
    assert_same(found, answer(plain))


def test_other_errors_are_not_taken_for_the_compilers(counter, monkeypatch):
    compiled = engines(grouped())[1]

    def broken(step):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(CompiledStep, "_read", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(compiled)


def test_buffers_that_a_graph_writes_are_known_to_stay_where_they_are(monkeypatch):
    marked = []

    def backend(graph, inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            if tuple(node.meta["example_value"].shape) == (len(LENGTHS), 2, COLUMNS, 8):
                marked.append("_dynamo_static_input_type" in node.meta["tensor_dict"])
        return graph.forward

    use_backend(monkeypatch, backend)
    engine = engines(grouped())[1]
    with monkeypatch.context() as patch:
        patch.setattr(CompiledStep, "is_replayed", property(lambda _: True))
        patch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
        answer(engine)
    assert marked == [True] * 2  # keys and values


@pytest.mark.parametrize("then", [[9, 8, 7], [70]])  # one that fits, and one for which the cache grows
def test_a_step_that_goes_on_with_the_sizes_of_another_rounds_as_that_does(then, counter):
    model = grouped()
    first, second = (engines(model, batch_size=2)[1] for _ in range(2))
    answer(first, [3, 60, 4])
    second.compiled_step.go_on_with(first.compiled_step.sizes)
    expected, found = answer(first, then), answer(second, then)
    assert second.compiled_step.sizes == first.compiled_step.sizes
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.hidden, expected.hidden)


def test_compiling_pays_in_long_runs_on_a_gpu():
    model = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_step, "_obstacle", lambda model: "")
        assert compiling_pays(model, float("inf"))
        assert not compiling_pays(model, 1_000)
        model.device.type = "cpu"
        assert not compiling_pays(model, float("inf"))
        model.device.type = "cuda"
        patch.setattr(compiled_step, "_obstacle", lambda model: "its attention is eager")
        assert not compiling_pays(model, float("inf"))
