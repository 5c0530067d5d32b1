"""One LightningModule per algorithm."""

from rlhf_lightning.algorithms.ppo import PPOModule
from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.algorithms.sft import SFTModule

__all__ = ["PPOModule", "RewardModule", "SFTModule"]
