"""What came of a run, shown when it ends: a page beside it, and a few lines on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.report import save_report
from rlhf_lightning.report.headline import summary_lines
from rlhf_lightning.report.logs import find_logs
from rlhf_lightning.report.run import read_run
from rlhf_lightning.runs.signals import Stopped


class RunReport(Callback):
    """Writes the report of `rlhf report` at the end of `fit`, or after Ctrl-C, and says what the run came to.

    It reads what `TensorBoardLogger` or `CSVLogger` wrote; a run without either has no report. What goes wrong with it
    is one warning: a training that is done never fails by its report.

    Args:
        path: the HTML file; by default `report.html` in the trainer's `default_root_dir`.
    """

    def __init__(self, path: str | None = None) -> None:
        check_arguments(RunReport, locals())
        self.path = path

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write it when all other callbacks have written what they export."""
        if stage == "fit":
            self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write it after Ctrl-C, too: somebody who stops a run wants to see it."""
        by_hand = isinstance(exception, Stopped) and exception.name == "SIGINT"
        if (by_hand or isinstance(exception, KeyboardInterrupt)) and trainer.state.fn == "fit":
            self._write(trainer)

    def _write(self, trainer: Any) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.global_step == 0:
            return
        try:
            files = [path for folder in _log_folders(trainer) for path in find_logs(folder)]
            if not files:
                rank_zero_info("no report: this run has no logs of TensorBoardLogger or CSVLogger")
                return
            root = Path(trainer.default_root_dir)
            run = read_run(root, files=files)
            path = save_report([run], Path(self.path).expanduser() if self.path else root / "report.html")
            rank_zero_info("\n".join(summary_lines(run, str(path))))
        except Exception as e:  # a training that is done must not fail by its picture
            kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
            rank_zero_warn(f"no report was written: {kind}{' '.join(str(e).split())}")


def _log_folders(trainer: pl.Trainer) -> list[Path]:
    """Where the first logger that a report can read writes; what it still holds back is written now."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            return [Path(logger.log_dir)]
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
            return [Path(logger.log_dir)]
    return []
