"""What this package uses of torch, transformers and others that they call private or may rename, each in one place.

`lightning_compat.py` is the same for Lightning. `tests/test_compat.py` has a test for each, which says what would break
here if it changed there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from inspect import signature
from itertools import count
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import sdpa_mask as sdpa_mask
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlhf_lightning.errors import UserError

SDPA = "sdpa"
"""What transformers calls the attention of `torch.nn.functional.scaled_dot_product_attention`."""

UNUSUAL_ARGUMENTS = ("softcap", "position_bias", "s_aux", "cache")
"""Arguments that only some families give their attention function; ours know nothing of them."""

CONVOLUTIONS, DROPOUTS = _ConvNd, _DropoutNd
"""What all of torch's layers of a kind are instances of."""

CALL = "_compiled_call_impl"
"""Attribute of a module: what its call goes to, hooks and all; `nn.Module.compile` sets it, and no copy has it."""

Convert = Callable[[Tensor], Tensor]


def attention_kernel(model: PreTrainedModel) -> str:
    """Name of the attention that a model computes with: `sdpa`, `eager`, `flash_attention_2` and others."""
    return str(model.config._attn_implementation)


def takes_attention_functions(model: PreTrainedModel) -> bool:
    """Whether a model calls the attention function that is registered under its kernel's name."""
    return bool(model._supports_attention_backend)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether activations are computed again in the backward pass."""
    # transformers 5.23 has the second name and warns of the first.
    name = (
        "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return bool(getattr(model, name, False))


@contextmanager
def attention_function(
    model: PreTrainedModel, name: str, attend: Callable[..., Any], make_mask: Callable[..., Any] | None
) -> Iterator[None]:
    """Put an attention function in the place of transformers' `sdpa` for the length of a `with` block.

    Args:
        model: nothing changes where it takes no attention functions, or uses another one.
        name: what the model's configs call the function meanwhile, with a `_` more where a block that is not yet left,
            such as a stream of another model, has that name.
        attend: the function.
        make_mask: makes the mask that it is given; None for no mask, without a look at what it would be made of.
    """
    name = next(each for each in (name + "_" * number for number in count()) if each not in _names_in_use)
    _names_in_use.add(name)
    configs: list[Any] = []
    if takes_attention_functions(model):
        owners = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        configs = [c for c in owners.values() if getattr(c, "_attn_implementation", None) == SDPA]
    AttentionInterface.register(name, attend)
    if make_mask is not None:
        AttentionMaskInterface.register(name, make_mask)
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config in configs:
            config._attn_implementation = SDPA
        # What is registered stays so, with all that it holds on to: caches and masks.
        AttentionInterface.register(name, sdpa_attention_forward)
        _names_in_use.remove(name)


_names_in_use: set[str] = set()


def has_unmerged_adapter(model: PreTrainedModel) -> bool:
    """Whether `from_pretrained` found a PEFT adapter and put it beside the weights."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def saved_names(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Which weights `save_pretrained` writes: of those that are tied one, and none that the model says to leave out.

    Args:
        model: which the weights are of.
        weights: tied ones are the same tensor; their shapes and values do not matter.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return list(remove_tied_weights_from_state_dict({n: t for n, t in weights.items() if n not in ignored}, model))


