"""Whole stages under FSDP2, and rollouts under what shards weights; imported on both sides of `helpers.distributed`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import finetune_runs, stage_runs
from helpers.stages import MemoryLogger, trainer
from rlhf_lightning import FineTune, FSDP2Strategy, Sampling
from rlhf_lightning.training.rollouts import whole_size


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


def rollouts(name: str, how: str, tokens: int, folder: str, reward: str, kind: str = "all") -> dict[str, Any]:
    """Two iterations of PPO, or one, and a validation.

    Args:
        name: the strategy.
        how: `rollout_weights`.
        tokens: of every response.
        folder: language model.
        reward: reward model.
        kind: `all` weights are trained, `lora` trains adapters, `bf16` is of mixed precision, and in `fails` the first
            rollout raises inside of a block before it is made.

    Returns:
        Of each rollout `gathers`, `ids`, whether weights were `whole` meanwhile and `after`wards; and `state`, the
        weights at the end; `shared`, the frozen matrices whose parts policy and reference share, under FSDP2.
    """
    torch.manual_seed(5)
    module, data = stage_runs.on_policy(
        folder,
        reward,
        False,
        sampling=Sampling(max_new_tokens=tokens, min_new_tokens=tokens),
        rollout_weights=how,
        finetune=stage_runs.LORA if kind == "lora" else FineTune(),
    )
    seen: list[dict[str, Any]] = []
    module.answer = _observed(module, module.answer, seen, kind == "fails")
    keep = stage_runs.KeepState()
    options = {
        "strategy": stage_runs.strategy(name),
        "precision": "bf16-mixed" if kind == "bf16" else "32-true",
        "devices": 2,
    }
    batches = 2 if kind in ("all", "bf16") else 1
    trainer(callbacks=[keep], logger=MemoryLogger(), limit_train_batches=batches, **options).fit(module, data)
    models = [module.policy, module.reference_model] if name == "fsdp2" else []
    parts = [_frozen_parts(model) for model in models]
    shared = [each for each in parts[0] if parts[0][each] == parts[1][each]] if parts else []
    return {"rollouts": seen, "state": keep.states[1], "size": whole_size(module.policy), "shared": shared}


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


def resumed(stage: str, path: str, cut: int | None, devices: int, folder: str, reward: str) -> dict[str, Any]:
    """Train a stage for two epochs, or from a checkpoint to there.

    Args:
        stage: a key of `stage_runs.STAGES`.
        path: of a checkpoint, that is written after `cut` steps.
        cut: None to go on from the checkpoint instead.
        devices: processes.
        folder: language model.
        reward: reward model.
    """
    torch.manual_seed(5)
    module, data = stage_runs.STAGES[stage](folder, reward, True)
    # Adam would step rounding errors as if they were gradients.
    module.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    keep, logger, place = stage_runs.KeepState(), MemoryLogger(), Path(path)
    saver = ModelCheckpoint(place.parent, place.stem, every_n_train_steps=cut, enable_version_counter=False)
    options = {"strategy": FSDP2Strategy(), "devices": devices, "max_epochs": 2, "enable_checkpointing": bool(cut)}
    fitting = trainer(callbacks=[keep, *([saver] if cut else [])], logger=logger, **options)
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
    return [tasks[run["task"]](**{key: value for key, value in run.items() if key != "task"}) for run in runs]
