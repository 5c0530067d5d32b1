"""RLHF as a PyTorch Lightning package: supervised fine-tuning, reward modelling, PPO."""

__version__ = "0.1.0"

from rlhf_lightning.callbacks import HFExport, PredictionWriter, SampleTexts, StageProgressBar
from rlhf_lightning.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.generation import Sampling
from rlhf_lightning.models.scalar_lm import ScalarLM, load_reward_model
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.ppo_settings import KLPenalty, Objective, ScoreShaping
from rlhf_lightning.strategies import DeepSpeedStrategy

__all__ = [
    "DeepSpeedStrategy",
    "HFExport",
    "InstructionDataModule",
    "KLPenalty",
    "NonFiniteError",
    "Objective",
    "PPOModule",
    "PredictionWriter",
    "PreferenceDataModule",
    "PromptDataModule",
    "RewardModule",
    "SFTModule",
    "SampleTexts",
    "Sampling",
    "ScalarLM",
    "ScoreShaping",
    "StageProgressBar",
    "UserError",
    "load_causal_lm",
    "load_reward_model",
]
