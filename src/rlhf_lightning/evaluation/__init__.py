"""Whether it worked: models asked and answers judged outside of training."""

from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.policy import Answer, Policy

__all__ = ["Answer", "Judge", "Policy"]
