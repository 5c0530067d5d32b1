"""Everything optional: exports, sample texts, a held-out judge, prediction files, progress, guards."""

from rlhf_lightning.callbacks.best_by_reward import KeepBestByReward
from rlhf_lightning.callbacks.ema import EMA
from rlhf_lightning.callbacks.evaluate import Evaluate
from rlhf_lightning.callbacks.guards import MetricGuard, SkipNonFinite
from rlhf_lightning.callbacks.hf_export import HFExport
from rlhf_lightning.callbacks.over_optimisation import OverOptimisation
from rlhf_lightning.callbacks.predictions import PredictionWriter
from rlhf_lightning.callbacks.progress import StageProgressBar
from rlhf_lightning.callbacks.run_report import RunReport
from rlhf_lightning.callbacks.samples import SampleTexts
from rlhf_lightning.callbacks.stopping import Stopping
from rlhf_lightning.callbacks.summary import ShortSummary

__all__ = [
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
]
