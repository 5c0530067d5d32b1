"""The place in its logs that a run has come to, and how a resumed one takes them up again from there.

What was logged after a checkpoint belongs to steps that are made again, so it is taken back: TensorBoard's event files
are cut at the length they had, rows of `CSVLogger` at their number. What other loggers were given stays with them.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from rlhf_lightning.runs.event_files import PATTERN, read_event_file

CSV = "metrics.csv"
_OF_A_FIT = ("train/", "judge/", "samples")


class LogPlaces:
    """Tells the place in each log of a run, at the cost of what was logged since it was last asked."""

    def __init__(self) -> None:
        self._counted: dict[Path, tuple[bytes, int, int]] = {}

    def __call__(self, loggers: Iterable[Logger]) -> list[dict[str, Any]]:
        """The places, now that everything has reached its file; plain values, for a checkpoint.

        Args:
            loggers: of the process that writes logs.
        """
        return [self._place(logger) for logger in loggers]

    def _place(self, logger: Logger) -> dict[str, Any]:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            paths = Path(logger.log_dir).glob(PATTERN)
            return {"events": {path.name: path.stat().st_size for path in paths if path.is_file()}}
        if isinstance(logger, CSVLogger):
            logger.save()
            return {"rows": self._rows(Path(logger.log_dir) / CSV)}
        return {}

    def _rows(self, path: Path) -> int:
        """Lines after the header; a value holds no line ends."""
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            header, place, count = file.readline(), file.tell(), 0
            known = self._counted.get(path)
            if known is not None and known[0] == header:  # else a new column has been added to all rows
                place, count = known[1:]
            file.seek(place)
            more = file.read()
        self._counted[path] = (header, place + len(more), count + more.count(b"\n"))
        return self._counted[path][2]


def go_back(loggers: Sequence[Logger], saved: Sequence[dict[str, Any]]) -> None:
    """Take back what was logged after a place.

    Args:
        loggers: as many and in the order as they were.
        saved: from `LogPlaces`.
    """
    for logger, place in zip(loggers, saved, strict=False):
        if isinstance(logger, TensorBoardLogger) and "events" in place:
            _cut_events(Path(logger.log_dir), place["events"])
        if isinstance(logger, CSVLogger) and "rows" in place:
            cut_rows(logger, place["rows"])


def _cut_events(folder: Path, sizes: dict[str, int]) -> None:
    for path in folder.glob(PATTERN):
        size = sizes.get(path.name, 0)
        if path.is_file() and path.stat().st_size > size and is_of_a_fit(path):
            if size:
                os.truncate(path, size)
            else:  # of a process that was stopped before it saved anything
                path.unlink()


def is_of_a_fit(path: Path) -> bool:
    """Whether an event file was written while training; `rlhf validate` and `test` write into the same folder.

    Args:
        path: the file.
    """
    scalars, texts, _ = read_event_file(path)
    return any(name.startswith(_OF_A_FIT) for name in (*scalars, *texts))


def open_csv(logger: CSVLogger) -> None:
    """Let a CSV logger begin without what it does at its beginning: remove the file that it is to write.

    Args:
        logger: one that has not logged yet.
    """
    path = Path(logger.log_dir) / CSV
    hidden = path.with_name(CSV + ".kept")  # there already if a process was killed in the lines below
    if path.is_file() and not hidden.exists():
        path.rename(hidden)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        writer = logger.experiment
    if hidden.exists():
        hidden.rename(path)
        writer.metrics_keys = _read_rows(path)[0]


def cut_rows(logger: CSVLogger, count: int) -> None:
    """Keep the first rows only.

    Args:
        logger: opened with `open_csv`.
        count: how many.
    """
    path = Path(logger.log_dir) / CSV
    if not path.is_file():
        return
    names, rows = _read_rows(path)
    if count == 0:
        path.unlink()
        logger.experiment.metrics_keys = []
    elif len(rows) > count:
        new = path.with_name(CSV + ".partial")
        with new.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, *rows[:count]])
        new.replace(path)


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header, and rows; the last line may have been cut off."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names, *rows = list(csv.reader(file)) or [[]]
    return names, rows
