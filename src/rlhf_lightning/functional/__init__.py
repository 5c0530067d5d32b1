"""Pure tensor maths: no state, no logging, nothing in place."""

from rlhf_lightning.functional.advantages import (
    KLEstimator,
    gae,
    kl_estimate,
    kl_shaped_rewards,
    length_adaptive_lambda,
)
from rlhf_lightning.functional.agreement import cohen_kappa
from rlhf_lightning.functional.best_of_n import best_of_n, best_of_n_kl
from rlhf_lightning.functional.calibration import Reliability, expected_calibration_error, pair_correct, reliability
from rlhf_lightning.functional.correlation import correlation
from rlhf_lightning.functional.ensemble import ScoreCombination, combine_scores, disagreement
from rlhf_lightning.functional.groups import Baseline, group_advantages, groups_without_signal
from rlhf_lightning.functional.importance import truncated_importance
from rlhf_lightning.functional.intervals import bootstrap_interval, mean_ratio
from rlhf_lightning.functional.linear_loss import (
    LogitScaling,
    linear_cross_entropy_sum,
    linear_token_logprobs,
    rows_on,
    rows_per_chunk,
)
from rlhf_lightning.functional.logprobs import entropy, token_logprobs
from rlhf_lightning.functional.losses import (
    RewardLoss,
    RewardObjective,
    center_loss,
    cross_entropy_sum,
    divergence_index,
    lead_loss,
    pairwise_loss,
    ppo_policy_loss,
    ppo_value_loss,
    scores_at_end,
)
from rlhf_lightning.functional.masked import last_index, masked_moments, masked_sum, masked_whiten
from rlhf_lightning.functional.over_optimisation import GaoFit, GaoForm, fit_gao
from rlhf_lightning.functional.preference import DPOLoss, dpo_loss
from rlhf_lightning.functional.ranking import bradley_terry, length_controlled_win_rate
from rlhf_lightning.functional.reward_bench import best_of_credit, ties_credit
from rlhf_lightning.functional.token_rewards import PerToken, rewards_along

__all__ = [
    "Baseline",
    "DPOLoss",
    "GaoFit",
    "GaoForm",
    "KLEstimator",
    "LogitScaling",
    "PerToken",
    "Reliability",
    "RewardLoss",
    "RewardObjective",
    "ScoreCombination",
    "best_of_credit",
    "best_of_n",
    "best_of_n_kl",
    "bootstrap_interval",
    "bradley_terry",
    "center_loss",
    "cohen_kappa",
    "combine_scores",
    "correlation",
    "cross_entropy_sum",
    "disagreement",
    "divergence_index",
    "dpo_loss",
    "entropy",
    "expected_calibration_error",
    "fit_gao",
    "gae",
    "group_advantages",
    "groups_without_signal",
    "kl_estimate",
    "kl_shaped_rewards",
    "last_index",
    "lead_loss",
    "length_adaptive_lambda",
    "length_controlled_win_rate",
    "linear_cross_entropy_sum",
    "linear_token_logprobs",
    "masked_moments",
    "masked_sum",
    "masked_whiten",
    "mean_ratio",
    "pair_correct",
    "pairwise_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reliability",
    "rewards_along",
    "rows_on",
    "rows_per_chunk",
    "scores_at_end",
    "ties_credit",
    "token_logprobs",
    "truncated_importance",
]
