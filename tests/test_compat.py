"""What our libraries keep to themselves is as it was; each test says what would break here if it were not."""

import inspect
import logging
import pickle
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from helpers.models import tiny_causal_lm
from helpers.other_families import other_causal_lm
from rlhf_lightning import compat
from rlhf_lightning.errors import UserError


def test_models_name_their_attention():
    """Else padding would be computed, prefixes not shared, and no decoding step compiled: each asks for `sdpa`."""
    model = tiny_causal_lm("llama")
    assert compat.attention_kernel(model) == compat.SDPA
    model.set_attn_implementation("eager")
    assert compat.attention_kernel(model) == "eager"


def test_models_tell_whether_they_take_attention_functions():
    """Else padding would be computed for all models, or the attention of some be taken apart in vain."""
    assert compat.takes_attention_functions(tiny_causal_lm("llama"))
    assert not compat.takes_attention_functions(tiny_causal_lm("bloom"))


def test_a_model_tells_whether_it_computes_activations_again():
    """Else the backward pass of batches without padding would find another attention than the forward pass."""
    model = tiny_causal_lm("llama")
    assert not compat.is_checkpointing(model)
    model.gradient_checkpointing_enable()
    assert compat.is_checkpointing(model)


def test_transformers_tells_which_weights_it_writes(tmp_path):
    """Else an export would hold tied weights twice, or lack one that the model looks for."""
    model = tiny_causal_lm("gpt2")
    model._keys_to_ignore_on_save = ["transformer.wpe.weight"]
    model.save_pretrained(tmp_path)
    numbers = {id(tensor): torch.empty(1) for tensor in model.state_dict(keep_vars=True).values()}
    alone = {name: numbers[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    assert len(numbers) < len(alone)  # the output layer is the embedding
    assert sorted(compat.saved_names(model, alone)) == sorted(load_file(tmp_path / "model.safetensors"))


def test_transformers_tells_what_it_writes_of_weights_without_memory(tmp_path):
    """Else an export would have the names that transformers 5 uses, which no other tool knows."""
    model = other_causal_lm("mixtral")
    model.save_pretrained(tmp_path)
    saved = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in compat.as_saved(model, empty).items()} == saved
    assert saved.keys() != empty.keys()


def test_an_attention_function_stands_in_for_sdpa_for_a_while():
    """Else prompts could not be read as one row, nor keys be shared by heads while decoding."""
    model, ids = tiny_causal_lm("llama"), torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape, key.shape, value.shape, attention_mask))
        return compat.sdpa_attention_forward(module, query, key, value, None, **kwargs)

    with compat.attention_function(model, "test_compat", attend, lambda *args, **kwargs: "mask"):
        assert torch.equal(model(ids).logits, expected)
    assert seen == [((1, 2, 3, 8), (1, 1, 3, 8), (1, 1, 3, 8), "mask")] * 2  # one for each layer
    with pytest.raises(KeyError), compat.attention_function(model, "test_compat", attend, compat.sdpa_mask):
        raise KeyError
    assert compat.attention_kernel(model) == compat.SDPA
    model(ids)
    assert len(seen) == 2


def test_without_a_mask_function_positions_are_not_looked_at():
    """Else every forward pass without padding would wait for the device, to see whether its row is packed."""
    model, ids, masks = tiny_causal_lm("llama"), torch.tensor([[5, 6, 7, 8]]), []

    def attend(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    with compat.attention_function(model, "test_compat_unmasked", attend, None):
        model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)
    assert masks == [None, None]


def test_a_tensor_is_a_key_by_itself_and_for_as_long_as_it_lives():
    """Else what the host knows of one mask would be said of another, or be kept for ever."""
    known, mask = WeakTensorKeyDictionary(), torch.tensor([True, False])
    known[mask] = 1
    assert mask in known
    assert mask.clone() not in known
    del mask
    assert len(known) == 0


def test_nothing_holds_on_to_a_function_that_has_stood_in():
    """Else the cache of every rollout would stay in memory until the next."""

    class Attend:
        def __call__(self, *args, **kwargs):
            return compat.sdpa_attention_forward(*args, **kwargs)

    attend = Attend()
    watched = weakref.ref(attend)
    with compat.attention_function(tiny_causal_lm("llama"), "test_compat", attend, compat.sdpa_mask):
        del attend
        assert watched() is not None
    assert watched() is None


def test_sdpa_of_transformers_is_that_of_torch():
    """Else attention that ours leaves to transformers would be something else: several new tokens, unusual families."""
    query, key, value = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    output, weights = compat.sdpa_attention_forward(nn.Module(), query, key, value, None, scaling=0.3, is_causal=True)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3, is_causal=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights is None


