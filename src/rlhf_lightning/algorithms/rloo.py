"""RLOO: REINFORCE with the other responses to a prompt as the baseline (Kool et al. 2019; Ahmadian et al. 2024).

Each prompt is answered several times. A response is one action: its reward, the KL penalty included, minus the mean of
the others' is the advantage of all its tokens, and its tokens share one probability ratio, clipped as in PPO where
several updates are made from one rollout. There is no value model. Left out: nothing of the paper.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_lightning.algorithms.online.experience import Experience
from rlhf_lightning.algorithms.online.groups import GroupStage
from rlhf_lightning.algorithms.online.losses import clipped_policy_loss
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.functional import group_advantages
from rlhf_lightning.training import sum_over_ranks


class RLOOModule(GroupStage):
    """Improves a policy by RLOO.

    Expects batches like `PromptBatch`, one per iteration. `docs/metrics.md` lists what is logged under `train/`, `val/`
    and `test/`. The arguments are those of `GroupStage`.
    """

    per_response = True

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """Each reward minus the mean of the others in its group."""
        return group_advantages(rewards, self.samples_per_prompt, "leave_one_out")

    def policy_loss(self, logprobs: Tensor, batch: Experience) -> Loss:
        """Summed over responses, each with one probability ratio."""
        low, high = self.clip_range, self.clip_range_high
        return clipped_policy_loss(logprobs, batch, low, high, on_policy=self.on_policy, per_response=True)

    def loss_total(self, minibatch: Experience, num_tokens: Tensor) -> Tensor:
        """Responses of the update, on all ranks."""
        return sum_over_ranks(self, num_tokens.new_full((), len(minibatch.scores)))
