"""Writes what `predict` returns to a file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.runs.whole_files import write_whole
from rlhf_lightning.runs.writable import check_file, check_folder
from rlhf_lightning.training import gather_objects

_LINES_AT_ONCE = 10_000


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as JSON lines, in the order of the source, each row once.

    Args:
        path: the file, replaced; by default `predictions.jsonl` in the trainer's `default_root_dir`.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path

    def _target(self, trainer: pl.Trainer) -> Path:
        return Path(self.path).expanduser() if self.path else Path(trainer.default_root_dir) / "predictions.jsonl"

    def _part(self, trainer: pl.Trainer, rank: int) -> Path:
        target = self._target(trainer)
        return target.with_name(f"{target.name}.rank{rank}")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a file that cannot be written, before models are loaded."""
        if stage != "predict":
            return
        if not self.path:
            check_folder("--trainer.default_root_dir", Path(trainer.default_root_dir))
        check_file("PredictionWriter: path", self._target(trainer))

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what a killed run may have left of this rank's part."""
        self._part(trainer, trainer.global_rank).unlink(missing_ok=True)

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, *args: Any
    ) -> None:
        """Append one batch to this rank's part."""
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join the parts of all ranks, whose disks may differ; rows that a sampler repeated come once."""
        part = self._part(trainer, trainer.global_rank)
        # Not splitlines: a response may hold other characters that it takes for line ends.
        mine = [line for line in part.read_text(encoding="utf-8").split("\n") if line] if part.exists() else []
        lines: list[str] = []
        for start in range(0, max(gather_objects(trainer, len(mine))), _LINES_AT_ONCE):
            for sent in gather_objects(trainer, mine[start : start + _LINES_AT_ONCE]):
                lines += sent if trainer.is_global_zero else []
        if trainer.is_global_zero:
            self._write(trainer, lines)
        trainer.strategy.barrier()
        part.unlink(missing_ok=True)

    def _write(self, trainer: pl.Trainer, lines: list[str]) -> None:
        rows = [json.loads(line) for line in lines]
        unique = {(row["row"], row.get("role", "")): line for row, line in zip(rows, lines, strict=True)}
        target = self._target(trainer)
        write_whole(target, "".join(unique[key] + "\n" for key in sorted(unique)))
        rank_zero_info(f"predictions: {len(unique)} rows in '{target}'")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no half a file."""
        with contextlib.suppress(OSError):  # what stopped the run is to be told, not that there is no such folder
            self._part(trainer, trainer.global_rank).unlink(missing_ok=True)
