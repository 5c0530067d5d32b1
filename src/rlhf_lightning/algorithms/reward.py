"""Reward modelling: a scalar head on a language model learns which of two responses people prefer.

The loss is the Bradley-Terry negative log-likelihood in three variants, or a hinge (see `functional.pairwise_loss`). On
the side there may be a pull of the scores towards 0, and the language-model loss of the chosen responses. At the end
the raw scores are measured on held-out chosen responses, or on answers of the policy, so that every user of the model
sees scores with mean 0 and standard deviation 1 there. A pair may ask for a margin, and a pair of weight 2 counts as
two pairs, in the loss and in every metric; rankings of more than two responses come as weighted pairs, or whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.pairs import (
    Pairs,
    PairStage,
    as_pairs,
    chosen_tokens,
    mean_metrics,
    pair_weights,
)
from rlhf_lightning.algorithms.policy_samples import PolicySamples
from rlhf_lightning.algorithms.reward_metrics import CalibrationError, HeldOutScores, moments
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.arguments import AT_LEAST_1, Range, check_arguments
from rlhf_lightning.batches import PreferenceBatch, RankingBatch, ScoringBatch, without_blanks
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import evaluation_mode
from rlhf_lightning.functional import (
    RewardLoss,
    RewardObjective,
    center_loss,
    disagreement,
    pair_correct,
    pairwise_loss,
    scores_at_end,
)
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.host import alike, places_of
from rlhf_lightning.lightning_compat import validation_loader
from rlhf_lightning.models.calibration import as_record
from rlhf_lightning.models.classifiers import give_own_pad_token
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.models.finetune import prepare_for_training
from rlhf_lightning.models.heads import new_ensemble
from rlhf_lightning.models.language_head import LanguageHead, load_language_head
from rlhf_lightning.models.scalar_lm import (
    Calibration,
    ScalarLM,
    has_reward_head,
    load_reward_model,
    new_scalar_lm,
)
from rlhf_lightning.training.optim import parameter_groups

_PROBE_TOKENS = 64


class RewardModule(PairStage):
    """Trains a reward model on pairs.

    Expects batches like `PreferenceBatch` or `RankingBatch`. `docs/metrics.md` lists what is logged under `train/`,
    `val/` and `test/`. `predict` scores sequences (`ScoringBatch`).

    Args:
        model_name_or_path: Hugging Face folder or hub id. A language model, usually the export of the SFT stage, gets a
            fresh scalar head; a reward model keeps the head it has.
        loss: which scores of a pair are compared: `last_token`, `average` or `per_sample`.
        objective: what the lead of the chosen score costs: `logistic` (Bradley-Terry), or `hinge`, for which a lead of
            1 is enough.
        label_smoothing: share of pairs that may be the wrong way round, for `logistic` (Mitchell 2023).
        center_coef: weight of the squared sum of a pair's scores at the last token, which draws them towards 0; 0.01 is
            usual (Eisenstein et al. 2023).
        lm_coef: weight of the chosen responses' negative log-likelihood per token, by the output layer of the language
            model that training starts from (Zheng et al. 2023, with 1). The layer is not exported.
        num_heads: heads on one backbone, each with the loss of its own scores; they start apart, and where they go on
            to differ, none knows (Coste et al. 2024 take whole models). The score is their mean; PPO can be told to be
            careful by them (`reward_combination`).
        calibration_samples: calibrate by this many answers of the policy, not by chosen responses; 256 is usual.
            One is drawn to each of as many held-out prompts before the first step (Ziegler et al. 2019, section 2); 0
            to calibrate by held-out chosen responses.
        calibration_policy: folder or hub id of the language model whose answers they are; None for
            `model_name_or_path`.
        sampling: how they are drawn.
        **options: those of `PairStage` and `Stage`. An example is a pair.
    """

    LOGGED = ("accuracy", "chosen_score", "rejected_score", "margin")
    scalar: ScalarLM
    language_head: LanguageHead | None

    def __init__(
        self,
        model_name_or_path: str,
        *,
        loss: RewardLoss = "last_token",
        objective: RewardObjective = "logistic",
        label_smoothing: float = 0.0,
        center_coef: float = 0.0,
        lm_coef: float = 0.0,
        num_heads: int = 1,
        calibration_samples: int = 0,
        calibration_policy: str | None = None,
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> None:
        sampling = from_config(Sampling, sampling)
        ranges = {"label_smoothing": Range(at_least=0, below=0.5), "num_heads": AT_LEAST_1}
        check_arguments(RewardModule, locals(), ranges)
        super().__init__(model_name_or_path, **options)
        if label_smoothing and objective != "logistic":
            raise UserError(f"label_smoothing is for logistic, and objective is {objective}: set it to 0")
        if calibration_policy is not None and not calibration_samples:
            raise UserError("calibration_policy answers calibration_samples prompts: set that too, 256 is usual")
        self.loss: RewardLoss = loss
        self.objective: RewardObjective = objective
        self.label_smoothing = label_smoothing
        self.center_coef = center_coef
        self.lm_coef = lm_coef
        self.num_heads = num_heads
        self.calibration_samples = calibration_samples
        self.calibration_policy = calibration_policy
        self.sampling = sampling
        self._samples: PolicySamples | None = None
        switches = {"center_loss": center_coef, "nll": lm_coef, "head_std": num_heads > 1}
        self.eval_means.update({**mean_metrics(*(name for name, is_on in switches.items() if is_on))})
        self.language_head = None
        self._head_is_random = False
        self._calibrated_at: int | None = None
        self.held_out_scores = keep_dtype(HeldOutScores())
        self.calibration_error = keep_dtype(CalibrationError())

    def load_models(self) -> None:
        """Load the reward model; its pad token becomes one that is not the EOS."""
        self._head_is_random = not has_reward_head(self.model_name_or_path)
        head = load_language_head(self.model_name_or_path, self.trust_remote_code) if self.lm_coef else None
        load = new_scalar_lm if self._head_is_random else load_reward_model
        scalar = load(self.model_name_or_path, dropout=self.dropout, trust_remote_code=self.trust_remote_code)
        give_own_pad_token(scalar.model, self.tokenizer)
        prepare_for_training(scalar.model, self.finetune, self.gradient_checkpointing)
        if head is not None:
            head.stand_beside(scalar.model, self.finetune)
        self._settle_heads(scalar)
        self.scalar, self.language_head = scalar, head

    def _settle_heads(self, scalar: ScalarLM) -> None:
        """Let the model have as many heads as are asked for, those of its folder, or fresh ones around its own."""
        if self.num_heads == 1:
            scalar.ensemble = None
        elif scalar.ensemble is None:
            scalar.ensemble = new_ensemble(scalar.model.score, self.num_heads)
        elif scalar.ensemble.num_heads != self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}, and '{self.model_name_or_path}' has {scalar.ensemble.num_heads}: "
                "go on with as many, or with 1, their mean"
            )
        else:
            scalar.ensemble.requires_grad_(True)

    @property
    def export_model(self) -> PreTrainedModel:
        """The classifier that plain transformers loads."""
        model: PreTrainedModel = self.scalar.model
        return model

    @property
    def parents(self) -> dict[str, str]:
        """The model, and the policy whose answers calibrate it, if that is another."""
        return super().parents | ({"policy": self.calibration_policy} if self.calibration_policy else {})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The model, its heads, and an output layer beside it that is trained."""
        parts = [part for part in (self.scalar, self.language_head) if part is not None]
        return parameter_groups(nn.ModuleList(parts))

    def setup(self, stage: str) -> None:
        """Load the policy whose answers the model will be calibrated by."""
        super().setup(stage)
        if stage == "fit" and self.calibration_samples:
            self._samples = PolicySamples(self.calibration_policy, self.calibration_samples, self.sampling)
            self._samples.load(self)

    def on_fit_start(self) -> None:
        """Train the head, whether it is fresh or not."""
        super().on_fit_start()
        self._head_is_random = False

    def on_train_start(self) -> None:
        """Let the policy answer, and log how the fresh head scores that; a resumed run has logged it."""
        if self._samples is None:
            return
        self._samples.draw(self, validation_loader(self.trainer))
        if not self.trainer.global_step:
            mean, std = moments(self._samples.scores(self, self.scalar))
            for logger in self.trainer.loggers:  # what is logged by `self.log` waits for the end of the epoch
                logger.log_metrics({"val/policy_score": mean, "val/policy_score_std": std}, step=0)

    def pair_scores(self, pairs: Pairs, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw per-token scores of chosen and rejected responses, two tensors `[B, T]`, float32, in one forward pass.

        Args:
            pairs: B of them.
            hidden: their last hidden states, from `pairs.read`, if they are there.
        """
        hidden = pairs.read(self.export_model) if hidden is None else hidden
        chosen, rejected = pairs.spread(self.scalar.head(hidden)).unbind(dim=1)
        return chosen, rejected

    def pair_metrics(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair, `[B]`, and what else is logged of it, each `[B]`, from the scores at the last token.

        Args:
            pairs: B of them.
        """
        batch = pairs.batch
        hidden = pairs.read(self.export_model)
        losses, (chosen, rejected), logged = self._judged(pairs, hidden)
        ends = scores_at_end(chosen, batch.chosen_mask), scores_at_end(rejected, batch.rejected_mask)
        chosen_score, rejected_score = (score.detach() for score in ends)
        margin = chosen_score - rejected_score
        logged |= {
            "accuracy": pair_correct(margin),
            "chosen_score": chosen_score,
            "rejected_score": rejected_score,
            "margin": margin,
        }
        if self.center_coef:
            logged["center_loss"] = center_loss(*ends)
        if self.language_head is not None:
            logged["nll"] = self._chosen_nll(self.language_head, pairs, hidden)
        return losses, logged

    def _judged(self, pairs: Pairs, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Losses `[B]`, per-token scores of both sides, each `[B, T]`, and how far several heads differ.

        Each head has a loss of its own; the scores are their mean.
        """
        if self.num_heads == 1:
            scores = self.pair_scores(pairs, hidden)
            return self._pair_losses(pairs.batch, *scores), scores, {}
        of_heads = pairs.spread(self.scalar.heads(hidden))  # [B, 2, T, K]
        losses = [self._pair_losses(pairs.batch, *head.unbind(dim=1)) for head in of_heads.unbind(dim=3)]
        chosen, rejected = of_heads.mean(dim=3).unbind(dim=1)
        ends = [scores_at_end(head, pairs.batch.chosen_mask) for head in of_heads[:, 0].detach().unbind(dim=2)]
        logged = {"head_std": disagreement(torch.stack(ends, dim=1))}
        return torch.stack(losses).mean(dim=0), (chosen, rejected), logged

    def _pair_losses(self, batch: PreferenceBatch, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Loss of each pair by the scores of one head, `[B, T]` both: `[B]`."""
        return pairwise_loss(
            chosen,
            rejected,
            batch.chosen_ids,
            batch.rejected_ids,
            batch.chosen_mask,
            batch.rejected_mask,
            self.loss,
            batch.margins,
            self.objective,
            self.label_smoothing,
        )

    def _chosen_nll(self, head: LanguageHead, pairs: Pairs, hidden: Tensor) -> Tensor:
        """Negative log-likelihood of each chosen response per token, in nats, `[B]`, from the scores' hidden states."""
        # Token t is predicted from t - 1, [C, T - 1].
        chosen_ids, answered = pairs.chosen_responses()  # [C, T]
        counted = alike(lambda mask: mask[:, 1:], answered)
        rows, columns = places_of(counted).rows, places_of(counted).columns
        ids = chosen_ids[:, 1:][rows, columns]  # [N]
        logprobs = head(pairs.of_chosen(hidden, rows, columns), ids)
        spread = torch.zeros(counted.shape, dtype=logprobs.dtype, device=ids.device)
        nll = -spread.index_put((rows, columns), logprobs).sum(dim=1) / counted.sum(dim=1).clamp(min=1)  # [C]
        return pairs.of_chosen_pairs(nll)

    def losses(self, pairs: Pairs) -> Iterator[Loss]:
        """As for all pairs, and what is learnt on the side; the likelihood is a mean over all tokens in the step."""
        if not self.center_coef and not self.lm_coef:
            yield from super().losses(pairs)
            return
        losses, logged = self.pair_metrics(pairs)
        weights = pair_weights(pairs.batch)
        loss = (losses * weights).sum()
        objective = loss
        if self.center_coef:
            objective = objective + self.center_coef * (logged["center_loss"] * weights).sum()
        if self.lm_coef:
            nll = (logged["nll"] * chosen_tokens(pairs.batch)).sum()
            objective = objective + self.lm_coef * nll * self.pairs_per_token
        sums = {name: (value.detach() * weights).sum() for name, value in logged.items()}
        yield objective, {"loss": loss.detach(), **sums}

    def evaluate(self, batch: PreferenceBatch | RankingBatch, task: str) -> dict[str, Tensor]:
        """Also keep the chosen scores, from which the model is calibrated, and log the calibration error."""
        logged, pairs = super().evaluate(batch, task), as_pairs(batch)
        self.calibration_error.update(logged["margin"], pair_weights(pairs))
        error: Any = self.calibration_error
        self.log(f"{task}/calibration_error", error, batch_size=len(batch.row_ids))
        self.held_out_scores.update(logged["chosen_score"], pairs.row_ids >= 0)
        return logged

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

    def on_validation_epoch_end(self) -> None:
        """Calibrate by this validation's scores, so that exports beside checkpoints are calibrated too."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        mean, std = self._calibrate()
        if self._samples is not None:
            self.log_dict({"val/policy_score": mean, "val/policy_score_std": std}, sync_dist=True)

    def test_step(self, batch: PreferenceBatch | RankingBatch, batch_idx: int) -> None:
        """Means over the whole test set; refuse to test a head that nobody trained."""
        self._refuse_random_head()
        super().test_step(batch, batch_idx)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Calibrate the final weights, unless the last validation has just done so."""
        if self._calibrated_at == self.trainer.global_step:
            return
        loader = validation_loader(self.trainer)
        if not loader:
            rank_zero_warn("no validation data: the reward model's scores stay uncalibrated (mean 0, std 1)")
            return
        self.held_out_scores.reset()
        with evaluation_mode(self.export_model), self.trainer.precision_plugin.forward_context():
            for batch in loader if self._samples is None else ():
                on_device = self.trainer.strategy.batch_to_device(batch)
                self.held_out_scores.update(*self._chosen_scores(on_device))
            self._calibrate()

    def _chosen_scores(self, batch: PreferenceBatch | RankingBatch) -> tuple[Tensor, Tensor]:
        """Raw score of the chosen side of each pair, and whether it is none of a blank, both `[B]`."""
        if not isinstance(batch, RankingBatch):
            chosen = self.scalar.raw(batch.chosen_ids, batch.chosen_mask)
            return scores_at_end(chosen, batch.chosen_mask), batch.row_ids >= 0
        pairs = self.laid_out(batch)
        return scores_at_end(self.pair_scores(pairs)[0], pairs.batch.chosen_mask), pairs.batch.row_ids >= 0

    def _calibrate(self) -> tuple[float, float]:
        """Measure the policy's samples, or the chosen scores that were collected; return their mean and deviation.

        One sequence is remembered as a probe.
        """
        samples = self._samples
        mean, std = moments(self.held_out_scores.compute() if samples is None else samples.scores(self, self.scalar))
        loader = self.trainer.val_dataloaders
        example = as_pairs(self.trainer.strategy.batch_to_device(next(iter(loader))))  # type: ignore[arg-type]
        ids = example.chosen_ids[:1, : int(example.chosen_mask[0].sum())][:, :_PROBE_TOKENS]
        mask = torch.ones_like(ids, dtype=torch.bool)
        probe_score = float(scores_at_end(self.scalar.raw(ids, mask), mask))
        self.scalar.calibration = Calibration(
            mean, std or 1.0, ids[0].tolist(), probe_score, "chosen" if samples is None else "samples"
        )
        self._calibrated_at = self.trainer.global_step
        return mean, std

    def predict_step(self, batch: ScoringBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Score sequences.

        Returns:
            For each sequence `row`, `role` (the column its response came from), `prompt`, `response`, `score`
            (calibrated) and `raw_score`.
        """
        self._refuse_random_head()
        self.check_batch(batch, ScoringBatch, "PreferenceDataModule")
        raw = scores_at_end(self.scalar.raw(batch.input_ids, batch.attention_mask), batch.attention_mask)
        columns = (batch.row_ids, batch.roles, batch.prompts, batch.responses, self.scalar.calibrate(raw), raw)
        names = ("row", "role", "prompt", "response", "score", "raw_score")
        plain = [column.tolist() if isinstance(column, Tensor) else column for column in columns]
        return without_blanks([dict(zip(names, row, strict=True)) for row in zip(*plain, strict=True)])

    def run_state(self) -> dict[str, Any]:
        """The calibration, and the step that it was made at."""
        return {"calibration": as_record(self.scalar.calibration), "calibrated_at": self._calibrated_at}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with the calibration that the checkpoint holds; its head has been trained."""
        self.scalar.calibration = Calibration(**state["calibration"])
        self._calibrated_at = state["calibrated_at"]
        self._head_is_random = False
