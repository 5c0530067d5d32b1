"""Runs as a report sees them, made without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pytorch_lightning.loggers import TensorBoardLogger

from rlhf_lightning.callbacks.samples import sample_section
from rlhf_lightning.report.logs import Curve, Logs
from rlhf_lightning.report.run import Run


def run(curves: dict[str, list[float]], name: str = "run", stage: str = "PPO") -> Run:
    """A run that logged curves, a value each step."""
    logged = {key: Curve(np.arange(len(values), dtype=float), np.array(values)) for key, values in curves.items()}
    return Run(Path(name), name, stage, {}, Logs(logged, {}, 90.0, [], []), {}, None, [], [])


EVIL = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"></p></main>&amp; \u202e```"


def write_run(folder: Path, steps: int = 30, judged: bool = True) -> Path:
    """A run of PPO with a judge, answers full of markup, and an evaluation."""
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    for step in range(steps):
        metrics = {
            "score": step / 10,
            "kl": float(step),
            "value_loss": 1.0,
            "entropy": 2 - step / 20,
            "memory_gib": 1.0,
        }
        metrics |= {"seconds_generating": 1.0, "seconds_scoring": 0.5, "seconds_updating": 2.0}
        logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step)
        if step % 5 == 4:
            logger.log_metrics({"val/score": step / 10, "val/kl": float(step)}, step)
        if step % 5 == 0 and judged:
            logger.log_metrics({"judge/score": step / 10 - step**2 / 200, "judge/kl": float(step)}, step)
    logger.finalize("success")
    samples = [[f"## Step {step}", sample_section(f"\n\nHuman: {EVIL}", f"{step} {EVIL}")] for step in (0, 10, 30)]
    (folder / "samples.md").write_text("".join("\n\n".join(each) + "\n\n" for each in samples))
    (folder / "config.yaml").write_text(
        "model:\n  class_path: rlhf_lightning.PPOModule\n  note: </pre><script>1</script>\n"
    )
    result = {"model": EVIL, "group": "all", "value": 0.7, "low": 0.6, "high": 0.8, "count": 100}
    points = [[0.55, 0.5, 0.4, 0.6, 50], [0.9, 0.8, 0.7, 0.9, 50]]
    curve = {"metric": "reliability", "model": EVIL, "x": "predicted", "y": "observed", "points": points, "fits": {}}
    content = {
        "results": [{"metric": "accuracy", **result}, {"metric": EVIL, **result, "low": None}],
        "curves": [curve],
    }
    said = {"version": 1, "made": "2026-11-26T08:00:00", "rlhf_lightning": "0.1.0", "settings": {}}
    (folder / "evaluation.json").write_text(json.dumps({**said, **content}))
    return folder
