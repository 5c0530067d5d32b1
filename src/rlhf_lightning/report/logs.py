"""What a run logged: its curves, put together from all the files that it was logged to."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_lightning.runs.event_files import find_event_files, read_event_file

Numbers = npt.NDArray[np.float64]
CSV = "metrics.csv"
_FIT, _JUDGE = "train/", "judge/"
_LEFT_OUT = {"epoch", "hp_metric"}


class Curve(NamedTuple):
    """One number over a run.

    Attributes:
        steps: finished steps (iterations of PPO, RLOO and GRPO) of the weights that were measured, `[N]`, ascending.
        values: `[N]`; NaN and infinities as they were logged.
    """

    steps: Numbers
    values: Numbers


class Logs(NamedTuple):
    """What the logs of a run say.

    Attributes:
        curves: of the fit, by name, such as `train/loss`.
        measured: last values of `rlhf validate` and `test`, by name.
        seconds: wall time of the fit, without the time between an interruption and the resumption; None if not known.
        files: that were read.
        problems: what of them cannot be read, a line each.
    """

    curves: dict[str, Curve]
    measured: dict[str, float]
    seconds: float | None
    files: list[Path]
    problems: list[str]


Points = list[tuple[int, float, float]]
"""Step, value and time of each point, as they were logged; the time is NaN where it was not."""


def find_logs(folder: Path) -> list[Path]:
    """The log files of a run: TensorBoard's, else Lightning's CSV, else those of the newest `lightning_logs/version_*`.

    Args:
        folder: of the run.
    """
    versions = sorted(folder.glob("lightning_logs/version_*"), key=_version)
    for place in (folder, *versions[::-1][:1]):
        if files := find_event_files(place):
            return files
        if (place / CSV).is_file():
            return [place / CSV]
    return []


def _version(folder: Path) -> int:
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


def read_logs(files: Iterable[Path]) -> Logs:
    """Read log files.

    A file with training steps goes on where it begins: what files before it say of later steps was undone by the
    resumption. One without is of an evaluation of its own.

    Args:
        files: from the oldest to the newest.
    """
    fit: dict[str, Points] = {}
    measured: dict[str, float] = {}
    problems, read, seconds = [], [], 0.0
    for path in files:
        scalars, problem = _read_csv(path) if path.name == CSV else read_event_file(path)[::2]
        problems += [problem] if problem else []
        read.append(path)
        scalars = {name: points for name, points in scalars.items() if name not in _LEFT_OUT}
        starts = [points[0][0] for name, points in scalars.items() if name.startswith(_FIT)]
        if not starts:
            measured |= {name: points[-1][1] for name, points in scalars.items()}
            continue
        fit = {name: kept for name, points in fit.items() if (kept := _before(min(starts), name, points))}
        for name, points in scalars.items():
            fit.setdefault(name, []).extend(points)
        times = [time for points in scalars.values() for _, _, time in points]
        seconds += max(times) - min(times)
    curves = {name: _curve(name, points) for name, points in fit.items()}
    return Logs(curves, measured, seconds if seconds > 0 else None, read, problems)


def _before(start: int, name: str, points: Points) -> Points:
    """What was measured before step `start` was made; a judge's step is a number of finished ones."""
    return [point for point in points if point[0] < start + name.startswith(_JUDGE)]


def _curve(name: str, points: Points) -> Curve:
    """Points in order; of several for one step the last counts.

    Training steps are measured before they change the weights; a validation has the number of the step before it, a
    judge that of the finished steps.
    """
    done = 0 if name.startswith((_FIT, _JUDGE)) else 1
    by_step = {step + done: value for step, value, _ in points}
    steps = sorted(by_step)
    return Curve(np.array(steps, dtype=np.float64), np.array([by_step[step] for step in steps], dtype=np.float64))


def _rows(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file, up to where it is none any more."""
    with contextlib.suppress(csv.Error):
        yield from csv.DictReader(file)


def _read_csv(path: Path) -> tuple[dict[str, Points], str]:
    """What Lightning's `CSVLogger` wrote; values that are no numbers are left out and counted."""
    scalars: dict[str, Points] = {}
    broken = 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in _rows(file):
            step = row.get("step") or ""
            if not re.fullmatch(r"\d+", step):
                broken += 1
                continue
            for name, text in row.items():
                if not name or name == "step" or not text or isinstance(text, list):
                    continue
                try:
                    point = int(step), float(text), float("nan")
                except ValueError:
                    broken += 1
                else:
                    scalars.setdefault(name, []).append(point)
    return scalars, f"'{path}': {broken} values are no numbers and are left out" if broken else ""
