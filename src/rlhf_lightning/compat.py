"""What this package uses of its libraries that they call private or may rename, each in one place.

`tests/test_compat.py` has a test for each, which says what would break here if it changed there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from inspect import signature
from subprocess import Popen
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning_fabric.utilities.apply_func import convert_tensors_to_scalars
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher, subprocess_script
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
    model: PreTrainedModel, name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]
) -> Iterator[None]:
    """Put an attention function in the place of transformers' `sdpa` for the length of a `with` block.

    Args:
        model: nothing changes where it takes no attention functions, or uses another one.
        name: what the model's configs call the function meanwhile.
        attend: the function.
        make_mask: makes the mask that it is given.
    """
    configs: list[Any] = []
    if takes_attention_functions(model):
        owners = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        configs = [c for c in owners.values() if getattr(c, "_attn_implementation", None) == SDPA]
    AttentionInterface.register(name, attend)
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


def load_training_data(trainer: Trainer) -> None:
    """What Lightning does before a run's first batch, for what must see the data before; twice does nothing more."""
    trainer.fit_loop.setup_data()


def load_validation_data(trainer: Trainer) -> None:
    """What Lightning does before a run's first validation, for runs that end without one."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    trainer.training = True


def was_given_checkpoint_io(trainer: Trainer) -> bool:
    """Whether somebody chose how a trainer writes checkpoints, which otherwise is decided when it is asked for."""
    return trainer.strategy._checkpoint_io is not None


def leave_signals_alone(trainer: Trainer, alone: bool = True) -> None:
    """Keep a trainer from handling signals: its handler of SIGTERM talks to other processes wherever it is called.

    Args:
        trainer: changed in place.
        alone: False to let it handle them again.
    """
    connector: Any = trainer._signal_connector
    if alone:
        connector.register_signal_handlers = _nothing
    else:
        vars(connector).pop("register_signal_handlers", None)


def _nothing() -> None:
    return


def launched_children(trainer: Trainer) -> Callable[[], list[Popen[Any]]] | None:
    """The processes that a trainer starts by the command that started this one; None if it starts others, or in itself.

    Args:
        trainer: built.

    Returns:
        Gives those that run, and those that have ended; none before they are started, or where something else does it.
    """
    launcher, environment = trainer.strategy.launcher, getattr(trainer.strategy, "cluster_environment", None)
    if launcher is None and environment is not None and environment.creates_processes_externally:
        return list  # a process that was started, by some strategies
    return (lambda: launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else None


@contextmanager
def leave_children_alone() -> Iterator[None]:
    """Keep trainers, for the length of a `with` block, from killing this process when one that they started fails."""
    before = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = lambda child_processes: None
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = before


def save_last(callback: ModelCheckpoint, trainer: Trainer) -> str:
    """Write a checkpoint callback's `last`, whatever it is set to save, and let it save as before afterwards.

    Args:
        callback: of the trainer.
        trainer: in a fit.

    Returns:
        The path of the checkpoint.
    """
    # It writes nothing more at a step that it has saved at, which is for its own checkpoints.
    kept = ("save_last", "save_weights_only", "_last_global_step_saved", "_last_checkpoint_saved")
    before = {name: getattr(callback, name) for name in kept}
    callback.save_last, callback.save_weights_only = True, False
    try:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    finally:
        vars(callback).update(before)
    return callback.last_model_path


def last_path(callback: ModelCheckpoint) -> str:
    """Where a checkpoint callback writes its `last`, if nothing is there yet."""
    return callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)


def optimizer_steps_begun(trainer: Trainer) -> int:
    """Steps of the optimizer in manual optimisation, with one that an exception ended."""
    return int(trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.ready)


def is_within_batch(trainer: Trainer) -> bool:
    """Whether a training batch has begun and its `training_step` has not returned."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed < progress.ready)


def metrics_to_log(trainer: Trainer, ends_epoch: bool) -> tuple[dict[str, float], int]:
    """What `self.log` was given and Lightning has yet to give to the loggers, and the step that it names there.

    Args:
        trainer: in `on_train_batch_end` there are those of the batch; elsewhere there are none, but
        ends_epoch: in `on_train_epoch_end` there are those of the epoch.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    ends_batch = progress.completed < progress.processed == progress.ready
    if not (ends_epoch or (ends_batch and connector.should_update_logs)) or not trainer.training:
        return {}, 0
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    step = metrics.pop("step", None)
    if not metrics:
        return {}, 0
    metrics.setdefault("epoch", trainer.current_epoch)
    return metrics, int(step) if step is not None else loop._batches_that_stepped - ends_epoch


def stop_with_validation(trainer: Trainer) -> None:
    """Let a resumed epoch see that training was asked to stop as late as the epoch that was cut did.

    Lightning asks before a batch, and there the loop would leave at once, without the validation that it makes after
    the last batch of a run that is stopped.

    Args:
        trainer: in `on_train_start`, before `go_on_after_batch`.
    """
    loop = trainer.fit_loop.epoch_loop

    def advance(fetcher: Any) -> None:
        trainer.should_stop = True
        type(loop).advance(loop, fetcher)

    loop.__dict__["advance"] = advance


def put_advance_back(trainer: Trainer) -> None:
    """Undo `stop_with_validation`; nothing if it was not done.

    Args:
        trainer: of the run.
    """
    trainer.fit_loop.epoch_loop.__dict__.pop("advance", None)


def count_epoch(trainer: Trainer) -> None:
    """Count the running epoch as over, as Lightning does after the hooks of its end, also of one that was stopped."""
    trainer.fit_loop.epoch_progress.increment_processed()
    trainer.fit_loop.epoch_progress.increment_completed()


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `should_stop` ends training now, as `min_epochs` and `min_steps` are reached."""
    return trainer.fit_loop._can_stop_early


def go_on_after_batch(trainer: Trainer, validates: bool, is_over: bool) -> None:
    """Let a resumed epoch go on with what follows on the last batch that was made: validation, next batch, or its end.

    Args:
        trainer: in `on_train_start`; its counters say that the batch is completed.
        validates: the validation that may be due is to run.
        is_over: no more batches are to be made, though the epoch has more.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    is_due = loop._should_check_val_fx(fetcher)
    is_over = is_over or loop._num_ready_batches_reached()
    loop.batch_progress.is_last_batch = is_over
    if is_due and validates:
        return
    if is_over:
        loop.val_loop._has_run = True  # else one more batch would be asked for
    if (is_over or not is_due) and not loop._should_accumulate():
        loop._batches_that_stepped += 1  # elsewhere the loop counts by itself


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
