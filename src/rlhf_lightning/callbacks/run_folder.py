"""What belongs to a run as a whole: its config beside its checkpoints, and a clean start."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from rlhf_lightning.algorithms.lineage import trained_on
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.callbacks.model_folder import write_trained_on
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import remove, remove_unfinished
from rlhf_lightning.runs.ending import MARK
from rlhf_lightning.runs.event_files import PATTERN
from rlhf_lightning.runs.lineage import FILE, TRAINED_ON, is_ours, write_record
from rlhf_lightning.runs.log_files import is_of_a_fit
from rlhf_lightning.runs.peers import active
from rlhf_lightning.runs.secrets import without_secrets
from rlhf_lightning.runs.signals import Stopped
from rlhf_lightning.runs.whole_files import write_whole

_TRACES = (PATTERN, "config.yaml", "hparams.yaml", FILE, TRAINED_ON)
_KEPT = "rlhf_lightning_kept"
_LEFTOVERS = (
    "checkpoints/*.ckpt",
    "checkpoints/*.ckpt.*",
    "checkpoints/*-hf",
    MARK,
    "best_by_judge",
    "kept/*.ckpt",
    "non_finite/*_rank*",
    "samples.md",
    "report.html",
    "evaluation.json",
    "evaluation.jsonl",
    "report/*.png",
    PATTERN,
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
        self._chosen_here = config.get("ckpt_path") in ("last", "auto")
        self._kept: dict[str, list[str]] = {}
        self._present = set(root.iterdir()) if root.is_dir() else None
        self._was_of_a_run = _is_of_a_run(root)
        self._leftovers = _leftovers(root) if starts_anew else []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the config when training starts, and never when a finished run is evaluated."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config["ckpt_path"], config["overwrite"] = None, False
        text = self.parser.dump(config, skip_none=False)
        write_whole(folder / self.config_filename, without_secrets(text))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what an earlier run left, now that data and models of the new one have loaded.

        A run that was killed before it had saved anything leaves logs of steps that are now made again.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(trainer.default_root_dir)
        logs: list[Path] = []
        # Not that of the trainer, which under some strategies does not know it yet.
        if self.config.get("ckpt_path") is None and self._was_of_a_run:
            logs = [path for path in root.glob(PATTERN) if is_of_a_fit(path)] + [root / "samples.md"]
        for path in {*self._leftovers, *logs}:
            remove(path)
        remove(root / MARK)  # until this run ends
        remove_unfinished(checkpoint_folders(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the run comes from, now that nothing is left to be refused."""
        if trainer.is_global_zero and isinstance(pl_module, Stage) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            root = Path(trainer.default_root_dir)
            write_record(root, pl_module.lineage)
            write_trained_on(root, trained_on(pl_module))
        if trainer.is_global_zero:
            self._remove_replaced(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let the checkpoint that the run goes on from be replaced in its turn; Lightning would keep it."""
        if self._chosen_here:  # nobody has named it
            trainer.ckpt_path = None
        self._kept = _kept(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember which checkpoints were kept, one of which may be removed once this one is written."""
        checkpoint[_KEPT] = self._kept

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Know which they were."""
        self._kept = checkpoint.get(_KEPT, {})

    def _remove_replaced(self, trainer: pl.Trainer) -> None:
        """Remove what a process that was killed right after it had written a checkpoint was about to remove."""
        now = _kept(trainer)
        for name, before in self._kept.items():
            for path in {*map(Path, before)} - {*map(Path, now.get(name, before))}:
                if path.parent in checkpoint_folders(trainer):
                    remove(path)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no trace of a run that bad input, or a signal, stopped before it began."""
        if isinstance(exception, SystemExit):
            _refuse_success(exception, trainer.global_step)
        if not trainer.is_global_zero or trainer.state.fn is None:
            return
        if _ends_before_it_begins(exception) and trainer.global_step == 0:
            self._remove_traces(Path(trainer.default_root_dir))

    def _remove_traces(self, root: Path) -> None:
        traces = [path for name in _TRACES for path in root.glob(name) if path not in (self._present or ())]
        for path in traces:
            path.unlink()
        if self._present is None and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def _kept(trainer: pl.Trainer) -> dict[str, list[str]]:
    """The checkpoints of each callback that it removes when it has written others in their place."""
    kept = {}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_top_k > 0:
            alone = [callback.best_model_path] if callback.monitor is None and callback.save_top_k == 1 else []
            kept[callback.state_key] = [path for path in (*callback.best_k_models, *alone) if path]
    return kept


def _ends_before_it_begins(exception: BaseException) -> bool:
    """Whether bad input or a signal stops the run: here, or in another process over whose end this one stumbles."""
    failure = peers.failure if (peers := active()) is not None else None
    there = failure is not None and (failure.is_stop or failure.code == 2)
    return there or isinstance(exception, ValueError | MisconfigurationException | Stopped)


def _refuse_success(exception: SystemExit, steps: int) -> None:
    """Let a run that something ended by `sys.exit()` not end as if it had done what it was started for."""
    if not exception.code:
        print(
            f"error: something that the run called ended it by sys.exit after {steps} optimizer steps", file=sys.stderr
        )
        exception.code = 1


def _leftovers(root: Path) -> list[Path]:
    """What an earlier run left in its folder.

    Raises:
        UserError: files of those names lie in a folder that was never that of a run.
    """
    found = [path for pattern in _LEFTOVERS for path in root.glob(pattern)]
    if found and not _is_of_a_run(root):
        raise UserError(
            f"'{root}' holds {found[0].relative_to(root)}, but no run of this package that --overwrite could replace; "
            "choose another --trainer.default_root_dir"
        )
    return [path for path in found if not path.is_dir() or ".ckpt" in path.name or is_ours(path)]


def _is_of_a_run(root: Path) -> bool:
    """Whether a fit by the command line wrote there: by its record, or by the options in its config."""
    try:
        text = (root / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    return is_ours(root) or re.search(r"^overwrite: ", text, re.MULTILINE) is not None


def checkpoint_folders(trainer: pl.Trainer) -> list[Path]:
    """Where the checkpoint callbacks of a trainer write."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
