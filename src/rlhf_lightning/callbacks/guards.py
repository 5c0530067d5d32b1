"""Guards of a long run: steps that are not finite are left out, and metrics that run away are acted upon."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.arguments import AT_LEAST_1, Range, check_arguments
from rlhf_lightning.callbacks.acting import ActingCallback, Action
from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.training import check_skipping, forget_gradient

NON_FINITE = "non_finite"
"""Folder of a run with the batches whose steps were skipped."""
_IDS = "input_ids", "prompt_ids", "response_ids", "chosen_ids", "rejected_ids"
"""Names of token ids in batches and experience."""
KEPT = "kept"
"""Folder of a run with the checkpoint that was the newest one when a guard ended it."""


class SkipNonFinite(Callback):
    """Leaves out steps whose loss, score or gradient is not finite, and goes on with the next batch.

    Without it such a step ends the run. Weights, optimizer, learning rates and the place in the random numbers stay as
    they were, on every process, as if the data did not hold the batch; of an online algorithm the rest of the iteration
    is left out. What the numbers were computed from goes to `non_finite` in the trainer's `default_root_dir`: tensors,
    which `torch.load` reads with `weights_only=True`, and texts.

    Args:
        max_skips: so many steps may be left out in the whole run, resumed or not; the next one ends it.

    Attributes:
        skips: so many were.
        skipped: whether the last step was.
    """

    def __init__(self, max_skips: int = 3) -> None:
        check_arguments(SkipNonFinite, locals(), {"max_skips": AT_LEAST_1})
        self.max_skips = max_skips
        self.skips = 0
        self.skipped = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stand between the trainer and the module's training step.

        Raises:
            UserError: on this strategy, or with this module, no step can be left out.
        """
        if pl_module.automatic_optimization:
            raise UserError(
                "SkipNonFinite goes with the modules of this package, which look at every number before they step"
            )
        check_skipping(trainer)
        step = pl_module.training_step

        @wraps(step)
        def guarded(batch: Any, *args: Any) -> Any:
            self.skipped = False
            try:
                return step(batch, *args)
            except NonFiniteError as error:
                self._skip(trainer, pl_module, error, batch)

        pl_module.training_step = guarded

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Step aside."""
        vars(pl_module).pop("training_step", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Step aside after an error, too, when there is no teardown."""
        vars(pl_module).pop("training_step", None)

    def _skip(self, trainer: pl.Trainer, pl_module: Any, error: NonFiniteError, batch: Any) -> None:
        if self.skips == self.max_skips:
            said = str(error).rstrip(".")
            raise NonFiniteError(f"{said}; {self.skips} steps were skipped before, the most that may be") from error
        self.skipped, self.skips = True, self.skips + 1
        forget_gradient(pl_module)
        saved = self._save(trainer, pl_module, error, batch)
        rank_zero_warn(
            f"a step is skipped, number {self.skips} of at most {self.max_skips}: {error}; what it was computed from "
            f"is in '{saved}'"
        )

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, error: NonFiniteError, batch: Any) -> Path:
        folder = Path(trainer.default_root_dir) / NON_FINITE
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.skips}_rank{trainer.global_rank}.pt"
        said = {"message": str(error), "batch": plain(batch), "examples": plain(error.examples)}
        torch.save(said, path)
        texts = [f"{error}\n", *_texts(said, getattr(pl_module, "tokenizer", None))]
        path.with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8", errors="replace")
        return path

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out."""
        return {"skips": self.skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skips = state_dict["skips"]


def plain(value: Any) -> Any:
    """Tensors, numbers and texts in lists and dicts; what is anything else becomes None.

    Args:
        value: a batch, or examples: tuples with names, lists and dicts of such.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool) else None


def _texts(said: Any, tokenizer: Any, path: str = "") -> Iterator[str]:
    """Every text, and every row of token ids as text, each after the name it stands under."""
    if isinstance(said, str) and path != "message":
        yield f"{path}: {said}"
    elif isinstance(said, Mapping):
        for name, each in said.items():
            yield from _texts(each, tokenizer, f"{path}.{name}".removeprefix("."))
    elif isinstance(said, list):
        for i, each in enumerate(said):
            yield from _texts(each, tokenizer, f"{path}[{i}]")
    elif isinstance(said, Tensor) and isinstance(tokenizer, PreTrainedTokenizerBase) and path.endswith(_IDS):
        for i, ids in enumerate(said.reshape(-1, said.shape[-1]).tolist()):
            yield f"{path}[{i}]: {tokenizer.decode(ids)}"


