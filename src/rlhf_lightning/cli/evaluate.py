"""`rlhf evaluate`: models measured on held-out rows, as a table on the terminal and as files for whatever comes after.

The signature of `evaluation.suite.evaluate` is the config; its docstring is the help.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf_lightning.cli.places import at_home
from rlhf_lightning.cli.recipes import config_paths, read_config
from rlhf_lightning.cli.stages import OneLineParser, user_error
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.results import LINES, RESULTS
from rlhf_lightning.evaluation.suite import evaluate
from rlhf_lightning.evaluation.task import Progress as Told
from rlhf_lightning.evaluation.task import Report
from rlhf_lightning.warning_filters import filter_warnings

_LISTS = ("--models", "--rewards", "--tasks")
_SILENT_FOR = 5.0  # seconds at the most, where there is no bar
_WIDTH = 160
"""Columns of what goes into a file or another program, where nobody's window is too narrow."""


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf evaluate`: measure, print a table, and say where everything is.

    Args:
        options: the words after `evaluate`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    filter_warnings()
    _check_words(options)
    try:
        settings = settings_of(list_words(options))
        with reporting(Console(stderr=True)) as report:
            evaluation = evaluate(**settings, report=report)
    except ValueError as error:
        if mendable := user_error(error):
            raise mendable from error
        raise
    console = Console()
    evaluation.print_table(console if console.is_terminal else Console(width=_WIDTH))
    print()
    for name, file in (("numbers", RESULTS), ("each row", LINES)):
        print(f"{name:10}{at_home(settings['out'])}/{file}")


def settings_of(words: list[str]) -> dict[str, Any]:
    """The arguments of `evaluate` that a command line asks for.

    Args:
        words: as `list_words` gives them.
    """
    parser = OneLineParser(
        prog="rlhf evaluate",
        usage="rlhf evaluate --config RECIPE --models MODEL [MODEL ...] --data FILE [options]",
    )
    parser.add_argument("--config", action="config", help="A recipe or YAML file; later ones win.")
    parser.add_function_arguments(evaluate, skip={"report"}, as_group=False)
    found = parser.instantiate_classes(parser.parse_args(words)).as_dict()
    del found["config"]
    return found


def list_words(options: Sequence[str]) -> list[str]:
    """Words of the command line in which each option that takes a list has all of it in one word.

    Args:
        options: in which names follow such an option one after the other.

    Raises:
        UserError: an option stands there twice.

    Example:
        >>> list_words(["--models", "runs/sft/export", "gpt2", "--seed", "1"])
        ['--models=["runs/sft/export", "gpt2"]', '--seed', '1']
    """
    joined: list[str] = []
    words = [*options]
    for name in _LISTS:
        if sum(word == name or word.startswith(f"{name}=") for word in words) > 1:
            raise UserError(f"{name} is given twice; pass all names after one {name}")
    while words:
        word = words.pop(0)
        if word not in _LISTS:
            joined.append(word)
            continue
        names: list[str] = []
        while words and not words[0].startswith("--"):
            names.append(words.pop(0))
        one = names[0] if len(names) == 1 and names[0].startswith("[") else None
        joined.append(f"{word}={one or json.dumps(names)}")
    return joined


def _check_words(options: Sequence[str]) -> None:
    """Refuse what belongs to the stages."""
    for path in config_paths(options):
        if "model" in read_config(path):
            raise UserError(f"config '{path}' is one of a stage; `rlhf evaluate` takes evaluate.yaml and its like")


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """What shows the progress: a bar on a terminal, and elsewhere a line now and then.

    Args:
        console: where.
    """
    if not console.is_terminal:
        yield lambda what, total: _by_lines(console, what, total)
        return
    said = TextColumn("{task.description}", markup=False)
    columns = (said, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:

        def report(what: str, total: int) -> Told:
            for before in progress.task_ids:
                progress.remove_task(before)
            bar = progress.add_task(what, total=total or None)
            return lambda done: progress.update(bar, completed=int(done))

        yield report


def _by_lines(console: Console, what: str, total: int) -> Told:
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    say(what + (f": {total:,} rows" if total else ""))
    said = time.monotonic()

    def told(done: float) -> None:
        nonlocal said
        if time.monotonic() - said >= _SILENT_FOR:
            say(f"{what}: {int(done):,} of {total:,} rows")
            said = time.monotonic()

    return told
