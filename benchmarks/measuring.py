"""What both sides of a comparison share: a clock of steps, memory of this process, tables. Standard library only."""

from __future__ import annotations

import inspect
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

GIB = 2**30
PACKAGES = ("torch", "transformers", "pytorch-lightning", "peft", "trl", "accelerate")


class Recorder:
    """Writes down when each step ended, and what it said.

    Made after the imports of a side and before its models are loaded: what is resident then is libraries.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.tokens: list[int] = []
        self.metrics: dict[str, list[float]] = {}
        self.libraries = resident_memory()

    def start(self) -> None:
        """The first step begins now."""
        self.ends, self.cpu_ends = [time.perf_counter()], [time.process_time()]

    def end_step(self) -> None:
        """A step has ended, and with it everything that belongs to it, data and logging included."""
        synchronize()
        self.ends.append(time.perf_counter())
        self.cpu_ends.append(time.process_time())

    def note(self, **values: float) -> None:
        """Numbers of this step."""
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(float(value))

    def write(self, path: str | Path, **more: Any) -> None:
        """What the parent reads."""
        report = {
            "seconds": between(self.ends),
            "cpu_seconds": between(self.cpu_ends),
            "tokens": self.tokens,
            "metrics": self.metrics,
            "libraries": self.libraries,
            "peak": max(peak_memory(), self.libraries),  # the kernel adds up what processors count a little late
            "device_peak": device_peak_memory(),
            "versions": versions(),
            **more,
        }
        Path(path).write_text(json.dumps(report), encoding="utf-8")


def between(times: Sequence[float]) -> list[float]:
    """Seconds from each to the next.

    Example:
        >>> between([1.0, 3.0, 4.0])
        [2.0, 1.0]
    """
    return [later - earlier for earlier, later in pairwise(times)]


# Memory and device


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def resident_memory() -> int:
    """Resident memory of this process now, in bytes. Linux only, as the next."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The most that was ever resident in this process, in bytes."""
    return _status("VmHWM")


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def device_peak_memory() -> int:
    """The most that was allocated on the GPU, in bytes; 0 without one."""
    cuda = _cuda()
    return int(cuda.max_memory_allocated()) if cuda else 0


def synchronize() -> None:
    """Wait for the GPU, if there is one: its work runs behind the clock's back."""
    cuda = _cuda()
    if cuda:
        cuda.synchronize()


# Telling


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as far as they are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Processor or GPU, cores, memory, Python."""
    try:
        info = Path("/proc/cpuinfo").read_text()
        model = next(line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor()
    cuda = _cuda()
    device = f"{cuda.get_device_name()}, " if cuda else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    return f"{device}{model}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def steady(seconds: Sequence[float], warmup: int) -> list[float]:
    """The steps that count: all but the first `warmup`.

    Example:
        >>> steady([9.0, 1.0, 2.0], 1)
        [1.0, 2.0]
    """
    return list(seconds[warmup:]) if len(seconds) > warmup else list(seconds)


def median(numbers: Sequence[float]) -> float:
    """The median; NaN of nothing.

    Example:
        >>> median([3.0, 1.0, 2.0])
        2.0
    """
    return statistics.median(numbers) if numbers else float("nan")


def arguments_of(module: type) -> set[str]:
    """What a module is made from, in this version of the package or an earlier one, that of its bases included."""
    names: set[str] = set()
    for owner in (each for each in module.__mro__ if "__init__" in vars(each)):
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names
