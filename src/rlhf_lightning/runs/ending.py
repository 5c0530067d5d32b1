"""The mark of a run that has ended: trained, exported and reported, so that nothing is left to do.

It is written as the last thing of all. A run that was killed in its export has none, and exports when it goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer

from rlhf_lightning.runs.whole_files import write_whole

MARK = "finished.json"


def limits_of(trainer: pl.Trainer) -> dict[str, float | None]:
    """What ends a run at the latest.

    Args:
        trainer: before it has trained, which writes Lightning's defaults into it.

    Returns:
        `max_epochs`, `max_steps` (of the optimizer) and `max_time` (seconds); None for what was not set.
    """
    times: list[float] = []
    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            times.append(left + timer.time_elapsed())
    counts = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    limits: dict[str, float | None] = {name: None if n in (None, -1) else n for name, n in counts.items()}
    return {**limits, "max_time": round(min(times), 3) if times else None}


def mark_finished(trainer: pl.Trainer, limits: dict[str, float | None]) -> None:
    """Note in the folder of a run that it has ended, within which limits.

    Args:
        trainer: which has trained; the first process writes.
        limits: as they were before.
    """
    ended = trainer.state.finished and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if not ended or not trainer.is_global_zero:
        return
    path = Path(trainer.default_root_dir) / MARK
    content = {"steps": trainer.global_step, "epoch": trainer.current_epoch, "limits": limits}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2) + "\n")


def steps_when_finished(root: Path, limits: dict[str, float | None]) -> int | None:
    """Optimizer steps of a run that has ended and would train no further; None if there is something to do.

    Args:
        root: the folder of the run.
        limits: those of now; where one is higher than it was, there may be.
    """
    try:
        mark: dict[str, Any] = json.loads((root / MARK).read_text(encoding="utf-8"))
        steps, before = int(mark["steps"]), {name: mark["limits"][name] for name in limits}
        higher = [name for name in limits if _height(before[name]) < _height(limits[name])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no mark, or half a one
        return None
    return None if higher else steps


def _height(limit: float | None) -> float:
    return float("inf") if limit is None else float(limit)