def as_saved(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `save_pretrained` writes them: under the names, and in the parts, that the model was loaded from.

    Args:
        model: which the weights are of.
        weights: all of them, or all that become one part together.
    """
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return saved


def wrap_conversion(module: nn.Module, wrap: Callable[[Convert], Convert]) -> None:
    """Change what `module.to(...)`, `.half()`, `.cuda()` and their like do to each tensor of a module.

    Args:
        module: changed in place, with all it contains.
        wrap: takes what is done to a tensor and returns what is done instead; a function of a module, to be pickled.
    """
    module._apply = partial(_apply_wrapped, module, wrap)  # type: ignore[method-assign]  # unlike a method, it pickles


def _apply_wrapped(module: nn.Module, wrap: Callable[[Convert], Convert], convert: Convert, *args: Any) -> nn.Module:
    return type(module)._apply(module, wrap(convert), *args)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    scaling: float,
) -> Tensor:
    """Attention of sequences of different lengths, torch's: each query sees its run's keys up to its own, the last.

    Args:
        query: `[N, H, d]`, bfloat16 or float16.
        key: `[K, key heads, d]`.
        value: as the key.
        query_starts: where each run begins, N at the end, `[S + 1]`, int32.
        key_starts: where each run's keys begin, K at the end, `[S + 1]`, int32.
        most_queries: of any run.
        most_keys: of any run.
        scaling: of the products.

    Returns:
        `[N, H, d]`.

    Raises:
        ImportError: torch is too old to have it.
    """
    attend, takes = _varlen_attention()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "scale" in takes:
        options["scale"] = scaling
    else:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if "enable_gqa" in takes:
        options["enable_gqa"] = True
    else:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    attended: Tensor = attend(query, key, value, query_starts, key_starts, most_queries, most_keys, **options)
    return attended


@lru_cache
def _varlen_attention() -> tuple[Callable[..., Any], frozenset[str]]:
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10; what it takes has grown since

    return varlen_attn, frozenset(signature(varlen_attn).parameters)


def compiler_settings(max_sizes: int) -> AbstractContextManager[Any]:
    """How `torch.compile` traces a function that is called inside DDP, with buffers of several sizes.

    Inside a forward pass of DDP the graph would be cut at its buckets of gradients.

    Args:
        max_sizes: that are compiled for before it gives up.
    """
    settings: AbstractContextManager[Any] = torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=max_sizes)
    return settings


@contextmanager
def training_compiler_settings(max_sizes: int) -> Iterator[None]:
    """As `compiler_settings`, for what is differentiated.

    Random numbers are those that are drawn without it, and a backward pass is compiled with its forward pass, so that
    both are known to compile before anything is computed. Numbers such as an epsilon are constants: left open, each
    piece of code would be traced twice, for they cannot be tensors after all. Sizes that happen to be the same in the
    first batch are two sizes.

    Args:
        max_sizes: that are compiled for before it gives up.
    """
    random = torch._inductor.config.patch(fallback_random=True)
    at_once = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    constants = torch._dynamo.config.patch(specialize_float=True)
    apart = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with compiler_settings(max_sizes), random, at_once, constants, apart:
        yield


def call_uncompiled(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with its hooks, past what stands in `CALL`.

    Args:
        module: any.
        args: of the call.
        kwargs: of the call.
    """
    return module._call_impl(*args, **kwargs)


@contextmanager
def called_plainly(module: nn.Module) -> Iterator[None]:
    """Let a module and all that it contains be called uncompiled for the length of a `with` block.

    Args:
        module: any.
    """
    lifted = [(part, vars(part).pop(CALL)) for part in module.modules() if CALL in vars(part)]
    try:
        yield
    finally:
        for part, call in lifted:
            vars(part)[CALL] = call


@contextmanager
def outside_of_graphs(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function that what is compiled calls and does not look into, the same object for every `function`.

    Args:
        function: what it runs for the length of the `with` block.
    """
    _outside.append(function)
    try:
        yield _untraced()
    finally:
        _outside.pop()


_outside: list[Callable[..., Any]] = []


@lru_cache
def _untraced() -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return _outside[-1](*args, **kwargs)

    untraced: Callable[..., Any] = torch.compiler.disable(run)
    return untraced


def mark_static(tensor: Tensor | None) -> None:
    """Promise that a tensor stays where it lies, so that a CUDA graph may write it."""
    torch._dynamo.mark_static_address(tensor)


def is_compiler_error(error: Exception) -> bool:
    """Whether `torch.compile` failed, and not what it compiled."""
    from torch._dynamo import exc  # slow to import

    return isinstance(error, exc.TorchDynamoException | exc.FailOnRecompileLimitHit)


def parser_actions(parser: ArgumentParser) -> list[Any]:
    """Every option and subcommand of a parser, each with `dest` and `choices`."""
    return list(parser._actions)


def fake_tensors() -> AbstractContextManager[Any]:
    """While it is entered tensors have shape, type and a storage of their size, but no memory and no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def say_nothing_of_models() -> Iterator[None]:
    """Keep what is said on loading from the terminal: by Lightning's messages of rank zero, and by transformers."""
    loggers = [logging.getLogger(name) for name in ("lightning_fabric", "pytorch_lightning", "transformers")]
    rank_zero = [logging.getLogger(f"{name}.utilities.rank_zero") for name in ("lightning_fabric", "pytorch_lightning")]
    levels = [(logger, logger.level) for logger in (*loggers, *rank_zero)]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def keep_process_group() -> None:
    """Keep vLLM from ending torch's process group, which is training's, whenever an engine in this process ends.

    Raises:
        UserError: a version of vLLM that ends it elsewhere.
    """
    from vllm.v1.engine import core

    if not hasattr(core, "cleanup_dist_env_and_memory"):
        from vllm import __version__

        raise UserError(f"vLLM {__version__} ends its engines in a way that is not known here; install vllm 0.32")
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
