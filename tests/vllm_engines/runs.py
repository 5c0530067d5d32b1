"""Training runs whose answers come from vLLM, told as JSON values; imported on both sides of `helpers.distributed`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.stage_runs import LEFT_OUT, LORA, STAGES, KeepState, listen
from helpers.stages import MemoryLogger, save_llama, save_reward_model, sgd, trainer
from rlhf_lightning import FSDP2Strategy, Sampling
from rlhf_lightning.generation.vllm_engine import VLLMEngine

TINY = {"enforce_eager": True, "kv_cache_memory_bytes": 2**24}


class Stale(VLLMEngine):
    """Never takes the weights over again."""

    def sync_weights(self) -> None:
        pass


def models(root: Path) -> dict[str, str]:
    """A policy whose heads are as wide as vLLM asks for, and a reward model."""
    folder = save_llama(root / "policy", hidden_size=128, layers=1)
    return {"folder": folder, "reward": save_reward_model(root / "reward", folder)}


def run(
    folder: str,
    reward: str,
    stage: str = "ppo",
    strategy: str = "auto",
    lora: bool = False,
    stale: bool = False,
    engine: dict[str, Any] | None = None,
    make: Any = None,
    cut: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a stage at temperature 1, with large steps.

    Args:
        folder: of the policy.
        reward: of the reward model.
        stage: of `helpers.stage_runs`.
        strategy: of the trainer.
        lora: train adapters.
        stale: the engine keeps the weights of the beginning.
        engine: arguments of the engine.
        make: makes another engine.
        cut: end after the first iteration with a checkpoint of this name, and resume from it.
        **options: of the stage.

    Returns:
        The answers of each rollout, what was logged, the policy's weights, and the number of threads at the end.
    """
    torch.set_num_threads(1)
    torch.manual_seed(5)
    make = make or partial(Stale if stale else VLLMEngine, options=TINY, **engine or {})
    given: dict[str, Any] = {"engine": make}
    given |= {"sampling": Sampling(max_new_tokens=6), "optimizer": sgd(3.0)} if stage.startswith("ppo") else {}
    given |= {"finetune": LORA} if lora else {}
    checkpoint = None
    if cut is not None:
        module, data = STAGES[stage](folder, reward, False, **given | options)
        first = trainer(max_steps=2)
        first.fit(module, data)
        first.save_checkpoint(checkpoint := cut)
    module, data = STAGES[stage](folder, reward, False, **given | options)
    keep, logger, said = KeepState(), MemoryLogger(), listen(module)
    devices = 1 if strategy == "auto" else int(os.environ["WORLD_SIZE"])
    chosen: Any = FSDP2Strategy() if strategy == "fsdp2" else strategy
    fitted = trainer(max_epochs=1, devices=devices, strategy=chosen, logger=logger, callbacks=[keep])
    fitted.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    series = {metric: logger.series(metric) for call in logger.calls for metric in call}
    return {
        "said": said,
        "metrics": {m: values for m, values in series.items() if not any(word in m for word in LEFT_OUT)},
        "after": keep.states[1],
        "threads": torch.get_num_threads(),
    }


def run_all(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several, one after the other."""
    return [run(**each) for each in runs]
