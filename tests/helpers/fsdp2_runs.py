"""Whole stages under FSDP2, and rollouts under what shards weights; imported on both sides of `helpers.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import finetune_runs, stage_runs
from helpers.stages import MemoryLogger, adamw, trainer
from rlhf_lightning import FineTune, FSDP2Strategy, PPOModule, Sampling
from rlhf_lightning.training.rollouts import whole_size

_others = stage_runs.strategy


def strategy(name: str) -> Any:
    """`fsdp2`; `zero3 alone`, which keeps no weight longer than its layer runs; or as `stage_runs.strategy` has it."""
    if name == "fsdp2":
        return FSDP2Strategy()
    found = _others(name.partition(" ")[0])
    if name == "zero3 alone":
        kept = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
        found.config["zero_optimization"] |= {f"stage3_{each}": 0 for each in kept}
    return found


def ppo_trunk(folder: str, processes: int, reward: str) -> Any:
    """As `stage_runs.ppo`, the values read from the policy's own hidden states."""
    module, data = stage_runs.ppo(folder, processes, reward)
    given = {name: getattr(module, name) for name in ("sampling", "optimizer", "kl", "score")}
    sizes = {name: getattr(module, name) for name in ("rollout_batch_size", "minibatch_size", "micro_batch_size")}
    others = {"value_lr": 0.1, "value_trunk": "policy", "ppo_epochs": 2}
    return PPOModule(folder, reward, **given, **sizes, **others, **stage_runs.CONSTANT), data


def sft_checkpointing(folder: str, processes: int, reward: str) -> Any:
    """As `stage_runs.sft`, activations computed again."""
    module, data = stage_runs.sft(folder, processes, reward)
    module.gradient_checkpointing = True
    return module, data


@contextmanager
def more_is_known() -> Iterator[None]:
    """Let the helpers for all stages know FSDP2, and two stages more, for the length of a `with` block."""
    stages = dict(stage_runs.STAGES)
    stage_runs.STAGES |= {"ppo trunk": ppo_trunk, "sft checkpointing": sft_checkpointing}
    stage_runs.strategy = finetune_runs.strategy = strategy
    try:
        yield
    finally:
        stage_runs.strategy = finetune_runs.strategy = _others
        stage_runs.STAGES.clear()
        stage_runs.STAGES.update(stages)


class Gathers(TorchDispatchMode):
    """Counts the collectives that gather, for the length of a `with` block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += name.startswith("c10d.") and "allgather" in name
        return func(*args, **(kwargs or {}))


def is_whole(model: torch.nn.Module) -> list[bool]:
    """Of each weight, whether it is here whole; of DeepSpeed's, small ones stay."""
    found = []
    for weight in model.parameters():
        status = getattr(weight, "ds_status", None)
        if status is None:
            found.append(not isinstance(weight, DTensor))
        elif not weight.ds_persist:
            found.append(status.name != "NOT_AVAILABLE")
    return found


class Interrupted(Exception):
    pass


def rollouts(
    name: str, how: str, tokens: int, folder: str, reward: str, lora: bool = False, fails: bool = False
) -> dict[str, Any]:
    """Two iterations of PPO.

    Args:
        name: the strategy.
        how: `rollout_weights`.
        tokens: of every response.
        folder: language model.
        reward: reward model.
        lora: train adapters.
        fails: the first rollout raises inside of a block before it is made.

    Returns:
        Of each rollout `gathers`, `ids`, whether weights were `whole` meanwhile and `after`wards; and `state`, the
        weights at the end; `shared`, the frozen matrices whose parts policy and reference share, under FSDP2.
    """
    torch.manual_seed(5)
    _, data = stage_runs.ppo(folder, 2, reward)
    sizes = {"rollout_batch_size": data.batch_size, "minibatch_size": data.batch_size}
    module = PPOModule(
        folder,
        reward,
        sampling=Sampling(max_new_tokens=tokens, min_new_tokens=tokens),
        rollout_weights=how,
        optimizer=adamw(1e-3),
        finetune=FineTune("lora", rank=2) if lora else FineTune(),
        **sizes,
        **stage_runs.CONSTANT,
    )
    seen: list[dict[str, Any]] = []
    module.answer = _observed(module, module.answer, seen, fails)
    keep = stage_runs.KeepState()
    trainer(strategy=strategy(name), devices=2, callbacks=[keep], logger=MemoryLogger()).fit(module, data)
    models = [module.policy, module.reference_model] if name == "fsdp2" else []
    parts = [_frozen_parts(model) for model in models]
    shared = [each for each in parts[0] if parts[0][each] == parts[1][each]] if parts else []
    return {"rollouts": seen, "state": keep.states[1], "size": whole_size(module, module.policy), "shared": shared}


