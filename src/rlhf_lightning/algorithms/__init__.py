"""One LightningModule per algorithm."""

from rlhf_lightning.algorithms.dpo import DPOModule
from rlhf_lightning.algorithms.grpo import GRPOModule
from rlhf_lightning.algorithms.ppo import PPOModule
from rlhf_lightning.algorithms.regression import ScoreRegressionModule
from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.algorithms.rloo import RLOOModule
from rlhf_lightning.algorithms.sft import SFTModule

__all__ = ["DPOModule", "GRPOModule", "PPOModule", "RLOOModule", "RewardModule", "SFTModule", "ScoreRegressionModule"]
