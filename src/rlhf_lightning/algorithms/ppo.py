"""PPO against a reward, with a KL penalty to the SFT model and a value model.

One batch of the loader is one iteration: answer the prompts (rollout), turn scores and the KL penalty into rewards per
token and those into advantages (GAE), then improve policy and value on minibatches of that experience
(`OnlineStage.training_step`). Equations and their sources: docs/ppo.md.

Left out, on purpose: an entropy bonus (Zheng et al. 2023 advise against it).

Notation: B batch, R padded response length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.online.experience import Experience, Measurements
from rlhf_lightning.algorithms.online.losses import clipped_policy_loss
from rlhf_lightning.algorithms.online.models import (
    ModelSource,
    TrunkValue,
    ValueTrunk,
    logprobs_and_values,
)
from rlhf_lightning.algorithms.online.pretraining import BesideText, PretrainingData, pretraining_loss
from rlhf_lightning.algorithms.online.rollout import explained_variance
from rlhf_lightning.algorithms.online.settings import KLPenalty, Objective
from rlhf_lightning.algorithms.online.stage import OnlineStage
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import InstructionBatch, PromptBatch, micro_batches
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional import (
    gae,
    kl_estimate,
    kl_shaped_rewards,
    length_adaptive_lambda,
    masked_sum,
    masked_whiten,
    ppo_value_loss,
)
from rlhf_lightning.functional.masked import Reduce, identity
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.scalar_lm import ScalarLM, response_values
from rlhf_lightning.training import check_parts_apart, sum_over_ranks
from rlhf_lightning.training.optim import PPO_ADAMW, Schedule, parameter_groups


class PPOModule(OnlineStage):
    """Improves a policy by PPO.

    Expects batches like `PromptBatch`, one per iteration. `docs/metrics.md` lists what is logged under `train/`, `val/`
    and `test/`.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        reward: folder or hub id of a reward model (its tokenizer and chat template may differ from the policy's), or
            the import path of a function `(prompts: list[str], responses: list[str]) -> list[float]`, looked for in
            the working folder too; from Python also the function.
        value_name_or_path: what the value model starts from. None takes the reward model, or, where that is a function
            or reads other tokens, the policy's folder with a head that says 0.
        value_trunk: `own` for a value model of its own, `policy` for a second head on the policy's hidden states, which
            halves what is trained.
        optimizer: the optimizer of policy and value model; its learning rate is the policy's.
        value_lr: learning rate of the value model; None for the policy's.
        value_warmup_iterations: first iterations, in which only the value model learns. They count in the schedules of
            the learning rates (Zheng et al. 2023, PPO-max; Yuan et al. 2025, VAPO).
        value_gradient_clip_val: norm the value model's gradient is clipped to by itself. `gradient_clip_val` is then
            for the policy alone; None clips both together.
        lr_schedule: course of the learning rates after the warm-up, in optimizer steps.
        warmup_steps: optimizer steps of linear warm-up. A number below 1 is a share of all steps.
        objective: clipping, discount and weights of the losses.
        pretraining: data that the policy goes on learning meanwhile. A batch in each optimizer step, of an
            `InstructionDataModule` of the policy's tokens, often with `loss_on: all`; in Ouyang et al. 2022 (PPO-ptx)
            with 8 examples for each response of a minibatch. None for none.
        pretraining_coef: weight of their mean negative log-likelihood per token. 27.8 in Ouyang et al. 2022.
        **options: those of `OnlineStage` and `Stage`; `finetune` is for policy and value model, and with `lora` all
            models on one base share it.
    """

    value: ScalarLM | TrunkValue
    _pretraining_scale: Tensor

    def __init__(
        self,
        model_name_or_path: str,
        reward: str | RewardFunction,
        *,
        value_name_or_path: str | None = None,
        value_trunk: ValueTrunk = "own",
        optimizer: OptimizerCallable = PPO_ADAMW,
        value_lr: float | None = None,
        value_warmup_iterations: int = 0,
        value_gradient_clip_val: float | None = None,
        lr_schedule: Schedule = "linear",
        warmup_steps: float = 0,
        objective: Objective = Objective(),
        pretraining: pl.LightningDataModule | None = None,
        pretraining_coef: float = 27.8,
        **options: Any,
    ) -> None:
        objective = from_config(Objective, objective)
        check_arguments(PPOModule, locals())
        if isinstance(pretraining, str):  # what a checkpoint holds of it
            raise UserError(f"pretraining was '{pretraining}': pass pretraining to load_from_checkpoint")
        super().__init__(
            model_name_or_path,
            reward,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
            **options,
        )
        self.value_name_or_path = value_name_or_path
        self.value_trunk: ValueTrunk = value_trunk
        self.value_lr = value_lr
        self.value_warmup_iterations = value_warmup_iterations
        self.value_gradient_clip_val = value_gradient_clip_val
        self.objective = objective
        self._explained_at_first: float | None = None
        self.pretraining = None if pretraining is None else PretrainingData(pretraining)
        self.pretraining_coef = pretraining_coef
        self.model_source.check()

    @property
    def model_source(self) -> ModelSource:
        """Where policy, reference, reward and value model come from."""
        return replace(super().model_source, value=self.value_name_or_path, value_trunk=self.value_trunk)

    @property
    def parents(self) -> dict[str, str]:
        """Those of every online algorithm, and the value model, if one is named."""
        return super().parents | ({"value": self.value_name_or_path} if self.value_name_or_path else {})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the policy, then those of the value model with its own learning rate."""
        value_options = {} if self.value_lr is None else {"lr": self.value_lr}
        return parameter_groups(self.policy) + parameter_groups(self.value, **value_options)

    @property
    def warms_up(self) -> bool:
        """Whether only the value model learns in this iteration."""
        return self.iteration < self.value_warmup_iterations

    @property
    def resting_parts(self) -> tuple[str, ...]:
        """The policy, while the value model warms up."""
        return ("policy",) if self.warms_up else ()

    @property
    def part_clip_vals(self) -> dict[str, float | None]:
        """Of policy and value model, if they are clipped apart."""
        if self.value_gradient_clip_val is None:
            return {}
        return {"policy": self.gradient_clip_val, "value": self.value_gradient_clip_val}

    def on_fit_start(self) -> None:
        """Check that the strategy can treat policy and value model each by itself, where that is asked for."""
        super().on_fit_start()
        for name in ("value_warmup_iterations", "value_gradient_clip_val"):
            if getattr(self, name):
                check_parts_apart(self.trainer, name)
        if self.pretraining is not None:
            self.pretraining.begin(self)

    def experience_of(
        self, prompts: PromptBatch, generation: Generation, measured: Measurements, scores: Tensor
    ) -> Experience:
        """Rewards per token, and their generalised advantages over the values."""
        return build_experience(
            prompts,
            generation,
            measured,
            scores,
            kl=self.kl,
            kl_coef=self.kl_controller.coef,
            objective=self.objective,
            reduce=self.reduce,
        )

    def experience_metrics(self, experience: Experience) -> dict[str, Tensor]:
        """As for every algorithm, and how well the values foretold what came."""
        explained = explained_variance(experience, self.reduce, self.objective.gamma)
        if self.value_warmup_iterations:
            self._tell_of_warm_up(explained)
        return {**super().experience_metrics(experience), "explained_variance": explained}

    def _tell_of_warm_up(self, explained: Tensor) -> None:
        if self.iteration == 0:
            self._explained_at_first = float(explained)
        if self.iteration == self.value_warmup_iterations and self._explained_at_first is not None:
            rank_zero_info(
                f"the value model has warmed up for {self.iteration} iterations: the variance that it explains went "
                f"from {self._explained_at_first:.2f} to {float(explained):.2f}"
            )

    def pieces(self, minibatch: Experience) -> list[Any]:
        """Those of the responses, with those of a batch to go on learning shared out among them, if there is one."""
        pieces = super().pieces(minibatch)
        if self.pretraining is None or self.warms_up:
            return pieces
        batch: InstructionBatch = self.trainer.strategy.batch_to_device(self.pretraining.next())
        self.check_batch(batch, InstructionBatch, "InstructionDataModule")
        counts = torch.stack([minibatch.response_mask.sum(), batch.loss_mask.sum()])
        responses, targets = sum_over_ranks(self, counts)
        self._pretraining_scale = responses / targets.clamp(min=1)
        size, budget = self.piece_size, self.token_budget
        texts = self.cut(lambda least: micro_batches(batch, size, budget, least))
        return [BesideText(piece, texts[number :: len(pieces)]) for number, piece in enumerate(pieces)]

    def losses(self, batch: Any) -> Iterator[Loss]:
        """Policy loss and weighted value loss, and those of the text beside them."""
        if not isinstance(batch, BesideText):
            yield from self._ppo_losses(batch)
            return
        for text in batch.texts:
            yield pretraining_loss(self.policy, text, self._pretraining_scale, self.pretraining_coef)
        yield from self._ppo_losses(batch.experience)

    def _ppo_losses(self, batch: Experience) -> Iterator[Loss]:
        return ppo_losses(
            self.policy,
            self.value,
            batch,
            self.objective,
            self.sampling.temperature,
            on_policy=self.on_policy,
            with_entropy=self.measures_late,
            policy_rests=self.warms_up,
        )

    def to_learn(self, minibatch: Experience) -> Tensor:
        """Advantages, and errors of the values by their weight, `[B, R]`."""
        errors = (minibatch.returns - minibatch.values).abs()
        return self.objective.value_coef * errors + (0 if self.warms_up else minibatch.advantages.abs())

    def run_state(self) -> dict[str, Any]:
        """As for every algorithm, what is to be told of the value model's warm-up, and the place in further data."""
        state = {**super().run_state(), "explained_at_first": self._explained_at_first}
        return state if self.pretraining is None else {**state, "pretraining": self.pretraining.state()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with what `run_state` has said."""
        super().load_run_state(state)
        self._explained_at_first = state.get("explained_at_first")
        if self.pretraining is not None and "pretraining" in state:
            self.pretraining.load(state["pretraining"])


def build_experience(
    prompts: PromptBatch,
    generation: Generation,
    measured: Measurements,
    shaped_scores: Tensor,
    kl: KLPenalty,
    kl_coef: float,
    objective: Objective,
    reduce: Reduce = identity,
) -> Experience:
    """From scores and log-probabilities to rewards, advantages and returns.

    Args:
        prompts: the prompts, B of them.
        generation: their responses.
        measured: what the models say of them.
        shaped_scores: scores as they enter the rewards, `[B]`.
        kl: which estimator is the penalty.
        kl_coef: the weight of the penalty now.
        objective: discounts and whitening.
        reduce: sums a tensor over all ranks.
    """
    mask = generation.response_mask  # [B, R]
    penalty = kl_estimate(measured.logprobs, measured.ref_logprobs, kl.estimator)
    rewards = kl_shaped_rewards(shaped_scores, penalty, mask, kl_coef, measured.dense)
    if objective.whiten_rewards != "no":
        rewards = masked_whiten(rewards, mask, reduce=reduce, shift=objective.whiten_rewards == "shift")
    alpha, gae_lambda = objective.gae_length_alpha, objective.gae_lambda
    advantages, returns = gae(
        rewards,
        measured.values,
        mask,
        objective.gamma,
        gae_lambda if alpha is None else length_adaptive_lambda(mask, alpha),
        gae_lambda if objective.value_gae_lambda is None and alpha is not None else objective.value_gae_lambda,
    )
    if objective.whiten_advantages:
        advantages = masked_whiten(advantages, mask, reduce=reduce)
    return Experience.of(prompts, generation, measured, rewards=rewards, advantages=advantages, returns=returns)


def ppo_losses(
    policy: PreTrainedModel,
    value: ScalarLM | TrunkValue,
    batch: Experience,
    objective: Objective,
    temperature: float,
    on_policy: bool = False,
    with_entropy: bool = False,
    policy_rests: bool = False,
) -> Iterator[Loss]:
    """Policy loss and weighted value loss; computed when asked for, in one piece where both share the trunk.

    A backward pass each, so that only one model's activations are alive at a time.

    Args:
        policy: the policy.
        value: the value model, or a head on the policy's hidden states.
        batch: responses of the old policy.
        objective: clipping and weights.
        temperature: the sampling temperature.
        on_policy: the policy is still the one that answered, so its own log-probabilities, detached, are the old ones.
            Then `ratio` and `approx_kl` compare them with what was said of the responses in the rollout.
        with_entropy: log the entropy of the predictions, too, which the rollout has not measured.
        policy_rests: only the value model learns; of the policy is logged what it would have been.

    Yields:
        A loss summed over response tokens, a scalar, and sums to be logged.
    """
    ids, kept, mask = batch.sequences, batch.sequence_mask, batch.response_mask  # [B, P + R], [B, P + R], [B, R]
    trunk = value if isinstance(value, TrunkValue) else None
    logprobs, entropies, values = logprobs_and_values(
        policy,
        trunk,
        ids,
        kept,
        mask,
        temperature,
        with_entropy=with_entropy,
        rows=batch.shared,
        policy_rests=policy_rests,
    )
    clip = objective.clip_range, objective.clip_range_high, objective.dual_clip
    loss, logged = clipped_policy_loss(logprobs, batch, *clip, on_policy=on_policy)
    if with_entropy:
        logged["entropy"] = masked_sum(entropies.detach(), mask)
    if policy_rests:
        loss = torch.zeros_like(loss)
    elif not isinstance(value, TrunkValue):
        yield loss, logged
        logged = {}
    if not isinstance(value, TrunkValue):
        del loss, logprobs, entropies  # the graph is gone before the next one is built
        values = response_values(value, ids, kept, mask, batch.shared)
        loss = torch.zeros((), device=values.device)
    value_loss, stats = ppo_value_loss(values, batch.values, batch.returns, mask, objective.value_clip_range)
    logged |= {"value_loss": value_loss.detach(), "value_clip_fraction": stats["clip_fraction"]}
    yield loss + objective.value_coef * value_loss, logged
