"""What RLOO and GRPO share: responses to one prompt judge one another, and there is no value model.

Notation: B batch, R padded response length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.online.experience import Experience, Measurements
from rlhf_lightning.algorithms.online.losses import clipped_policy_loss
from rlhf_lightning.algorithms.online.settings import KLPenalty, ScoreShaping
from rlhf_lightning.algorithms.online.stage import OnlineStage
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.arguments import POSITIVE, check_arguments
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.functional import groups_without_signal, kl_estimate, masked_sum
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.training import sum_over_ranks
from rlhf_lightning.training.optim import PPO_ADAMW, Schedule

SCORE = ScoreShaping(scaling=False, clip=None)
"""What happens to scores: nothing, since the responses to a prompt judge one another."""

KLPlace = Literal["reward", "loss"]


class GroupStage(OnlineStage):
    """Learns from several responses to each prompt.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        reward: folder or hub id of a reward model, or the import path of a function
            `(prompts: list[str], responses: list[str]) -> list[float]`; from Python also the function.
        rollout_batch_size: prompts answered per iteration.
        samples_per_prompt: responses drawn for each of them, at least 2.
        minibatch_size: responses per optimizer step.
        ppo_epochs: passes over each rollout.
        kl: the penalty that holds the policy near the reference.
        kl_in: `reward` subtracts it from the score of a response, summed over its tokens; `loss` adds it to the loss of
            each token, where it has a gradient of its own.
        clip_range: how far the probability ratio may move from 1.
        clip_range_high: how far upwards, where that differs (0.28 in Yu et al. 2025, DAPO); None for `clip_range`.
        score: what happens to scores before they become rewards.
        optimizer: the optimizer.
        lr_schedule: course of the learning rate after the warm-up, in optimizer steps.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        **options: those of `OnlineStage` and `Stage`.
    """

    def __init__(
        self,
        model_name_or_path: str,
        reward: str | RewardFunction,
        *,
        rollout_batch_size: int = 16,
        samples_per_prompt: int = 4,
        minibatch_size: int = 64,
        ppo_epochs: int = 1,
        kl: KLPenalty = KLPenalty(),
        kl_in: KLPlace = "reward",
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        score: ScoreShaping = SCORE,
        optimizer: OptimizerCallable = PPO_ADAMW,
        lr_schedule: Schedule = "linear",
        warmup_steps: float = 0,
        **options: Any,
    ) -> None:
        kl, score = from_config(KLPenalty, kl), from_config(ScoreShaping, score, SCORE)
        if kl_in == "loss" and kl.estimator == "k1" and kl.coef > 0:
            raise UserError(
                "kl_in: loss needs kl.estimator k2 or k3; the gradient of k1 is 0 on average, it holds nothing"
            )
        own = {"kl_in": kl_in, "clip_range": clip_range, "clip_range_high": clip_range_high}
        check_arguments(GroupStage, own, {"clip_range": POSITIVE, "clip_range_high": POSITIVE})
        if samples_per_prompt == 1:
            raise UserError("samples_per_prompt (1) must be at least 2: the responses to a prompt judge one another")
        super().__init__(
            model_name_or_path,
            reward,
            rollout_batch_size=rollout_batch_size,
            samples_per_prompt=samples_per_prompt,
            minibatch_size=minibatch_size,
            ppo_epochs=ppo_epochs,
            kl=kl,
            score=score,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
            **options,
        )
        self.kl_in: KLPlace = kl_in
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.model_source.check()

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """One advantage for each response, from the rewards of its group, both `[B]`.

        Args:
            rewards: those of one prompt stand next to one another.
        """
        raise NotImplementedError

    def experience_of(
        self, prompts: PromptBatch, generation: Generation, measured: Measurements, scores: Tensor
    ) -> Experience:
        """Every token of a response gets the advantage of the response."""
        mask, rewards = generation.response_mask, scores  # [B, R], [B]
        if self.kl_in == "reward":
            kl = kl_estimate(measured.logprobs, measured.ref_logprobs, self.kl.estimator)
            rewards = rewards - self.kl_controller.coef * torch.where(mask, kl, 0).sum(dim=1)
        advantages = self.group_advantages(rewards).unsqueeze(1) * mask
        ends = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)
        per_token = rewards.unsqueeze(1) * (mask & ends)
        return Experience.of(prompts, generation, measured, per_token, advantages, returns=torch.zeros_like(advantages))

    def experience_metrics(self, experience: Experience) -> dict[str, Tensor]:
        """As for every algorithm, and the share of prompts whose responses all got one score, as `score` shapes it."""
        scores = self.shaped_scores(experience.scores, experience.ended, experience.response_mask)
        silent = groups_without_signal(scores, self.samples_per_prompt)
        groups = torch.full_like(silent, len(experience.scores) // self.samples_per_prompt)
        silent, groups = sum_over_ranks(self, torch.stack([silent, groups]))
        return {**super().experience_metrics(experience), "no_signal": silent.float() / groups.float()}

    def token_weights(self, batch: Experience) -> Tensor | None:
        """Of each token in the loss, `[B, R]`; None for 1.

        Args:
            batch: a micro-batch.
        """
        return None

    def policy_loss(self, logprobs: Tensor, batch: Experience) -> Loss:
        """The loss without the KL penalty.

        Args:
            logprobs: under the policy being trained, `[B, R]`.
            batch: a micro-batch.
        """
        weights, low, high = self.token_weights(batch), self.clip_range, self.clip_range_high
        return clipped_policy_loss(logprobs, batch, low, high, on_policy=self.on_policy, weights=weights)

    def losses(self, batch: Experience) -> Iterator[Loss]:
        """Policy loss, and the KL penalty if that is in the loss."""
        ids, kept, mask = batch.sequences, batch.sequence_mask, batch.response_mask  # [B, P + R], [B, P + R], [B, R]
        with_entropy = self.measures_late  # else the rollout has measured it
        logprobs, entropies = response_logprobs(
            self.policy, ids, kept, mask, self.sampling.temperature, with_entropy, batch.shared
        )
        loss, logged = self.policy_loss(logprobs, batch)
        if with_entropy:
            logged["entropy"] = masked_sum(entropies.detach(), mask)
        if self.kl_in == "loss":
            weights = self.token_weights(batch)
            new, reference = (torch.where(mask, some, 0) for some in (logprobs, batch.ref_logprobs))
            kl = kl_estimate(new, reference, self.kl.estimator)
            loss = loss + self.kl_controller.coef * masked_sum(kl if weights is None else kl * weights, mask)
        yield loss, logged