class MetricGuard(ActingCallback):
    """Watches one logged metric, and acts where its mean over a window of steps leaves what is allowed.

    For a KL to the reference that runs away, entropy that collapses, answers that no longer end, or grow and grow; give
    one guard for each. A number that is not finite counts as outside. When it ends a run, the newest checkpoint from
    before is kept in `kept` in the trainer's `default_root_dir`, if no `ModelCheckpoint` has a `monitor` by which it
    keeps the best.

    Args:
        metric: as it is logged, such as `train/kl`; one that begins with `val/` is looked at after each validation,
            any other after each batch: in PPO, each iteration.
        above: act where the mean is above this; None for no such limit.
        below: act where it is below this; None for no such limit.
        window: so many values make a mean; when it has acted, it waits for as many more.
        action: `warn` only says so; `lower_lr` multiplies all learning rates by `factor`, each time; `stop` ends the
            run, as if its steps were done.
        factor: see there.
    """

    def __init__(
        self,
        metric: str,
        above: float | None = None,
        below: float | None = None,
        window: int = 5,
        action: Action = "stop",
        factor: float = 0.5,
    ) -> None:
        ranges = {"window": AT_LEAST_1, "factor": Range(above=0, below=1), "above": Range(), "below": Range()}
        check_arguments(MetricGuard, locals(), ranges)
        if above is None and below is None:
            raise UserError(f"MetricGuard: give above or below, the limits of {metric}")
        if above is not None and below is not None and below >= above:
            raise UserError(
                f"MetricGuard: below ({below}) must be less than above ({above}), or {metric} is never right"
            )
        self.metric, self.above, self.below = metric, above, below
        self.window, self.action, self.factor = window, action, factor
        self.lr_factor = 1.0
        self._values: list[float] = []

    @property
    def state_key(self) -> str:
        """One for each metric and action, so that several guards keep their states apart."""
        return f"MetricGuard {self.metric} {self.above} {self.below} {self.action}"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Look at a metric of training, unless the step was skipped and there is none."""
        skipped = any(isinstance(callback, SkipNonFinite) and callback.skipped for callback in trainer.callbacks)
        if not self.metric.startswith("val/") and not skipped:
            self._look(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look at a metric of validation."""
        if self.metric.startswith("val/") and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        if self.metric not in metrics:
            raise UserError(f"MetricGuard: {self.metric} is not logged; there are {', '.join(sorted(metrics))}")
        # The same on every process, as what is done must be.
        self._values.append(trainer.strategy.broadcast(float(metrics[self.metric])))
        if len(self._values) < self.window:
            return
        mean = sum(self._values) / self.window
        if (limit := self._left(mean)) is None:
            del self._values[0]
            return
        self._values = []
        done = self.act(trainer, pl_module)
        if self.action == "stop" and (best := keep_best_checkpoint(trainer)):
            done += f", and the best checkpoint is '{best}'"
        rank_zero_warn(f"{self.metric} is {mean:.4g} over the last {self.window} values, {limit}; {done}")

    def _left(self, mean: float) -> str | None:
        """Which limit a mean has left, if any."""
        if not math.isfinite(mean):
            return "not finite"
        if self.above is not None and mean > self.above:
            return f"above {self.above:g}"
        return f"below {self.below:g}" if self.below is not None and mean < self.below else None

    def state_dict(self) -> dict[str, Any]:
        """The values of the window, and what was done."""
        return {"values": [*self._values], "lr_factor": self.lr_factor, "has_stopped": self.has_stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._values, self.lr_factor = [*state_dict["values"]], state_dict["lr_factor"]
        self.has_stopped = self.action == "stop" and state_dict.get("has_stopped", False)


def keep_best_checkpoint(trainer: pl.Trainer) -> str | None:
    """The best checkpoint of a run so far: by its monitor, or else the newest one, which is then kept for good.

    Args:
        trainer: of the run.

    Returns:
        Its path; None where none was saved. The newest one is linked or copied into `kept` in the run's folder, since
        the next one may take its place.
    """
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    for callback in callbacks:
        if callback.monitor is not None and callback.best_model_path:
            return callback.best_model_path
    named = [c.best_model_path or c.last_model_path for c in callbacks]
    saved = [Path(path) for path in named if path and os.path.exists(path)]
    if not saved:
        return None
    newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
    kept = Path(trainer.default_root_dir) / KEPT / newest.name
    if trainer.is_global_zero:
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir(parents=True)
        if newest.is_dir():
            shutil.copytree(newest, kept, copy_function=_link)
        else:
            _link(str(newest), str(kept))
    return str(kept)


def _link(source: str, target: str) -> None:
    """A second name for a file, which takes no space, or a copy where the disk knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