def test_the_mask_for_sdpa_is_true_where_a_token_is_seen():
    """Else rows would be attended through the wrong mask while decoding: ours slices it, `[N, 1, Q, T]`."""
    model, masks = tiny_causal_lm("llama"), []
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])

    def attend(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    with compat.attention_function(model, "test_compat", attend, compat.sdpa_mask):
        model(torch.tensor([[0, 6, 7], [5, 6, 7]]), attention_mask=mask)
    assert masks[0].dtype is torch.bool
    assert masks[0].shape == (2, 1, 3, 3)
    assert masks[0][:, 0, 2].tolist() == [[False, True, True], [True, True, True]]


def test_unusual_arguments_have_the_names_that_families_give_them():
    """Else ours would compute attention without the soft cap of Gemma 2, and be given up by its self test at best."""
    model, asked = tiny_causal_lm("gemma2"), []

    def attend(*args, **kwargs):
        asked.append(kwargs)
        return compat.sdpa_attention_forward(*args)

    model.config._attn_implementation = compat.SDPA  # which transformers refuses to set for this family
    with compat.attention_function(model, "test_compat", attend, compat.sdpa_mask):
        model(torch.tensor([[5, 6]]))
    unusual = {name for name in compat.UNUSUAL_ARGUMENTS if asked[0].get(name) is not None}
    assert unusual == {"softcap"}


def test_all_layers_of_a_kind_have_one_base():
    """Else some dropout would stay on in PPO, or a convolution's weight be offered an adapter."""
    for layer in (nn.Dropout(), nn.Dropout1d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()):
        assert isinstance(layer, compat.DROPOUTS)
    for layer in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)):
        assert isinstance(layer, compat.CONVOLUTIONS)
    assert not isinstance(nn.Linear(1, 1), compat.DROPOUTS | compat.CONVOLUTIONS)


def test_a_model_tells_that_transformers_put_an_adapter_beside_it():
    """Else an adapter from the hub would be trained as if it were a model, its base frozen and its head random."""
    model = tiny_causal_lm("llama")
    assert not compat.has_unmerged_adapter(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert compat.has_unmerged_adapter(model)


def _doubling(convert):
    return lambda tensor: 2 * convert(tensor)


def test_conversions_of_a_module_go_through_one_method():
    """Else `bf16-true` would round the frequencies of rotary positions and the sums of metrics."""
    module = nn.Sequential(nn.BatchNorm1d(1))
    compat.wrap_conversion(module, _doubling)
    module = pickle.loads(pickle.dumps(module))
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: nn.ModuleList([m]).half()[0]):
        before = float(module[0].running_var)
        assert float(convert(module)[0].running_var) == 2 * before


def test_the_compiler_s_settings_are_those_of_the_block():
    """Else a compiled step would be cut at DDP's buckets, and given up after eight sizes of the cache."""
    config = torch._dynamo.config
    before = config.optimize_ddp, config.recompile_limit
    with compat.compiler_settings(77):
        assert (config.optimize_ddp, config.recompile_limit) == (False, 77)
    assert (config.optimize_ddp, config.recompile_limit) == before


def test_the_compiler_s_settings_of_what_is_differentiated_are_those_of_the_block():
    """Else dropout would be another, a failing compiler would end a run in its backward pass, and more be compiled."""

    def settings():
        traced = torch._dynamo.config, torch.fx.experimental._config
        return (
            torch._inductor.config.fallback_random,
            torch._functorch.config.force_non_lazy_backward_lowering,
            *(traced[0].recompile_limit, traced[0].specialize_float, traced[1].use_duck_shape),
        )

    before = settings()
    with compat.training_compiler_settings(77):
        assert settings() == (True, True, 77, True, False)
    assert settings() == before


