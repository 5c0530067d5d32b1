"""A function in a process of its own, with a limit of time: what it returns, or in one line why it did not."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MOST_CHARACTERS = 300
"""Of a reason."""


class UnavailableError(Exception):
    """A part lacks what it needs, such as a package that is not installed."""


class Outcome(NamedTuple):
    """What came of a function.

    Attributes:
        result: what it returned; None if it did not return.
        reason: why it did not, in one line.
        failed: whether that was a mistake, and not something that it lacks.
        output: the end of what it wrote.
    """

    result: Any
    reason: str = ""
    failed: bool = False
    output: str = ""


def need(*packages: str) -> None:
    """Ask for packages.

    Args:
        *packages: names of modules.

    Raises:
        UnavailableError: one of them is not installed.
    """
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed")


def make_context(fresh: bool, preload: Sequence[str]) -> Any:
    """How processes are started: from one that has imported everything already, or each by itself.

    Args:
        fresh: each by itself, which takes the time of the imports again.
        preload: modules that are imported once.
    """
    if fresh:
        return multiprocessing.get_context("spawn")
    # What was asked of CUDA's own library before a fork would keep the children from the device.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    return context


def run_alone(context: Any, function: Callable[..., Any], arguments: Sequence[Any], seconds: float) -> Outcome:
    """Call a function in a process of its own.

    Args:
        context: from `make_context`.
        function: one that can be pickled; returns what JSON can hold.
        arguments: of it.
        seconds: until it is ended.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output, report = Path(temporary, "output"), Path(temporary, "report")
        process = context.Process(target=_call, args=(function, tuple(arguments), str(output), str(report)))
        process.start()
        try:
            process.join(seconds)
            late = process.is_alive()
        finally:
            if process.is_alive():
                _end(process)
        written = output.read_text(errors="replace")[-3000:] if output.exists() else ""
        if late:
            return Outcome(None, f"it was ended after {seconds:.0f} s", output=written)
        if not report.exists():
            return Outcome(None, f"its process ended with {process.exitcode}", True, written)
        return Outcome(**json.loads(report.read_text(encoding="utf-8")), output=written)


def _end(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
    process.kill()
    process.join()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], output: str, report: str) -> None:
    """In the new process."""
    os.setsid()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        outcome: dict[str, Any] = {"result": function(*arguments)}
    except UnavailableError as lacking:
        outcome = {"result": None, "reason": str(lacking)}
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:MOST_CHARACTERS]
        outcome = {"result": None, "reason": reason, "failed": True}
    Path(report).write_text(json.dumps(outcome), encoding="utf-8")
