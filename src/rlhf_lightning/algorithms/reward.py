"""Reward modelling: a scalar head on a language model learns which of two responses people prefer.

The loss is the Bradley-Terry negative log-likelihood in three variants (see `functional.pairwise_loss`). At the end the
raw scores are measured on held-out chosen responses, so that every user of the model sees scores with mean 0 and
standard deviation 1 there. A pair may ask for a margin, and a pair of weight 2 counts as two pairs, in the loss and in
every metric; rankings of more than two responses come as weighted pairs. Left out: a language-model loss on the side.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.algorithms.common import (
    SIZES,
    check_token_budget,
    configure_optimizer,
    count_tokens,
    drop_frozen_weights,
    equally_many,
    load_run_state,
    log_metrics,
    name_rows,
    run_seed,
    save_run_state,
    stage_tokenizer,
)
from rlhf_lightning.algorithms.hyperparameters import as_config, from_config, optimizer_from_config
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PreferenceBatch, ScoringBatch, micro_batches
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import evaluation_mode
from rlhf_lightning.forward.prefix import SharedRows, share_rows, shared_lengths, sharing_pays
from rlhf_lightning.functional import RewardLoss, pairwise_loss, scores_at_end
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.models.finetune import FineTune, describe_trained, prepare_for_training
from rlhf_lightning.models.scalar_lm import (
    Calibration,
    ScalarLM,
    has_reward_head,
    load_reward_model,
    new_scalar_lm,
)
from rlhf_lightning.models.tokenizer import own_pad_token
from rlhf_lightning.rng import forked_rng
from rlhf_lightning.training import GradientAccumulation, sum_over_ranks
from rlhf_lightning.training.optim import ADAMW, Schedule, learning_rates, parameter_groups

_PROBE_TOKENS = 64


def pair_weights(batch: PreferenceBatch) -> Tensor:
    """How much each pair counts, `[B]`, float32."""
    if batch.weights is None:
        return torch.ones(len(batch.row_ids), dtype=torch.float32, device=batch.row_ids.device)
    return batch.weights.float()  # the Trainer gives batches the type of the weights


def both_sides(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask of chosen and rejected sequences, each `[B, 2, T]`."""
    ids = torch.stack([batch.chosen_ids, batch.rejected_ids], dim=1)
    return ids, torch.stack([batch.chosen_mask, batch.rejected_mask], dim=1)


