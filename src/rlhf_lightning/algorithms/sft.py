"""Supervised fine-tuning: next-token cross-entropy on demonstrations.

One batch of the loader is one optimizer step, and the loss of each token weighs the same whatever micro-batch or rank
it is on. Rows may hold several packed examples; the first such batch proves that the model keeps them apart. Trained
are all weights, the last layer, or adapters (LoRA).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.stage import Loss, Stage
from rlhf_lightning.arguments import SHARE_BELOW_1, check_arguments
from rlhf_lightning.batches import InstructionBatch, PromptBatch, micro_batches, name_rows, without_blanks
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.output_layer import cross_entropy_at
from rlhf_lightning.forward.packed import check_packing
from rlhf_lightning.generation.engine import TransformersEngine, respond, response_rows
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.host import alike, on_host
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.models.finetune import prepare_for_training
from rlhf_lightning.training import sum_over_ranks, synced

_PROBE_TOKENS = 16


class SFTModule(Stage):
    """Teaches a language model to answer as the demonstrations do.

    Expects batches like `InstructionBatch`. `docs/metrics.md` lists what is logged under `train/`, `val/` and `test/`.
    `predict` answers prompts (`PromptBatch`).

    Args:
        model_name_or_path: Hugging Face folder or hub id of the model to start from.
        label_smoothing: share of each target spread evenly over the vocabulary.
        dropout: keep the dropout that the model's config asks for; by default it is off.
        sampling: how `predict` and sample texts are generated.
        **options: those of `Stage`. An example is a row of the data: a packed row, if the data are packed.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model_name_or_path: str,
        *,
        label_smoothing: float = 0.0,
        dropout: bool = False,
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> None:
        sampling = from_config(Sampling, sampling)
        check_arguments(SFTModule, locals(), {"label_smoothing": SHARE_BELOW_1})
        super().__init__(model_name_or_path, **options)
        self.label_smoothing = label_smoothing
        self.dropout = dropout
        self.sampling = sampling
        self.val_loss = keep_dtype(MeanMetric())
        self._packing_is_safe = False

    def load_models(self) -> None:
        """Load the language model."""
        model = load_causal_lm(self.model_name_or_path, self.dropout, self.trust_remote_code)
        prepare_for_training(model, self.finetune, self.gradient_checkpointing)
        self.model = model

    @property
    def export_model(self) -> PreTrainedModel:
        """The language model."""
        return self.model

    def loss_sums(self, batch: InstructionBatch) -> tuple[Tensor, Tensor]:
        """Loss and negative log-likelihood, both summed over the target tokens, two scalars in nats.

        Args:
            batch: at least one example.

        Raises:
            UserError: the batch is packed, and the model would let its examples see each other.
        """
        if batch.position_ids is not None and not self._packing_is_safe:
            check_packing(self.model, batch.input_ids[batch.attention_mask][:_PROBE_TOKENS])
            self._packing_is_safe = True
        hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask, batch.position_ids)  # [B, T, D]
        # Token t is predicted from t - 1.
        targets, mask = batch.input_ids[:, 1:], alike(lambda mask: mask[:, 1:], batch.loss_mask)  # [B, T - 1]
        return cross_entropy_at(self.model, hidden[:, :-1], targets, mask, self.label_smoothing)

    def _losses(self, batch: InstructionBatch) -> Iterator[Loss]:
        loss, nll = self.loss_sums(batch)
        yield loss, {"loss": nll}  # logged as validation measures it

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        """One optimizer step on one batch; returns its loss, detached, for callbacks."""
        self.check_batch(batch, InstructionBatch, "InstructionDataModule")
        started, lr = time.perf_counter(), self.learning_rates()[0]
        # All that the layout of a micro-batch depends on, and all that this step reads until the losses are there.
        read = batch.attention_mask, batch.loss_mask, batch.row_ids, batch.position_ids
        on_host(*(field for field in read if field is not None))
        size, max_tokens = self.micro_batch_size, self.token_budget
        pieces = self.cut(lambda least: micro_batches(batch, size, max_tokens, least))
        num_targets = sum_over_ranks(self, batch.loss_mask.sum()).clamp(min=1)
        step = self.optimise(pieces, self._losses, num_targets, name_rows(batch.row_ids))
        metrics = {
            **step.means,
            "objective": step.loss,
            "perplexity": step.means["loss"].exp(),
            "lr": lr,
            "grad_norm": step.grad_norm,
            **self.throughput([piece.attention_mask for piece in pieces], started),
        }
        self.log_metrics(metrics, on_bar="loss", batch_size=len(batch.row_ids))
        return step.loss

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
        self.check_batch(batch, PromptBatch, "InstructionDataModule")
        engine, random = TransformersEngine(self.model, self.tokenizer), self.random_by_row(batch.row_ids, "predict")
        generation, texts = respond(engine, self.tokenizer, batch, self.sampling, generator=random, synced=synced(self))
        return without_blanks(response_rows(batch, generation, texts))
