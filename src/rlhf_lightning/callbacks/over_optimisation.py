"""Notices when a policy only learns to please the reward, and keeps the best policy by another judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.arguments import AT_LEAST_1, NOT_NEGATIVE, Range, check_arguments
from rlhf_lightning.callbacks.acting import ActingCallback
from rlhf_lightning.callbacks.evaluate import Evaluate, Judged
from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.errors import UserError

FOLDER = "best_by_judge"
"""Where the best policy lies in a run's folder."""


class OverOptimisation(ActingCallback):
    """Stops training, or slows it down, when the held-out judge falls while the score that is trained on rises.

    What the reward gives more and more for is then no longer what it was made to measure (Gao et al. 2022). Goes with
    `Evaluate`, and compares each of its evaluations with the one that the judge liked best: a policy counts against
    the run if the judge's mean lies below that by more than chance explains, and the reward's above. Whenever the judge
    likes a policy best so far, it is exported; `fit` itself ends with the last one.

    Args:
        patience: so many evaluations in a row must count against the run.
        tolerance: how far the judge's mean must lie below its best, in standard errors of the difference; of two means
            over different prompts, which is on the safe side, for the prompts are the same.
        action: `stop` ends the run, as if its steps were done; `lower_lr` multiplies all learning rates by `factor`,
            and again after as many more evaluations.
        factor: see there.
        dirpath: where the best policy goes, a Hugging Face folder as `HFExport` writes it; by default `best_by_judge`
            in the trainer's `default_root_dir`.

    Attributes:
        best: the evaluation that the judge liked best.
        lr_factor: what the learning rates were multiplied by so far.
    """

    def __init__(
        self,
        patience: int = 3,
        tolerance: float = 1.0,
        action: Literal["stop", "lower_lr"] = "stop",
        factor: float = 0.5,
        dirpath: str | None = None,
    ) -> None:
        ranges = {"patience": AT_LEAST_1, "tolerance": NOT_NEGATIVE, "factor": Range(above=0, below=1)}
        check_arguments(OverOptimisation, locals(), ranges)
        self.patience, self.tolerance, self.action, self.factor = patience, tolerance, action, factor
        self.dirpath = dirpath
        self.best: Judged | None = None
        self._against = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for the judge.

        Raises:
            UserError: there is none.
        """
        if stage == "fit" and not any(isinstance(c, Evaluate) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("OverOptimisation acts on what a judge says; add the callback rlhf_lightning.Evaluate")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse now to replace a folder of somebody else."""
        self._export(trainer).on_fit_start(trainer, pl_module)

    def on_judged(self, trainer: pl.Trainer, pl_module: pl.LightningModule, judged: Judged) -> None:
        """Keep the best policy, or act."""
        if self.best is None or judged.score > self.best.score:
            self.best, self._against = judged, 0
            # Where it all starts is a folder already.
            if judged.iteration and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                export = self._export(trainer)
                export.export(trainer, pl_module, export.target(trainer))
            return
        chance = math.hypot(self.best.score_std, judged.score_std) / math.sqrt(judged.answers)
        fallen = self.best.score - judged.score > self.tolerance * chance
        against = fallen and judged.proxy_score > self.best.proxy_score
        self._against = self._against + 1 if against else 0
        if self._against >= self.patience:
            self._against = 0
            self._act(trainer, pl_module, judged)

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, judged: Judged) -> None:
        assert self.best is not None
        done = self.act(trainer, pl_module)
        rank_zero_warn(
            "over-optimisation: the judge falls while the score rises, from "
            f"{_said(self.best)} to {_said(judged)}; {done}"
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which policy the judge liked best, and where it lies."""
        if self.best is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        place = f"'{self._export(trainer).target(trainer)}'" if self.best.iteration else "what training started from"
        rank_zero_info(f"the judge liked best {place}: {_said(self.best)}")

    def state_dict(self) -> dict[str, Any]:
        """What was best, how long it has been falling, and what was done."""
        best = None if self.best is None else self.best._asdict()
        done = {"lr_factor": self.lr_factor, "has_stopped": self.has_stopped}
        return {"best": best, "against": self._against, **done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = None if state_dict["best"] is None else Judged(**state_dict["best"])
        self._against, self.lr_factor = state_dict["against"], state_dict["lr_factor"]
        self.has_stopped = self.action == "stop" and state_dict.get("has_stopped", False)

    def _export(self, trainer: pl.Trainer) -> HFExport:
        return HFExport(self.dirpath or str(Path(trainer.default_root_dir) / FOLDER))


def _said(judged: Judged) -> str:
    return f"judge {judged.score:.3g}, score {judged.proxy_score:.3g} (iteration {judged.iteration})"
