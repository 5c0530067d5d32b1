"""Settings of online algorithms, in groups; each default names its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, SHARE, Range, check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional import KLEstimator, PerToken
from rlhf_lightning.models.token_rewards import check_per_token


@dataclass(frozen=True)
class KLPenalty:
    """The penalty that holds the policy near the reference.

    Args:
        coef: weight per nat, or where it starts if adaptive. 0.05 in Stiennon et al. 2020 and Huang et al. 2024; 0.15
            in Ziegler et al. 2019, where it is adaptive.
        target: KL per response, in nats, that the weight is adapted to. 6 in Ziegler et al. 2019; None keeps the weight
            fixed.
        horizon: responses over which an adaptive weight moves by at most 20%. About; 10,000 in Ziegler et al. 2019.
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
    """What happens to scores before they become rewards (PPO-max, Zheng et al. 2023, section 5.3), in this order.

    Args:
        scaling: shift and scale by the running mean and deviation of all scores so far.
        clip: then clip to plus or minus this; None for no clipping.
        missing_eos_penalty: then subtract this for a response that was cut at its limit.
        missing_eos_score: or give such a response this in place of its score. -1 in Ziegler et al. 2019 and Huang et
            al. 2024; None leaves it its score.
        overlong_buffer: then fine a response that reaches into so many tokens before the limit. The further, the more,
            all of `overlong_penalty` at `max_new_tokens` (Yu et al. 2025, DAPO, equation 13); None for no such fine.
        overlong_penalty: see there.
        per_token: give a reward model's score along the response. As `OtherReward` says; None for its end.
        step_end: see there.
    """

    scaling: bool = True
    clip: float | None = 5.0
    missing_eos_penalty: float = 0.0
    missing_eos_score: float | None = None
    overlong_buffer: int | None = None
    overlong_penalty: float = 1.0
    per_token: PerToken | None = None
    step_end: str | None = None

    def __post_init__(self) -> None:
        ranges = {"clip": POSITIVE, "missing_eos_score": Range(), "overlong_buffer": AT_LEAST_1}
        check_arguments(ScoreShaping, vars(self), ranges, "score.")
        check_per_token(self.per_token, self.step_end, "score.")
        if self.missing_eos_score is not None and self.missing_eos_penalty:
            raise UserError(
                "score.missing_eos_score and score.missing_eos_penalty both speak of responses that were cut: give one"
            )


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
        whiten_rewards: scale the rewards of tokens to variance 1. The KL penalty is among them, and it is over all
            tokens of the rollout, on all ranks: `scale` leaves their mean (Ziegler et al. 2019), `shift` makes it 0;
            `no` leaves them alone.
        clip_range_high: how far the ratio may move upwards, where that differs. 0.28 in Yu et al. 2025, DAPO; None for
            `clip_range`.
        dual_clip: most that the ratio counts as where the advantage is negative. 3 in Ye et al. 2020; None for no
            bound.
        value_gae_lambda: `gae_lambda` of the returns that values are trained on. 1 in Yuan et al. 2025, VAPO; None for
            the same.
        gae_length_alpha: gives each response a lambda by its length for the advantages. `1 - 1 / (alpha * length)` in
            place of `gae_lambda`, 0.05 in VAPO; None for `gae_lambda`.
    """

    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: Literal["no", "scale", "shift"] = "no"
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_gae_lambda: float | None = None
    gae_length_alpha: float | None = None

    def __post_init__(self) -> None:
        positive = dict.fromkeys(("clip_range", "clip_range_high", "value_clip_range", "gae_length_alpha"), POSITIVE)
        shares = dict.fromkeys(("gamma", "gae_lambda", "value_gae_lambda"), SHARE)
        check_arguments(Objective, vars(self), {**positive, **shares, "dual_clip": Range(above=1)}, "objective.")
