"""Supervised fine-tuning: next-token cross-entropy on demonstrations.

One batch of the loader is one optimizer step; inside it the batch is cut into micro-batches, and the loss of each token
weighs the same whatever micro-batch or rank it is on. That is why the optimisation is manual: Lightning's
`accumulate_grad_batches` averages the means of micro-batches. Rows may hold several packed examples; the first such
batch proves that the model keeps them apart. Trained are all weights, the last layer, or adapters (LoRA).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric
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
    response_rows,
    run_seed,
    save_run_state,
    stage_tokenizer,
)
from rlhf_lightning.algorithms.hyperparameters import as_config, from_config, optimizer_from_config
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.arguments import SHARE_BELOW_1, check_arguments
from rlhf_lightning.batches import InstructionBatch, PromptBatch, micro_batches
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.output_layer import cross_entropy_at
from rlhf_lightning.forward.packed import check_packing
from rlhf_lightning.generation.engine import TransformersEngine, respond
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.models.finetune import FineTune, describe_trained, prepare_for_training
from rlhf_lightning.rng import forked_rng, generator
from rlhf_lightning.training import GradientAccumulation, sum_over_ranks, synced
from rlhf_lightning.training.optim import ADAMW, Schedule, learning_rates, parameter_groups

_PROBE_TOKENS = 16


class SFTModule(Stage):
    """Teaches a language model to answer as the demonstrations do.

    Expects batches like `InstructionBatch`. `docs/metrics.md` lists what is logged under `train/`, `val/` and `test/`.
    `predict` answers prompts (`PromptBatch`).

    Args:
        model_name_or_path: Hugging Face folder or hub id of the model to start from.
        optimizer: the optimizer; weight decay reaches matrices only.
        lr_schedule: course of the learning rate after the warm-up, in optimizer steps.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        label_smoothing: share of each target spread evenly over the vocabulary.
        micro_batch_size: examples (packed rows, if the data are packed) per forward and backward pass; None for the
            whole batch. Splitting changes memory and time, not the gradient.
        max_tokens_per_batch: in place of `micro_batch_size`: tokens per forward and backward pass, padding included;
            examples of similar length go together, few long ones or many short ones. An example above it goes alone.
        gradient_clip_val: norm the gradient is clipped to; None for no clipping.
        dropout: keep the dropout that the model's config asks for; by default it is off.
        finetune: which weights are trained.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the rest again: less
            memory, a third more time, the same gradient.
        sampling: how `predict` and sample texts are generated.
        trust_remote_code: allow the model folder to run Python code of its own.
    """

    def __init__(
        self,
        model_name_or_path: str,
        optimizer: OptimizerCallable = ADAMW,
        lr_schedule: Schedule = "cosine",
        warmup_steps: float = 0.03,
        label_smoothing: float = 0.0,
        micro_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        gradient_clip_val: float | None = 1.0,
        dropout: bool = False,
        finetune: FineTune = FineTune(),
        gradient_checkpointing: bool = False,
        sampling: Sampling = Sampling(),
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        finetune, sampling = from_config(FineTune, finetune), from_config(Sampling, sampling)
        check_arguments(SFTModule, locals(), {**SIZES, "label_smoothing": SHARE_BELOW_1})
        self.save_hyperparameters(ignore=["optimizer", "finetune", "sampling"])
        self.save_hyperparameters(as_config(optimizer=optimizer, finetune=finetune, sampling=sampling))
        check_token_budget(micro_batch_size, max_tokens_per_batch)
        self.strict_loading = finetune.mode == "all"  # otherwise checkpoints lack what is frozen
        self.model_name_or_path = model_name_or_path
        self.optimizer = optimizer_from_config(optimizer)
        self.lr_schedule: Schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.label_smoothing = label_smoothing
        self.micro_batch_size = micro_batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.gradient_clip_val = gradient_clip_val
        self.dropout = dropout
        self.finetune = finetune
        self.gradient_checkpointing = gradient_checkpointing
        self.sampling = sampling
        self.trust_remote_code = trust_remote_code
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.val_loss = keep_dtype(MeanMetric())
        self._packing_is_safe = False

    def configure_model(self) -> None:
        """Load the model and its tokenizer, once."""
        if self.model is not None:
            return
        model = load_causal_lm(self.model_name_or_path, self.dropout, self.trust_remote_code)
        prepare_for_training(model, self.finetune, self.gradient_checkpointing)
        self.model = model
        self.tokenizer = stage_tokenizer(self)

    @property
    def export_model(self) -> PreTrainedModel:
        """The model that the next stage starts from."""
        assert self.model is not None
        return self.model

    def configure_optimizers(self) -> Any:
        """One optimizer, stepped with its schedule once per batch of the loader."""
        return configure_optimizer(self, self.optimizer(parameter_groups(self.export_model)))

    def on_fit_start(self) -> None:
        """Put the model in training mode: `from_pretrained` leaves it in evaluation mode."""
        self.export_model.train()
        if self.finetune.mode != "all":
            rank_zero_info(describe_trained(self.export_model, self.finetune))

    def loss_sums(self, batch: InstructionBatch) -> tuple[Tensor, Tensor]:
        """Loss and negative log-likelihood, both summed over the target tokens, two scalars in nats.

        Args:
            batch: at least one example.

        Raises:
            UserError: the batch is packed, and the model would let its examples see each other.
        """
        if batch.position_ids is not None and not self._packing_is_safe:
            check_packing(self.export_model, batch.input_ids[batch.attention_mask][:_PROBE_TOKENS])
            self._packing_is_safe = True
        hidden = hidden_states(self.export_model, batch.input_ids, batch.attention_mask, batch.position_ids)
        # Token t is predicted from t - 1.
        targets, mask = batch.input_ids[:, 1:], batch.loss_mask[:, 1:]
        return cross_entropy_at(self.export_model, hidden[:, :-1], targets, mask, self.label_smoothing)

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        """One optimizer step on one batch; returns its loss, detached, for callbacks."""
        self.check_batch(batch, InstructionBatch, "InstructionDataModule")
        start = time.perf_counter()
        num_targets = sum_over_ranks(self, batch.loss_mask.sum()).clamp(min=1)
        size, max_tokens = self.micro_batch_size, self.max_tokens_per_batch
        pieces = equally_many(self, lambda least: micro_batches(batch, size, max_tokens, least))
        accumulation = GradientAccumulation(self, len(pieces))
        nll = torch.zeros((), dtype=torch.float32, device=self.device)
        with forked_rng(self.device, run_seed(self), "sft", self.trainer.global_step, self.global_rank):
            for micro_batch in pieces:
                loss_sum, nll_sum = self.loss_sums(micro_batch)
                accumulation.backward(loss_sum / num_targets)
                nll += nll_sum / num_targets
        lr = learning_rates(self.optimizers())[0]
        grad_norm = accumulation.step(context=name_rows(batch.row_ids))
        num_tokens, padding_share = count_tokens(self, [piece.attention_mask for piece in pieces])
        nll = sum_over_ranks(self, nll)
        metrics = {
            "train/loss": nll,  # as validation measures it
            "train/objective": accumulation.loss,
            "train/perplexity": nll.exp(),
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/tokens_per_second": num_tokens / (time.perf_counter() - start),
            "train/padding_share": padding_share,
        }
        log_metrics(self, metrics, shown="train/loss", batch_size=len(batch.row_ids))
        return accumulation.loss

    def _evaluate(self, batch: InstructionBatch, stage: str) -> None:
        self.check_batch(batch, InstructionBatch, "InstructionDataModule")
        _, nll_sum = self.loss_sums(batch)
        num_targets = batch.loss_mask.sum()
        self.val_loss.update(nll_sum / num_targets.clamp(min=1), weight=num_targets)
        self.log(f"{stage}/loss", self.val_loss, prog_bar=True, batch_size=len(batch.row_ids))

    def validation_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Loss per target token over the whole validation set."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Perplexity from the loss of the whole set, not the mean of the batches' perplexities."""
        self.log("val/perplexity", self.val_loss.compute().exp(), sync_dist=True)

    def test_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Loss per target token over the whole test set."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Perplexity of the whole test set."""
        self.log("test/perplexity", self.val_loss.compute().exp(), sync_dist=True)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts.

        Returns:
            For each prompt `row`, `prompt`, `response`, `ended` (False where it was cut at the limit) and `tokens`.
        """
        assert self.tokenizer is not None
        self.check_batch(batch, PromptBatch, "InstructionDataModule")
        random = generator(self.device, run_seed(self), "predict", batch_idx, self.global_rank)
        engine = TransformersEngine(self.export_model, self.tokenizer)
        generation, texts = respond(engine, self.tokenizer, batch, self.sampling, random, synced(self))
        return response_rows(batch, generation, texts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights; keep the seed that the run's random numbers are derived from."""
        drop_frozen_weights(self, checkpoint)
        save_run_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the random numbers of the run that wrote the checkpoint."""
        self.configure_model()
        self._run_state = load_run_state(self, checkpoint)
