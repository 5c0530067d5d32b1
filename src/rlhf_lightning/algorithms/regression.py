"""Regression on scores: a classifier learns what people rated responses, by one attribute or several.

After Wang et al. 2024 (HelpSteer2): the mean squared error of a linear head, one output for each attribute. It is the
sum over all scores that are there, divided by their number in the whole minibatch; one that nobody has given counts for
nothing. What comes of it is a plain classifier of as many labels, which rewards take with `reward_weights`. Left out: a
loss of classes, and calibration, since scores have a scale of their own.

Notation: B responses, T padded length, K attributes, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.reward_metrics import Correlations
from rlhf_lightning.algorithms.stage import Loss, Stage
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import RatedBatch, ScoringBatch, micro_batches, name_rows, without_blanks
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.host import on_host
from rlhf_lightning.models.calibration import CALIBRATION
from rlhf_lightning.models.classifiers import check_linear_head, draw_head, give_own_pad_token, load_classifier
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.models.finetune import prepare_for_training
from rlhf_lightning.models.folders import check_model_folder
from rlhf_lightning.models.heads import linear_in_float32
from rlhf_lightning.models.labels import labels_of
from rlhf_lightning.models.scalar_lm import has_reward_head
from rlhf_lightning.training import sum_over_ranks


class ScoreRegressionModule(Stage):
    """Trains a model of scores on rated responses.

    Expects batches like `RatedBatch`. `docs/metrics.md` lists what is logged under `train/`, `val/` and `test/`.
    `predict` scores sequences (`ScoringBatch`).

    Args:
        model_name_or_path: folder or hub id. A language model gets a fresh head; a model of these attributes keeps its.
        attributes: names of the scores, in the order of the data's: the labels of the model.
        dropout: keep the dropout that the model's config asks for; by default it is off.
        **options: those of `Stage`. An example is a response.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        attributes: list[str] | None = None,
        dropout: bool = False,
        **options: Any,
    ) -> None:
        check_arguments(ScoreRegressionModule, locals())
        super().__init__(model_name_or_path, **options)
        self.attributes = ["score"] if attributes is None else list(attributes)
        if not self.attributes or len({*self.attributes}) < len(self.attributes):
            raise UserError(f"attributes {self.attributes} must name one score at least, and each once")
        self.dropout = dropout
        self.mse = keep_dtype(MeanMetric())
        self.correlations = keep_dtype(Correlations())
        self._head_is_random = False

    def load_models(self) -> None:
        """Load the classifier; its pad token becomes one that is not the EOS.

        Raises:
            UserError: a classifier of other labels, or one whose head is not linear in hidden states.
        """
        name = check_model_folder(self.model_name_or_path)
        self._head_is_random = not has_reward_head(name)
        if not self._head_is_random and (labels := labels_of(name, fetch=True)) != self.attributes:
            raise UserError(
                f"'{name}' is a classifier of {', '.join(labels)}, not of {', '.join(self.attributes)}: set "
                "`attributes` to those, or begin with a language model"
            )
        model, _ = load_classifier(name, len(self.attributes), self.dropout, self.trust_remote_code)
        check_linear_head(name, model)
        if self._head_is_random:
            draw_head(model.score)
        give_own_pad_token(model, self.tokenizer)
        model.config.id2label = dict(enumerate(self.attributes))
        model.config.label2id = {label: i for i, label in enumerate(self.attributes)}
        model.config.problem_type = "regression"
        setattr(model.config, CALIBRATION, None)  # of a reward model that this one goes on from
        prepare_for_training(model, self.finetune, self.gradient_checkpointing)
        self.model = model

    @property
    def export_model(self) -> PreTrainedModel:
        """The classifier that plain transformers loads."""
        model: PreTrainedModel = self.model
        return model

    def on_fit_start(self) -> None:
        """Train the head, whether it is fresh or not.

        Raises:
            UserError: the data have other attributes.
        """
        super().on_fit_start()
        self._check_attributes()
        self._head_is_random = False

    def _check_attributes(self) -> None:
        theirs = getattr(self.datamodule, "attributes", None)
        if theirs and list(theirs) != self.attributes:
            raise UserError(
                f"model.attributes are {', '.join(self.attributes)}, data.attributes {', '.join(theirs)}: give both "
                "the same, in the same order"
            )

    def _check_rated(self, batch: RatedBatch) -> None:
        self.check_batch(batch, RatedBatch, "RatingDataModule")
        if batch.scores.shape[1] != len(self.attributes):  # one score would be held against all
            raise UserError(
                f"a batch has {batch.scores.shape[1]} scores of each response, model.attributes are "
                f"{', '.join(self.attributes)}: give as many, in the same order"
            )

    def predicted(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores at the last real token of each sequence, `[B, K]`, float32.

        Args:
            input_ids: `[B, T]`, int64.
            attention_mask: True for real tokens, `[B, T]`, bool, padded on the right.
        """
        hidden = hidden_states(self.model, input_ids, attention_mask)  # [B, T, D]
        last = attention_mask.sum(dim=1) - 1  # [B]
        rows = torch.arange(len(last), device=last.device)
        return linear_in_float32(self.model.score, hidden[rows, last])

    def _losses(self, batch: RatedBatch) -> Iterator[Loss]:
        errors = (self.predicted(batch.input_ids, batch.attention_mask) - batch.scores.float()).square()
        loss = (errors * batch.score_mask).sum()
        yield loss, {"mse": loss.detach()}

    def training_step(self, batch: RatedBatch, batch_idx: int) -> Tensor:
        """One optimizer step on one batch; returns its loss, detached, for callbacks."""
        self._check_rated(batch)
        started, lr = time.perf_counter(), self.learning_rates()[0]
        on_host(batch.attention_mask, batch.row_ids)
        size, max_tokens = self.micro_batch_size, self.token_budget
        pieces = self.cut(lambda least: micro_batches(batch, size, max_tokens, least))
        total = sum_over_ranks(self, batch.score_mask.sum()).clamp(min=1)
        step = self.optimise(pieces, self._losses, total, name_rows(batch.row_ids))
        metrics = {**step.means, "lr": lr, "grad_norm": step.grad_norm}
        metrics |= self.throughput([piece.attention_mask for piece in pieces], started)
        self.log_metrics(metrics, on_bar="mse", batch_size=len(batch.row_ids))
        return step.loss

    def _evaluate(self, batch: RatedBatch, stage: str) -> None:
        self._check_rated(batch)
        predicted, given = self.predicted(batch.input_ids, batch.attention_mask), batch.scores.float()
        self.mse.update((predicted - given).square(), batch.score_mask.float())
        self.correlations.update(predicted, given, batch.score_mask)
        self.log(f"{stage}/mse", self.mse, prog_bar=True, batch_size=len(batch.row_ids))

    def _begin(self) -> None:
        self.correlations.reset()
        if self.trainer.state.fn != TrainerFn.PREDICTING:  # what is only scored has no attributes
            self._check_attributes()
        if self.trainer.state.fn != TrainerFn.FITTING and self._head_is_random:
            raise UserError(
                f"'{self.model_name_or_path}' has no trained head; pass the export folder of a model of scores, or a "
                "checkpoint with --ckpt_path"
            )

    def _log_correlations(self, stage: str) -> None:
        found = self.correlations.compute().reshape(-1)  # one alone comes without a dimension
        for name, value in zip(self.attributes, found, strict=True):
            self.log(f"{stage}/pearson_{name}", value.to(self.device), sync_dist=True)

    def validation_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Mean over the whole validation set."""
        self._evaluate(batch, "val")

    def test_step(self, batch: RatedBatch, batch_idx: int) -> None:
        """Mean over the whole test set."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Begin anew; refuse to validate a head that nobody trained."""
        self._begin()

    def on_test_epoch_start(self) -> None:
        """Begin anew; refuse to test a head that nobody trained."""
        self._begin()

    def on_validation_epoch_end(self) -> None:
        """Correlations over the whole set."""
        self._log_correlations("val")

    def on_test_epoch_end(self) -> None:
        """Correlations over the whole set."""
        self._log_correlations("test")

    def on_predict_epoch_start(self) -> None:
        """Refuse to score by a head that nobody trained."""
        self._begin()

    def predict_step(self, batch: ScoringBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score sequences.

        Returns:
            For each sequence `row`, `prompt`, `response`, and `score_NAME` of each attribute.
        """
        self.check_batch(batch, ScoringBatch, "RatingDataModule")
        found = self.predicted(batch.input_ids, batch.attention_mask).tolist()
        names = [f"score_{name}" for name in self.attributes]
        texts = zip(batch.row_ids.tolist(), batch.prompts, batch.responses, found, strict=True)
        return without_blanks(
            [{"row": row, "prompt": p, "response": r, **dict(zip(names, s, strict=True))} for row, p, r, s in texts]
        )

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with a head that has been trained."""
        self._head_is_random = False