class RewardModule(Stage):
    """Trains a reward model on pairs.

    Expects batches like `PreferenceBatch`. `docs/metrics.md` lists what is logged under `train/`, `val/` and `test/`.
    `predict` scores sequences (`ScoringBatch`).

    Args:
        model_name_or_path: Hugging Face folder or hub id. A language model, usually the export of the SFT stage, gets a
            fresh scalar head; a reward model keeps the head it has.
        loss: which scores of a pair are compared: `last_token`, `average` or `per_sample`.
        optimizer: the optimizer; weight decay reaches matrices only.
        lr_schedule: course of the learning rate after the warm-up, in optimizer steps.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        micro_batch_size: pairs per forward and backward pass; None for the whole batch. Splitting changes memory and
            time, not the gradient.
        max_tokens_per_batch: in place of `micro_batch_size`: tokens per forward and backward pass, padding included;
            pairs of similar length go together, few long ones or many short ones. A pair above it goes alone.
        prefix_sharing: run what both responses of a pair begin with, the prompt and often more, only once. The scores
            are the same to rounding; a model or attention kernel that cannot do it says so and runs both apart.
        gradient_clip_val: norm the gradient is clipped to; None for no clipping.
        dropout: keep the dropout that the model's config asks for; by default it is off.
        finetune: which weights are trained.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the rest again: less
            memory, a third more time, the same gradient.
        trust_remote_code: allow the model folder to run Python code of its own.
    """

    def __init__(
        self,
        model_name_or_path: str,
        loss: RewardLoss = "last_token",
        optimizer: OptimizerCallable = ADAMW,
        lr_schedule: Schedule = "cosine",
        warmup_steps: float = 0.03,
        micro_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        prefix_sharing: bool = True,
        gradient_clip_val: float | None = 1.0,
        dropout: bool = False,
        finetune: FineTune = FineTune(),
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        finetune = from_config(FineTune, finetune)
        check_arguments(RewardModule, locals(), SIZES)
        self.save_hyperparameters(ignore=["optimizer", "finetune"])
        self.save_hyperparameters(as_config(optimizer=optimizer, finetune=finetune))
        check_token_budget(micro_batch_size, max_tokens_per_batch)
        self.strict_loading = finetune.mode == "all"  # otherwise checkpoints lack what is frozen
        self.model_name_or_path = model_name_or_path
        self.loss: RewardLoss = loss
        self.optimizer = optimizer_from_config(optimizer)
        self.lr_schedule: Schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.micro_batch_size = micro_batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.prefix_sharing = prefix_sharing
        self.gradient_clip_val = gradient_clip_val
        self.dropout = dropout
        self.finetune = finetune
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.scalar: ScalarLM | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._head_is_random = False
        self._calibrated_at: int | None = None
        names = ("loss", "accuracy", "chosen_score", "rejected_score", "margin")
        self.eval_means = nn.ModuleDict({name: keep_dtype(MeanMetric()) for name in names})
        self.held_out_scores = keep_dtype(CatMetric())

    def configure_model(self) -> None:
        """Load the model and its tokenizer, once; the pad token becomes one that is not the EOS."""
        if self.scalar is not None:
            return
        self._head_is_random = not has_reward_head(self.model_name_or_path)
        load = new_scalar_lm if self._head_is_random else load_reward_model
        scalar = load(self.model_name_or_path, dropout=self.dropout, trust_remote_code=self.trust_remote_code)
        self.tokenizer = stage_tokenizer(self)
        num_embeddings = scalar.model.get_input_embeddings().num_embeddings
        pad_id = own_pad_token(self.tokenizer, num_embeddings)
        if pad_id >= num_embeddings:
            scalar.model.resize_token_embeddings(pad_id + 1)
        scalar.model.config.pad_token_id = pad_id
        prepare_for_training(scalar.model, self.finetune, self.gradient_checkpointing)
        self.scalar = scalar

    @property
    def export_model(self) -> PreTrainedModel:
        """The classifier that plain transformers loads."""
        assert self.scalar is not None
        return self.scalar.model

    def configure_optimizers(self) -> Any:
        """One optimizer, stepped with its schedule once per batch of the loader."""
        return configure_optimizer(self, self.optimizer(parameter_groups(self.export_model)))

    def on_fit_start(self) -> None:
        """Put the model in training mode: `from_pretrained` leaves it in evaluation mode."""
        self.export_model.train()
        if self.finetune.mode != "all":
            rank_zero_info(describe_trained(self.export_model, self.finetune))
        self._head_is_random = False

    def shares_prefixes(self, batch: PreferenceBatch) -> bool:
        """Whether what the two sides of each pair begin with is run only once; all processes call it equally often."""
        return self.prefix_sharing and sharing_pays(self.export_model, *both_sides(batch))

    def pair_scores(self, batch: PreferenceBatch, rows: SharedRows | None = None) -> tuple[Tensor, Tensor]:
        """Raw per-token scores of both sides, two tensors `[B, T]`, float32, in one forward pass.

        Args:
            batch: pairs.
            rows: the same pairs as shared rows; None to run both sides apart.
        """
        assert self.scalar is not None
        if rows is None:
            ids, mask = both_sides(batch)
            scores = self.scalar.raw(ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])
        else:
            scores = rows.spread(self.scalar.head(rows.hidden_states(self.export_model)))
        chosen, rejected = scores.unbind(dim=1)
        return chosen, rejected

    def pair_metrics(self, batch: PreferenceBatch, rows: SharedRows | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair, `[B]`, and what else is logged of it, each `[B]`, from the scores at the last token.

        Args:
            batch: pairs.
            rows: as for `pair_scores`.
        """
        chosen, rejected = self.pair_scores(batch, rows)
        losses = pairwise_loss(
            chosen,
            rejected,
            batch.chosen_ids,
            batch.rejected_ids,
            batch.chosen_mask,
            batch.rejected_mask,
            self.loss,
            batch.margins,
        )
        chosen_score = scores_at_end(chosen.detach(), batch.chosen_mask)
        rejected_score = scores_at_end(rejected.detach(), batch.rejected_mask)
        margin = chosen_score - rejected_score
        return losses, {
            "accuracy": (margin > 0).float(),
            "chosen_score": chosen_score,
            "rejected_score": rejected_score,
            "margin": margin,
        }

    def _pieces(self, batch: PreferenceBatch) -> list[tuple[PreferenceBatch, SharedRows | None]]:
        """Micro-batches, laid out before the first forward pass, so that none waits for lengths from the device."""
        shared = self.shares_prefixes(batch)
        lengths = shared_lengths(*both_sides(batch)) if shared else None
        size, max_tokens = self.micro_batch_size, self.max_tokens_per_batch
        pieces = equally_many(self, lambda least: micro_batches(batch, size, max_tokens, least, lengths))
        return [(piece, share_rows(*both_sides(piece)) if shared else None) for piece in pieces]

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One optimizer step on one batch; returns its loss, detached, for callbacks."""
        self.check_batch(batch, PreferenceBatch, "PreferenceDataModule")
        start = time.perf_counter()
        # As with the number of tokens elsewhere: of all micro-batches and ranks. Only pairs of weight 0 sum to 0.
        total_weight = sum_over_ranks(self, pair_weights(batch).sum()).clamp(min=torch.finfo(torch.float32).tiny)
        pieces = self._pieces(batch)
        accumulation = GradientAccumulation(self, len(pieces))
        sums = torch.zeros(4, dtype=torch.float32, device=self.device)
        with forked_rng(self.device, run_seed(self), "reward", self.trainer.global_step, self.global_rank):
            for micro_batch, rows in pieces:
                losses, pairs = self.pair_metrics(micro_batch, rows)
                weights = pair_weights(micro_batch)
                accumulation.backward((losses * weights).sum() / total_weight)
                sums += torch.stack([(values * weights).sum() for values in pairs.values()])
        lr = learning_rates(self.optimizers())[0]
        grad_norm = accumulation.step(context=name_rows(batch.row_ids))
        means = sum_over_ranks(self, sums) / total_weight
        # The speed is that of the data, the padding that of what was run.
        sides = [both_sides(piece)[1] for piece, _ in pieces]
        num_tokens, _ = count_tokens(self, sides)
        run = [side if rows is None else rows.mask for side, (_, rows) in zip(sides, pieces, strict=True)]
        _, padding_share = count_tokens(self, run)
        metrics = {
            "train/loss": accumulation.loss,
            **{f"train/{name}": mean for name, mean in zip(pairs, means, strict=True)},
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/tokens_per_second": num_tokens / (time.perf_counter() - start),
            "train/padding_share": padding_share,
        }
        log_metrics(self, metrics, shown="train/loss", batch_size=len(batch.row_ids))
        return accumulation.loss

    def _evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        self.check_batch(batch, PreferenceBatch, "PreferenceDataModule")
        rows = share_rows(*both_sides(batch)) if self.shares_prefixes(batch) else None
        losses, pairs = self.pair_metrics(batch, rows)
        for name, values in {"loss": losses, **pairs}.items():
            metric: Any = self.eval_means[name]
            metric.update(values, pair_weights(batch))
            self.log(f"{stage}/{name}", metric, prog_bar=name in ("loss", "accuracy"), batch_size=len(batch.row_ids))
        self.held_out_scores.update(pairs["chosen_score"])

    def _refuse_random_head(self) -> None:
        if self._head_is_random:
            raise UserError(
                f"'{self.model_name_or_path}' has no trained reward head; pass the export folder of a reward model, "
                "or a checkpoint with --ckpt_path"
            )

    def on_validation_epoch_start(self) -> None:
        """Begin the measurement of scores; refuse to validate a head that nobody trained."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._refuse_random_head()
        self.held_out_scores.reset()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, accuracy and raw scores over the whole validation set."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Calibrate by this validation's chosen scores, so that exports beside checkpoints are calibrated too."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._calibrate()

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss, accuracy and raw scores over the whole test set."""
        self._refuse_random_head()
        self._evaluate(batch, "test")

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Calibrate the final weights, unless the last validation has just done so."""
        assert self.scalar is not None
        if self._calibrated_at == self.trainer.global_step:
            return
        if self.trainer.val_dataloaders is None and self.trainer.enable_validation:
            self._load_validation_data()
        loader = self.trainer.val_dataloaders
        if not loader:
            rank_zero_warn("no validation data: the reward model's scores stay uncalibrated (mean 0, std 1)")
            return
        self.held_out_scores.reset()
        with evaluation_mode(self.export_model), self.trainer.precision_plugin.forward_context():
            for batch in loader:
                on_device = self.trainer.strategy.batch_to_device(batch)
                chosen = self.scalar.raw(on_device.chosen_ids, on_device.chosen_mask)
                self.held_out_scores.update(scores_at_end(chosen, on_device.chosen_mask))
            self._calibrate()

    def _load_validation_data(self) -> None:
        """What Lightning does before a run's first validation, for runs that end without one."""
        self.trainer.validating = True
        self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        self.trainer.training = True

    def _calibrate(self) -> None:
        """Measure the held-out scores that were collected, and remember one sequence as a probe."""
        assert self.scalar is not None
        scores = torch.as_tensor(self.held_out_scores.compute()).double().reshape(-1)
        std = float(scores.std(correction=0)) if len(scores) > 1 else 0.0
        loader = self.trainer.val_dataloaders
        example = self.trainer.strategy.batch_to_device(next(iter(loader)))  # type: ignore[arg-type]
        ids = example.chosen_ids[:1, : int(example.chosen_mask[0].sum())][:, :_PROBE_TOKENS]
        mask = torch.ones_like(ids, dtype=torch.bool)
        probe_score = float(scores_at_end(self.scalar.raw(ids, mask), mask))
        self.scalar.calibration = Calibration(float(scores.mean()), std or 1.0, ids[0].tolist(), probe_score)
        self._calibrated_at = self.trainer.global_step

    def predict_step(self, batch: ScoringBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score sequences.

        Returns:
            For each sequence `row`, `role` (the column its response came from), `prompt`, `response`, `score`
            (calibrated) and `raw_score`.
        """
        assert self.scalar is not None
        self._refuse_random_head()
        self.check_batch(batch, ScoringBatch, "PreferenceDataModule")
        raw = scores_at_end(self.scalar.raw(batch.input_ids, batch.attention_mask), batch.attention_mask)
        columns = (batch.row_ids, batch.roles, batch.prompts, batch.responses, self.scalar.calibrate(raw), raw)
        names = ("row", "role", "prompt", "response", "score", "raw_score")
        plain = [column.tolist() if isinstance(column, Tensor) else column for column in columns]
        return [dict(zip(names, row, strict=True)) for row in zip(*plain, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights; keep the seed of the run and the calibration."""
        drop_frozen_weights(self, checkpoint)
        assert self.scalar is not None
        calibration = self.scalar.calibration
        save_run_state(self, checkpoint, calibration={**vars(calibration)}, calibrated_at=self._calibrated_at)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the run that wrote the checkpoint was."""
        self.configure_model()
        assert self.scalar is not None
        self._run_state = load_run_state(self, checkpoint)
        self.scalar.calibration = Calibration(**self._run_state["calibration"])
        self._calibrated_at = self._run_state["calibrated_at"]
        self._head_is_random = False