def test_a_module_s_call_goes_to_what_stands_in_it_and_no_copy_has_it():
    """Else layers would not be compiled, and every forward pass would be as slow as without."""
    layer, said = nn.Linear(2, 2), []
    vars(layer)[compat.CALL] = lambda *args, **kwargs: said.append(args)
    x = torch.ones(1, 2)
    layer(x)
    assert said == [(x,)]
    assert torch.equal(compat.call_uncompiled(layer, (x,), {}), layer.forward(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer.forward(x))
    with compat.called_plainly(nn.Sequential(layer)):
        assert torch.equal(layer(x), layer.forward(x))
    layer(x)
    assert len(said) == 2


def test_what_is_outside_of_a_graph_may_change_and_is_one_function():
    """Else a layer would be compiled anew for each batch, whose attention is a function of its own."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def doubled(function, x):
        return function(x * 2) * 2

    compiled = torch.compile(doubled, backend=backend)
    for add in (1, 2, 3):
        with compat.outside_of_graphs(lambda x, add=add: x + add) as function:
            assert float(compiled(function, torch.ones(1))) == 2 * (2 + add)
    assert len(made) == 2  # what is before it, and what is after


def test_a_tensor_is_marked_as_static():
    """Else a CUDA graph would be given up, or copy the cache in and out, for it writes what it is passed."""
    tensor = torch.zeros(1)
    compat.mark_static(tensor)
    assert tensor._dynamo_static_input_type == "unguarded"


def test_errors_of_the_compiler_are_told_from_those_of_what_it_compiles():
    """Else a model that cannot be compiled would end the run instead of going on as it is."""

    def cannot_be_traced(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(Exception, match="graph") as error:
        torch.compile(cannot_be_traced, fullgraph=True, backend="eager")(torch.zeros(1))
    assert compat.is_compiler_error(error.value)
    assert not compat.is_compiler_error(KeyError("of its own"))


def test_a_parser_lists_its_options_and_subcommands():
    """Else a misspelt option would be refused without the nearest one that exists."""
    parser = ArgumentParser()
    parser.add_argument("--this")
    commands = parser.add_subcommands()
    commands.add_subcommand("run", ArgumentParser())
    actions = {action.dest: action for action in compat.parser_actions(parser)}
    assert {"help", "this", "subcommand"} == set(actions)
    assert list(actions["subcommand"].choices) == ["run"]


def test_every_name_has_a_test():
    """So that what is added to the module is not added without saying what it holds up."""
    written = inspect.getsource(inspect.getmodule(test_every_name_has_a_test))
    for name, value in vars(compat).items():
        ours = getattr(value, "__module__", None) == compat.__name__ or name.isupper()
        if ours and not name.startswith("_"):
            assert f"compat.{name}" in written, name


def test_fake_tensors_have_the_bytes_of_real_ones_and_none_of_their_numbers():
    """Else `rlhf plan` would allocate what it is to foretell, or foretell something else."""
    with compat.fake_tensors():
        made = nn.Linear(1 << 20, 1 << 20, bias=False)  # four TiB
        product = made(torch.empty(2, 1 << 20))
    assert product.shape == (2, 1 << 20)
    assert product.device.type == "cpu"
    assert made.weight.untyped_storage().nbytes() == 4 << 40


def test_what_is_said_of_models_is_heard_again_afterwards():
    """Else a plan would be drowned in lines, or the lines of all that follows be lost."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    before = logger.getEffectiveLevel()
    with compat.say_nothing_of_models():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.getEffectiveLevel() == before


def test_attention_of_any_lengths_is_called_as_this_torch_takes_it(monkeypatch):
    """On CPUs torch has no kernel for it; the first tests on a GPU compare what it computes (`kernel_is_right`)."""
    from torch.nn.attention import varlen

    given = {}

    def newest(q, k, v, starts, key_starts, most, most_keys, *, scale, window_size, enable_gqa):
        given.update(scale=scale, window_size=window_size, enable_gqa=enable_gqa, heads=k.shape[1])
        return q

    def before_groups(q, k, v, starts, key_starts, most, most_keys, *, scale=None, window_size=(-1, -1)):
        given.update(scale=scale, window_size=window_size, heads=k.shape[1])
        return q

    def oldest(q, k, v, starts, key_starts, most, most_keys, is_causal=False):
        given.update(is_causal=is_causal, heads=k.shape[1])
        return q

    rows = [torch.ones(3, heads, 4) for heads in (4, 2, 2)]
    starts = torch.tensor([0, 3], dtype=torch.int32)
    expected = [
        (newest, 1.0, {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True, "heads": 2}),
        (before_groups, 1.0, {"scale": 0.25, "window_size": (-1, 0), "heads": 4}),
        (oldest, 0.5, {"is_causal": True, "heads": 4}),  # which scales by 1 / sqrt(4) itself
    ]
    for function, factor, options in expected:
        given.clear()
        monkeypatch.setattr(varlen, "varlen_attn", function)
        compat._varlen_attention.cache_clear()
        assert (compat.varlen_attention(*rows, starts, starts, 3, 3, 0.25) == factor).all()
        assert given == options
    monkeypatch.undo()
    compat._varlen_attention.cache_clear()
    takes = inspect.signature(varlen.varlen_attn).parameters
    assert list(takes)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "scale"} <= {*takes} or "is_causal" in takes


def test_an_engine_of_vllm_that_ends_leaves_the_process_group_to_training(monkeypatch):
    """Else the next step would fail, or wait for ever; what a vLLM does that ends it elsewhere is not known.

    `tests/vllm_engines` trains several times in the same two processes, with the real one.
    """
    ended = []
    core = SimpleNamespace(cleanup_dist_env_and_memory=lambda: ended.append(True))
    fakes = {"vllm": SimpleNamespace(__version__="9"), "vllm.v1": SimpleNamespace(), "vllm.v1.engine": None}
    fakes["vllm.v1.engine"] = SimpleNamespace(core=core)
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    compat.keep_process_group()
    core.cleanup_dist_env_and_memory()
    assert not ended
    del core.cleanup_dist_env_and_memory
    with pytest.raises(UserError, match=r"vLLM 9 ends its engines in a way that is not known here"):
        compat.keep_process_group()
