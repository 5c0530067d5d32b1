"""`rlhf pipeline`: one stage after the other by one YAML file, each a command of `rlhf` of its own.

A step that has ended is left alone for as long as its settings and what it began with are what they were; one that was
stopped goes on. So the same command may be given at any time. What a step is replaced by goes beside it, not over it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.cli.pipeline.record import Record, place_beside
from rlhf_lightning.cli.pipeline.steps import Pipeline, Step, read_pipeline
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.writable import check_folder

_STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_RLHF = (sys.executable, "-m", "rlhf_lightning")


def main(args: Sequence[str]) -> None:
    """Entry point of `rlhf pipeline`.

    Args:
        args: the words after `pipeline`, the file first.

    Raises:
        UserError: something the user can fix.
    """
    parser = argparse.ArgumentParser(
        prog="rlhf pipeline",
        description="Run the steps of a YAML file one after the other: fit, sample, prepare and evaluate. Steps that "
        "have ended and whose settings and inputs are what they were are left alone; one that was stopped goes on.",
    )
    config = "the pipeline, such as pipeline.yaml; of several later ones win"
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=config)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value of the file, such as data=pairs.jsonl; may be given several times",
    )
    parser.add_argument("--out", type=Path, help="folder of all steps, in place of that of the file")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and why, and do nothing")
    parsed = parser.parse_args(args)
    pipeline = read_pipeline(parsed.config, parsed.set, parsed.out)
    pipeline.check()
    for step in pipeline.steps:
        check_folder("--out", pipeline.folder(step))
    if parsed.dry_run:
        _say(pipeline)
        return
    for number, step in enumerate(pipeline.steps, 1):
        _run(pipeline, step, f"{number}/{len(pipeline.steps)} {step.name}")
    _report(pipeline)


def _say(pipeline: Pipeline) -> None:
    anew: list[Path] = []  # folders of steps that are yet to run: what they will leave behind is not known
    for step in pipeline.steps:
        record = Record(pipeline, step)
        why = record.why_again() or ("what it begins with is made anew" if record.begins_within(anew) else None)
        if why is not None:
            anew.append(pipeline.folder(step))
        print(f"{step.name}: {'unchanged' if why is None else why}\n  {pipeline.shown(step)}")


def _run(pipeline: Pipeline, step: Step, title: str) -> None:
    record = Record(pipeline, step)
    why = record.why_again()
    if why is None:
        print(f"{title}: unchanged, left alone", flush=True)
        return
    folder = pipeline.folder(step)
    if not record.goes_on() and folder.exists() and any(folder.iterdir()):
        beside = place_beside(folder)
        folder.rename(beside)
        print(f"{title}: what was there is in '{beside}'", flush=True)
    print(f"{title}: {why}\n  {pipeline.shown(step)}", flush=True)
    record.begin()
    code, told = _call(pipeline.words(step))
    if code:
        then = "goes on from here" if code in (129, 130, 143) else "tries it again, once it is fixed"
        print(f"{title}: ended with code {code}; the same command {then}", file=sys.stderr)
        sys.exit(code)
    made = pipeline.result(step)
    if not made.exists():
        raise UserError(f"step '{step.name}' has left no '{made}': its recipe needs the callback HFExport")
    record.end()
    if told:  # too late for the step
        print(f"{title}: stopped after it; the same command goes on from here", file=sys.stderr)
        sys.exit(told)


def _call(words: Sequence[str]) -> tuple[int, int]:
    """Run a command of `rlhf`, which has the terminal, and saves before it ends when it is told to stop.

    Args:
        words: of it, after `rlhf`.

    Returns:
        The code it ended with, and that of having been told to stop, 0 if nobody did.
    """
    told: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def note(number: int, _: object) -> None:
        told.append(number)
        with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe, too
            os.write(2, f"{signal.Signals(number).name}: the pipeline ends with this step\n".encode())
        for process in running if number != signal.SIGINT else []:  # of Ctrl-C the terminal tells the step, too
            process.send_signal(number)

    taken = [each for each in _STOPPING if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in taken}
    try:
        with subprocess.Popen([*_RLHF, *words]) as process:
            running.append(process)
            for number in set(told) - {signal.SIGINT}:
                process.send_signal(number)
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code, 128 + told[0] if told else 0


def _report(pipeline: Pipeline) -> None:
    runs = [pipeline.folder(step) for step in pipeline.steps if step.run == "fit"]
    page = pipeline.out / "report.html"
    if runs and any(codes := _call(["report", *map(str, runs), "--out", str(page)])):
        sys.exit(max(codes))
    for step in pipeline.steps:
        print(f"{step.name:12} {os.path.relpath(pipeline.result(step))}")
