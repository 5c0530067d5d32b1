"""`rlhf report`: what came of a run, or of several, as one page to look at."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.cli.places import at_home
from rlhf_lightning.report import save_report
from rlhf_lightning.report.headline import summary_lines
from rlhf_lightning.report.run import read_runs

_PAGE = "report.html"


def main(args: Sequence[str]) -> None:
    """Entry point of `rlhf report`.

    Args:
        args: the words after `report`.

    Raises:
        UserError: a folder is missing or holds no logs.
    """
    parser = argparse.ArgumentParser(
        prog="rlhf report",
        description="Write what came of a run into one HTML file that needs no network: settings, curves, answers over "
        "time, evaluations; of several runs of a stage one picture over the other and what differs in their settings.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, its default_root_dir")
    parser.add_argument(
        "--out", type=at_home, help="the HTML file; by default report.html in the folder of the run, or of all runs"
    )
    parsed = parser.parse_args(args)
    runs = read_runs(parsed.runs)
    path = save_report(runs, parsed.out or default_path([run.folder for run in runs]))
    for run in runs:
        print("\n".join(summary_lines(run)))
        print("".join(f"  warning: {problem}\n" for problem in run.problems), end="")
    print(f"report  {path}\nPNGs    {path.with_suffix('')}")


def default_path(folders: Sequence[Path]) -> Path:
    """`report.html` in the one folder, or in the nearest that holds all of several."""
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return (folders[0] if len(folders) == 1 else Path(os.path.relpath(common))) / _PAGE
