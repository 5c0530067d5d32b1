"""GRPO, group-relative policy optimisation, and its kin (Shao et al. 2024; Yu et al. 2025; Liu et al. 2025).

Each prompt is answered several times. A response's advantage is its reward minus the mean of its group's, divided by
their standard deviation if asked for. Every token has a probability ratio of its own, clipped as in PPO. There is no
value model. Left out: process rewards, and DAPO's drawing of new prompts in place of groups without signal.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.online.experience import Experience
from rlhf_lightning.algorithms.online.groups import GroupStage, KLPlace
from rlhf_lightning.algorithms.online.settings import KLPenalty
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.functional import group_advantages
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.training import sum_over_ranks

GRPOLoss = Literal["grpo", "dapo", "dr_grpo"]
KL = KLPenalty(coef=0.04, estimator="k3")
"""The penalty of Shao et al. 2024, section 4.2."""


class GRPOModule(GroupStage):
    """Improves a policy by GRPO.

    Expects batches like `PromptBatch`, one per iteration. `docs/metrics.md` lists what is logged under `train/`, `val/`
    and `test/`.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        reward: folder or hub id of a reward model, or the import path of a function
            `(prompts: list[str], responses: list[str]) -> list[float]`; from Python also the function.
        loss: how tokens are averaged: `grpo` over each response and then over responses, so that tokens of long ones
            count less; `dapo` over all tokens of the step; `dr_grpo` divides by the longest response that there could
            be, so that length is neither rewarded nor punished.
        scaled: divide advantages by the standard deviation of their group's rewards; `dr_grpo` was proposed without.
        samples_per_prompt: responses drawn for each prompt, at least 2.
        minibatch_size: responses per optimizer step.
        kl: the penalty that holds the policy near the reference.
        kl_in: `loss` adds it to the loss of each token; `reward` subtracts it from the score of a response.
        **options: those of `GroupStage`, `OnlineStage` and `Stage`.
    """

    def __init__(
        self,
        model_name_or_path: str,
        reward: str | RewardFunction,
        *,
        loss: GRPOLoss = "dapo",
        scaled: bool = True,
        samples_per_prompt: int = 8,
        minibatch_size: int = 128,
        kl: KLPenalty = KL,
        kl_in: KLPlace = "loss",
        **options: Any,
    ) -> None:
        kl = from_config(KLPenalty, kl, KL)
        check_arguments(GRPOModule, {"loss": loss, "scaled": scaled})
        super().__init__(
            model_name_or_path,
            reward,
            samples_per_prompt=samples_per_prompt,
            minibatch_size=minibatch_size,
            kl=kl,
            kl_in=kl_in,
            **options,
        )
        self.loss: GRPOLoss = loss
        self.scaled = scaled

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """Each reward minus the mean of its group, scaled if asked for."""
        return group_advantages(rewards, self.samples_per_prompt, "mean", self.scaled)

    def token_weights(self, batch: Experience) -> Tensor | None:
        """A token of a long response weighs less in `grpo`."""
        if self.loss != "grpo":
            return None
        return 1 / batch.response_mask.sum(dim=1, keepdim=True).to(batch.advantages.dtype).expand_as(batch.advantages)

    def loss_total(self, minibatch: Experience, num_tokens: Tensor) -> Tensor:
        """Tokens, responses, or the most tokens that these could have had, on all ranks."""
        if self.loss == "dapo":
            return num_tokens
        responses = sum_over_ranks(self, torch.full_like(num_tokens, len(minibatch.scores)))
        return responses * (self.sampling.max_new_tokens if self.loss == "dr_grpo" else 1)
