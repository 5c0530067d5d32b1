"""One LightningModule per stage."""

from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule

__all__ = ["PPOModule", "RewardModule", "SFTModule"]
