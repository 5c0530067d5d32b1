"""RLHF as a PyTorch Lightning package: supervised fine-tuning, reward modelling, PPO, RLOO, GRPO, DPO."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rlhf_lightning.algorithms import DPOModule as DPOModule
    from rlhf_lightning.algorithms import GRPOModule as GRPOModule
    from rlhf_lightning.algorithms import PPOModule as PPOModule
    from rlhf_lightning.algorithms import RewardModule as RewardModule
    from rlhf_lightning.algorithms import RLOOModule as RLOOModule
    from rlhf_lightning.algorithms import ScoreRegressionModule as ScoreRegressionModule
    from rlhf_lightning.algorithms import SFTModule as SFTModule
    from rlhf_lightning.algorithms.online.settings import KLPenalty as KLPenalty
    from rlhf_lightning.algorithms.online.settings import Objective as Objective
    from rlhf_lightning.algorithms.online.settings import ScoreShaping as ScoreShaping
    from rlhf_lightning.callbacks import EMA as EMA
    from rlhf_lightning.callbacks import Evaluate as Evaluate
    from rlhf_lightning.callbacks import HFExport as HFExport
    from rlhf_lightning.callbacks import KeepBestByReward as KeepBestByReward
    from rlhf_lightning.callbacks import MetricGuard as MetricGuard
    from rlhf_lightning.callbacks import OverOptimisation as OverOptimisation
    from rlhf_lightning.callbacks import PredictionWriter as PredictionWriter
    from rlhf_lightning.callbacks import RunReport as RunReport
    from rlhf_lightning.callbacks import SampleTexts as SampleTexts
    from rlhf_lightning.callbacks import ShortSummary as ShortSummary
    from rlhf_lightning.callbacks import SkipNonFinite as SkipNonFinite
    from rlhf_lightning.callbacks import StageProgressBar as StageProgressBar
    from rlhf_lightning.callbacks import Stopping as Stopping
    from rlhf_lightning.chat.plain import PlainFormat as PlainFormat
    from rlhf_lightning.data import TLDR as TLDR
    from rlhf_lightning.data import Blend as Blend
    from rlhf_lightning.data import Filters as Filters
    from rlhf_lightning.data import HelpfulHarmless as HelpfulHarmless
    from rlhf_lightning.data import InstructionDataModule as InstructionDataModule
    from rlhf_lightning.data import PreferenceDataModule as PreferenceDataModule
    from rlhf_lightning.data import PromptDataModule as PromptDataModule
    from rlhf_lightning.data import RatingDataModule as RatingDataModule
    from rlhf_lightning.data import Table as Table
    from rlhf_lightning.errors import NonFiniteError as NonFiniteError
    from rlhf_lightning.errors import UserError as UserError
    from rlhf_lightning.generation.sampling import Sampling as Sampling
    from rlhf_lightning.generation.vllm_engine import VLLMEngine as VLLMEngine
    from rlhf_lightning.generation.vllm_server import VLLMServer as VLLMServer
    from rlhf_lightning.models.causal_lm import load_causal_lm as load_causal_lm
    from rlhf_lightning.models.finetune_settings import FineTune as FineTune
    from rlhf_lightning.models.other_rewards import OtherReward as OtherReward
    from rlhf_lightning.models.reward_endpoints import RewardEndpoint as RewardEndpoint
    from rlhf_lightning.models.scalar_lm import ScalarLM as ScalarLM
    from rlhf_lightning.models.scalar_lm import load_reward_model as load_reward_model
    from rlhf_lightning.training import DeepSpeedStrategy as DeepSpeedStrategy
    from rlhf_lightning.training import FSDP2Strategy as FSDP2Strategy

_HOMES = {
    "callbacks": (
        "EMA",
        "Evaluate",
        "HFExport",
        "KeepBestByReward",
        "MetricGuard",
        "OverOptimisation",
        "PredictionWriter",
        "RunReport",
        "SampleTexts",
        "ShortSummary",
        "SkipNonFinite",
        "StageProgressBar",
        "Stopping",
    ),
    "chat.plain": ("PlainFormat",),
    "data": (
        "Blend",
        "Filters",
        "HelpfulHarmless",
        "InstructionDataModule",
        "PreferenceDataModule",
        "PromptDataModule",
        "RatingDataModule",
        "TLDR",
        "Table",
    ),
    "errors": ("NonFiniteError", "UserError"),
    "models.causal_lm": ("load_causal_lm",),
    "models.finetune_settings": ("FineTune",),
    "generation.sampling": ("Sampling",),
    "generation.vllm_engine": ("VLLMEngine",),
    "generation.vllm_server": ("VLLMServer",),
    "models.other_rewards": ("OtherReward",),
    "models.reward_endpoints": ("RewardEndpoint",),
    "models.scalar_lm": ("ScalarLM", "load_reward_model"),
    "algorithms": (
        "DPOModule",
        "GRPOModule",
        "PPOModule",
        "RLOOModule",
        "RewardModule",
        "SFTModule",
        "ScoreRegressionModule",
    ),
    "algorithms.online.settings": ("KLPenalty", "Objective", "ScoreShaping"),
    "training": ("DeepSpeedStrategy", "FSDP2Strategy"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `rlhf --help` need not wait for torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rlhf_lightning' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"rlhf_lightning.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The public names too, although most are not imported yet."""
    return sorted({*globals(), *__all__})
