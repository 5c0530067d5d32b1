"""Settings of online algorithms, in groups; each default names its source."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, SHARE, check_arguments
from rlhf_lightning.functional import KLEstimator


@dataclass(frozen=True)
class KLPenalty:
    """The penalty that holds the policy near the reference.

    Args:
        coef: weight per nat (0.05: Stiennon et al. 2020; Huang et al. 2024), or where it starts if adaptive (0.15 in
            Ziegler et al. 2019).
        target: KL per response, in nats, that the weight is adapted to hold (6 in Ziegler et al. 2019); None keeps the
            weight fixed.
        horizon: responses over which an adaptive weight moves by at most about 20% (10,000 in Ziegler et al. 2019).
        estimator: per-token estimate used as penalty: `k1`, `k2` or `k3`.
    """

    coef: float = 0.05
    target: float | None = None
    horizon: int = 10_000
    estimator: KLEstimator = "k1"

    def __post_init__(self) -> None:
        check_arguments(KLPenalty, vars(self), {"target": POSITIVE, "horizon": AT_LEAST_1}, "kl.")


@dataclass(frozen=True)
class ScoreShaping:
    """What happens to scores before they become rewards (PPO-max, Zheng et al. 2023, section 5.3).

    Args:
        scaling: shift and scale by the running mean and standard deviation of all scores so far.
        clip: then clip to plus or minus this; None for no clipping.
        missing_eos_penalty: then subtract this for a response that was cut at its limit (1 in Huang et al. 2024).
    """

    scaling: bool = True
    clip: float | None = 5.0
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_arguments(ScoreShaping, vars(self), {"clip": POSITIVE}, "score.")


@dataclass(frozen=True)
class Objective:
    """What is optimised (Schulman et al. 2016 and 2017; values as in Stiennon et al. 2020).

    Args:
        clip_range: how far the probability ratio may move from 1.
        value_clip_range: how far values may move from those of the rollout; None for no clipping.
        value_coef: weight of the value loss.
        gamma: discount per token.
        gae_lambda: weight between one-step (0) and Monte-Carlo (1) advantages.
        whiten_advantages: scale advantages to mean 0 and variance 1 over all tokens of the rollout, on all ranks.
    """

    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        ranges = {"clip_range": POSITIVE, "value_clip_range": POSITIVE, "gamma": SHARE, "gae_lambda": SHARE}
        check_arguments(Objective, vars(self), ranges, "objective.")
