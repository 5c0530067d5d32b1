"""Whole stages on several processes, cut and resumed; run on each rank by `helpers.forked.run_ranks`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers import stage_runs
from helpers.stages import MemoryLogger, trainer

EPOCHS, BATCHES = 2, 3
CUT_AFTER = 4  # in the middle of the second epoch


class Cut(Exception):
    """Ends a run."""


def fit(stage: str, strategy: str, folder: str, reward: str, path: Path, cut: bool, resume: bool) -> dict[str, Any]:
    """Fit once, with new objects.

    Args:
        stage: a key of `helpers.stage_runs.STAGES`.
        strategy: as `helpers.stage_runs.strategy` takes it.
        folder: language model.
        reward: reward model.
        path: where the checkpoint lies.
        cut: save after `CUT_AFTER` batches, and end.
        resume: go on from there.

    Returns:
        Weights at the end, empty on all but the first rank, and what was logged.
    """
    torch.manual_seed(5)
    module, data = stage_runs.STAGES[stage](folder, reward, True)
    keep, logger = stage_runs.KeepState(), MemoryLogger()
    steps = module.steps_per_batch * CUT_AFTER
    saver = ModelCheckpoint(path.parent, path.stem, every_n_train_steps=steps, enable_version_counter=False)
    options = {"strategy": stage_runs.strategy(strategy), "devices": 2, "max_epochs": EPOCHS, "val_check_interval": 1}
    fitting = trainer(callbacks=[keep, *([saver] if cut else [])], logger=logger, enable_checkpointing=cut, **options)
    if cut:
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            if fitting.global_step == steps:
                raise Cut
            return step(batch, batch_idx)

        module.training_step = training_step
    try:
        fitting.fit(module, data, ckpt_path=str(path) if resume else None, weights_only=True)
    except Cut:
        return {}
    series = {name: logger.series(name) for call in logger.calls for name in call}
    exact = {name: said for name, said in series.items() if not any(word in name for word in stage_runs.LEFT_OUT)}
    return {"weights": keep.states[-1], "steps": fitting.global_step, "logged": exact}


def cut_and_resume(runs: dict[str, list[str]], folder: str, reward: str, out: str) -> None:
    """Fit each stage of each strategy whole, and cut and resumed; both go to `<out>/<rank>.json`.

    Args:
        runs: stages, by strategy.
        folder: language model.
        reward: reward model.
        out: where the checkpoints go, too.
    """
    results: dict[str, dict[str, Any]] = {}
    for strategy, stages in runs.items():
        for stage in stages:
            path = Path(out) / strategy / f"{stage}.ckpt"
            whole = fit(stage, strategy, folder, reward, path, cut=False, resume=False)
            fit(stage, strategy, folder, reward, path, cut=True, resume=False)
            resumed = fit(stage, strategy, folder, reward, path, cut=False, resume=True)
            results.setdefault(strategy, {})[stage] = [whole, resumed]
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
