"""What came of a run, as a page to look at: settings, curves, answers, evaluations, several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.errors import UserError
from rlhf_lightning.report.charts import MAIN, curve_charts, evaluation_charts, score_against_kl
from rlhf_lightning.report.page import MADE_BY, write_page
from rlhf_lightning.report.pictures import save_pictures
from rlhf_lightning.report.run import Run
from rlhf_lightning.runs.whole_files import write_whole

__all__ = ["is_report", "save_report"]


def is_report(path: Path) -> bool:
    """Whether a file is a page that was made here.

    Args:
        path: of any file.
    """
    return path.is_file() and MADE_BY.encode() in path.read_bytes()[-4096:]


def save_report(runs: Sequence[Run], path: Path) -> Path:
    """Write the page, and what it shows first as PNG into a folder beside it that is called like it.

    Args:
        runs: one, or several to compare.
        path: the HTML file; it is replaced in one step, so that it is never half there.

    Returns:
        The path.

    Raises:
        UserError: the path has no ending, a file lies there that is no report, or nothing can be written there.
    """
    if not path.suffix:
        raise UserError(f"the report is to be '{path}', a name that the folder of its pictures has; end it in .html")
    if path.exists() and not is_report(path):
        raise UserError(f"'{path}' exists and is no report of runs; name another file, or move it away")
    # What a model wrote may hold halves of surrogate pairs, which no encoding can write.
    page = write_page(runs).encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
        _save_pictures(runs, path)
    except OSError as error:
        raise UserError(f"the report cannot be written to '{path}' ({error.strerror}); name another file") from error
    return path


def _save_pictures(runs: Sequence[Run], path: Path) -> None:
    stages = [[run for run in runs if run.stage == stage] for stage in dict.fromkeys(run.stage for run in runs)]
    for of_stage in stages:
        charts = [*filter(None, [score_against_kl(of_stage)]), *curve_charts(of_stage)]
        folder = (
            path.with_suffix("") if len(stages) == 1 else path.with_suffix("") / of_stage[0].stage.replace(" ", "_")
        )
        save_pictures(folder, [chart for chart in charts if chart.key in MAIN])
    if evaluated := evaluation_charts([run.evaluation for run in runs if run.evaluation]):
        save_pictures(path.with_suffix(""), evaluated)
