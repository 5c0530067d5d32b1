"""Keeps the checkpoint whose answers a reward model likes best, in place of the one with the lowest validation loss.

Ouyang et al. 2022 (InstructGPT), section 3.5: SFT over-fits in validation loss after one epoch, and yet more epochs
help both the reward model's score and what people prefer; so the final SFT model was chosen by that score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from rlhf_lightning.algorithms.online.checks import check_scores
from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, Range, check_arguments
from rlhf_lightning.callbacks.evaluate import chat_of
from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.chat.messages import exact_text
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.sources import DataSource
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.evaluation.rows import TextRow, read_rows
from rlhf_lightning.functional import masked_moments
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.rng import forked_rng
from rlhf_lightning.runs.lineage import is_ours
from rlhf_lightning.training import sum_over_ranks, synced
from rlhf_lightning.training.rollouts import rollout_weights

FOLDER = "best_by_reward"
"""Where the best model lies in a run's folder."""
METRIC = "val/reward_score"


class Best(NamedTuple):
    """The model that the reward liked best so far.

    Attributes:
        score: mean score of its answers.
        step: optimizer steps that it had been trained for.
    """

    score: float
    step: int


class KeepBestByReward(Callback):
    """Answers held-out prompts at each validation, lets a reward score the answers, and keeps the best model.

    For SFT, and any other stage that trains a language model. The mean score is logged as `val/reward_score`, which can
    be the `monitor` of a `ModelCheckpoint` or of early stopping, too. Whenever it is the highest so far, the model is
    exported; `fit` itself ends with the last one. Prompts and random numbers are the same each time, and training is
    bit for bit the same without the callback.

    Args:
        reward: folder or hub id of a reward model, or a function or its import path.
        num_prompts: held-out prompts that are answered, over all processes, drawn from the validation part of the data.
        data: prompts to answer in place of those, in any form that the stages read; needed where the data are a
            prepared folder, which holds no texts.
        sampling: how answers are drawn; by default as the module's, or `Sampling()`.
        batch_size: prompts that each process answers at once.
        reward_timeout: seconds that one call of a function may take; None for no limit.
        dirpath: where the best model goes, a Hugging Face folder as `HFExport` writes it; by default `best_by_reward`
            in the trainer's `default_root_dir`.
        reward_weights: what the raw logit of each label of a reward model counts, by its name or number; needed where
            it has several.

    Attributes:
        best: the best model so far, also before a run was resumed.
    """

    def __init__(
        self,
        reward: str | RewardFunction,
        num_prompts: int = 64,
        data: DataSource | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 32,
        reward_timeout: float | None = None,
        dirpath: str | None = None,
        reward_weights: dict[str, float] | None = None,
    ) -> None:
        ranges = {"num_prompts": AT_LEAST_1, "batch_size": AT_LEAST_1, "reward_timeout": POSITIVE}
        ranges["reward_weights"] = Range()
        check_arguments(KeepBestByReward, locals(), ranges)
        self.reward, self.num_prompts, self.data = reward, num_prompts, data
        self.sampling, self.batch_size, self.reward_timeout = sampling, batch_size, reward_timeout
        self.reward_weights = reward_weights
        self.dirpath = dirpath
        self.best: Best | None = None
        self._judge: Judge | None = None
        self._rows: list[TextRow] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the prompts, and load the reward: before the model of training, which a strategy may load in parts.

        Raises:
            UserError: no such reward, or no prompts.
        """
        if stage != "fit":
            return
        self._rows = self._held_out(getattr(trainer, "datamodule", None))
        if self._judge is not None:
            return
        device = trainer.strategy.root_device
        with forked_rng(device, "reward score"):  # what is loaded may draw random numbers
            self._judge = Judge.load(
                self.reward,
                device=device,
                trust_remote_code=getattr(pl_module, "trust_remote_code", False),
                timeout=self.reward_timeout,
                weights=self.reward_weights,
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuse now to replace a folder of somebody else, or to answer by what is no language model.

        Raises:
            UserError: one of both.
        """
        if not pl_module.export_model.can_generate():
            name = type(pl_module).__name__
            raise UserError(f"KeepBestByReward: {name} trains no language model; leave the callback out")
        self._export(trainer).on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See whether what was best is still there, where a run is resumed."""
        target = self._export(trainer).target(trainer)
        there = trainer.strategy.broadcast(is_ours(target))
        if self.best is not None and not there:
            rank_zero_warn(
                f"the model that the reward liked best, of step {self.best.step}, is not in '{target}'; the best is "
                "looked for anew"
            )
            self.best = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Answer, score, log, and keep the model if it is the best."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = self._score(trainer, pl_module)
        pl_module.log(METRIC, score, prog_bar=True, sync_dist=True, batch_size=len(self._rows))
        if self.best is not None and score <= self.best.score:
            return
        self.best = Best(score, trainer.global_step)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        _ = trainer.callback_metrics  # which processes sum up together, while the model card is written by one
        export = self._export(trainer)
        with torch.inference_mode(False), torch.no_grad():  # what is written must serve training on
            export.export(trainer, pl_module, export.target(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which model the reward liked best, and where it lies."""
        if self.best is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(
                f"the reward liked best '{self._export(trainer).target(trainer)}': {METRIC} {self.best.score:.4g} "
                f"(step {self.best.step} of {trainer.global_step})"
            )

    @property
    def state_key(self) -> str:
        """One for each reward and folder, so that several keep their states apart."""
        named = self.reward if isinstance(self.reward, str) else getattr(self.reward, "__name__", "")
        return f"KeepBestByReward {named} {self.dirpath}"

    def state_dict(self) -> dict[str, Any]:
        """What was best so far."""
        return {"best": None if self.best is None else self.best._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = None if state_dict["best"] is None else Best(**state_dict["best"])

    @torch.no_grad()
    def _score(self, trainer: pl.Trainer, pl_module: Any) -> float:
        """Mean score of the answers, the same on every process, each of which must call it."""
        assert self._judge is not None
        policy = Policy(
            pl_module.export_model,
            pl_module.tokenizer,
            "the model",
            chat_of(trainer, pl_module),
            self.batch_size,
            in_training=True,
        )
        sampling = self.sampling or getattr(pl_module, "sampling", None) or Sampling()
        rows, counted = self._share(trainer)
        written = [row.written for row in rows]
        random = policy.row_generators(0, [("reward score", row.row) for row in rows])
        whole = rollout_weights(pl_module, pl_module.export_model)
        with whole, trainer.precision_plugin.forward_context():
            answers = policy.answer(written, sampling, random, synced=synced(pl_module))
        said = [policy.as_taught(*one) for one in zip(written, answers, strict=True)]
        numbers = [row.row for row in rows]
        with forked_rng(pl_module.device, "reward score"):  # a function may draw random numbers
            scores = self._judge.scores(written, said, [one.ended for one in answers], numbers)
        scores, places = scores.to(pl_module.device), torch.tensor(numbers, device=pl_module.device)
        check_scores(pl_module, scores, places)
        _, mean, _ = masked_moments(
            scores, counted.to(pl_module.device), lambda summed: sum_over_ranks(pl_module, summed)
        )
        return float(trainer.strategy.broadcast(float(mean)))

    def _share(self, trainer: pl.Trainer) -> tuple[list[TextRow], Tensor]:
        """This process's prompts, as many as on each other one, and which of them count, `[B]`, bool."""
        mine = self._rows[trainer.global_rank :: trainer.world_size]
        most = -(-len(self._rows) // trainer.world_size)
        return [*mine, *self._rows[: most - len(mine)]], torch.arange(most) < len(mine)

    def _held_out(self, datamodule: Any) -> list[TextRow]:
        """The prompts, each once, in the order of the data."""
        count = self.num_prompts
        if self.data is not None:
            return read_rows(self.data, "prompts", num_samples=count)
        if not isinstance(datamodule, TextDataModule) or datamodule.data is None:
            raise UserError("KeepBestByReward: the data hold no prompts out; give the callback data of its own")
        options: dict[str, Any] = {"columns": datamodule.columns, "on_bad_row": datamodule.on_bad_row}
        try:
            if datamodule.validation_data is not None:
                rows = read_rows(datamodule.validation_data, datamodule.need, num_samples=count, **options)
            else:
                options["splits"] = datamodule.splits
                rows = read_rows(datamodule.data, datamodule.need, part="validation", num_samples=count, **options)
        except UserError as error:
            raise UserError(
                f"KeepBestByReward finds no held-out prompts: {error}; or give it data of its own"
            ) from error
        return [*{(exact_text(row.written.prompt), repr(row.written.tools)): row for row in reversed(rows)}.values()][
            ::-1
        ]

    def _export(self, trainer: pl.Trainer) -> HFExport:
        return HFExport(self.dirpath or str(Path(trainer.default_root_dir) / FOLDER))