def _frozen_parts(model: torch.nn.Module) -> dict[str, int]:
    """Where this process's part of each frozen matrix lies."""
    matrices = {n: p for n, p in model.named_parameters() if not p.requires_grad and p.dim() == 2}
    return {name.replace(".base_layer", ""): p.to_local().data_ptr() for name, p in matrices.items()}


def _observed(module: Any, answer: Callable[..., Any], seen: list[dict[str, Any]], fails: bool) -> Callable[..., Any]:
    def observed(*args: Any, **kwargs: Any) -> Any:
        block, whole = module.policy.model.layers[-1], []
        if fails and not seen:
            raising = block.register_forward_pre_hook(_raise)
            try:
                answer(*args, **kwargs)
            except Interrupted:
                whole.append(any(is_whole(module.policy)))
            raising.remove()
        looking = block.register_forward_hook(lambda *_: whole.append(all(is_whole(module.policy))))
        with Gathers() as gathers:
            generation, texts = answer(*args, **kwargs)
        looking.remove()
        after = is_whole(module.policy)
        seen.append({"gathers": gathers.count, "ids": generation.response_ids.tolist(), "whole": whole, "after": after})
        return generation, texts

    return observed


def _raise(*_: Any) -> None:
    raise Interrupted


def resumed(name: str, stage: str, path: str, cut: int | None, devices: int, **models: str) -> dict[str, Any]:
    """Train a stage for two epochs, or from a checkpoint to there.

    Args:
        name: the strategy.
        stage: a key of `stage_runs.STAGES`.
        path: of a checkpoint, that is written after `cut` steps; at an epoch's end one gets `-epoch=0` to its name.
        cut: None to go on from the checkpoint instead.
        devices: processes.
        **models: `folder` and `reward`.
    """
    torch.manual_seed(5)
    module, data = stage_runs.STAGES[stage](processes=devices, **models)
    module.optimizer = adamw(1e-2)
    keep, logger = stage_runs.KeepState(), MemoryLogger()
    folder, stem = Path(path).parent, Path(path).stem
    savers = [
        ModelCheckpoint(folder, stem, every_n_train_steps=cut, enable_version_counter=False),
        ModelCheckpoint(folder, stem + "-{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True),
    ]
    options = {"strategy": strategy(name), "devices": devices, "max_epochs": 2, "enable_checkpointing": cut is not None}
    fitting = trainer(callbacks=[keep, *(savers if cut else [])], logger=logger, **options)
    fitting.fit(module, data, ckpt_path=None if cut else path, weights_only=True)
    series = {metric: logger.series(metric) for call in logger.calls for metric in call}
    exact = {m: values for m, values in series.items() if not any(word in m for word in stage_runs.LEFT_OUT)}
    return {"after": keep.states[1], "metrics": exact, "steps": fitting.global_step}


def run_all(runs: list[dict[str, Any]]) -> list[Any]:
    """One run after the other in the same process; each names its function as `task`."""
    tasks: dict[str, Callable[..., Any]] = {
        "stage": stage_runs.run,
        "adapters": finetune_runs.run,
        "rollouts": rollouts,
        "resumed": resumed,
    }
    with more_is_known():
        return [tasks[run["task"]](**{key: value for key, value in run.items() if key != "task"}) for run in runs]
