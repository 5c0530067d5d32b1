"""What belongs to a run as a whole: its config beside its checkpoints, and a clean start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from rlhf_lightning.runs.checkpoint_files import remove, remove_unfinished
from rlhf_lightning.runs.ending import MARK
from rlhf_lightning.runs.signals import Stopped

_TRACES = ("events.out.tfevents.*", "config.yaml", "hparams.yaml")
_LEFTOVERS = (
    "checkpoints/*.ckpt",
    "checkpoints/*.ckpt.*",
    "checkpoints/*-hf",
    MARK,
    "best_by_judge",
    "samples.md",
    "report.html",
    "evaluation.json",
    "evaluation.jsonl",
    "report",
    "events.out.tfevents.*",
)


class RunFolder(SaveConfigCallback):
    """Looks after the `default_root_dir` of a `fit`.

    The saved config describes the run, not how it was started: `--ckpt_path` and `--overwrite` are left out, so that
    `rlhf fit --config runs/x/config.yaml` does the same again.

    Args:
        parser: knows how to write the config.
        config: the options of the subcommand.
        **kwargs: as `pytorch_lightning.cli.SaveConfigCallback` takes them; the file is always replaced.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        root = Path(config.trainer.default_root_dir or ".")
        starts_anew = config.get("overwrite", False) and config.get("ckpt_path") is None
        self._present = set(root.iterdir()) if root.is_dir() else None
        self._leftovers = [path for p in _LEFTOVERS for path in root.glob(p)] if starts_anew else []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the config when training starts, and never when a finished run is evaluated."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config["ckpt_path"], config["overwrite"] = None, False
        self.parser.save(config, str(folder / self.config_filename), skip_none=False, overwrite=True, multifile=False)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what the earlier run left, now that data and models of the new one have loaded."""
        if not trainer.is_global_zero:
            return
        for path in self._leftovers:
            remove(path)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            remove(Path(trainer.default_root_dir) / MARK)  # until this run ends
            remove_unfinished(checkpoint_folders(trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no trace of a run that bad input, or a signal, stopped before it began."""
        if not trainer.is_global_zero or trainer.state.fn is None:
            return
        if isinstance(exception, ValueError | MisconfigurationException | Stopped) and trainer.global_step == 0:
            self._remove_traces(Path(trainer.default_root_dir))

    def _remove_traces(self, root: Path) -> None:
        traces = [path for name in _TRACES for path in root.glob(name) if path not in (self._present or ())]
        for path in traces:
            path.unlink()
        if self._present is None and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Where the checkpoint callbacks of a trainer write."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
