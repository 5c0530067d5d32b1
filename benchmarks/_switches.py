"""The switches that `ablations.py` measures, each alone: what differs from the quickstart's settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf_lightning import KLPenalty, Objective, ScoreShaping
from rlhf_lightning.cli.quickstart.stages import Algorithm

FINE = {"missing_eos_penalty": 1.0}
"""What the quickstart does to scores."""


class Switch(NamedTuple):
    """One change.

    Attributes:
        name: of its row.
        what: the arguments, as a reader would write them.
        settings: of the module of the last stage.
        reward: of `RewardModule`, where a reward model of its own is trained.
        algorithm: the last stage.
    """

    name: str
    what: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    reward: dict[str, Any] | None = None
    algorithm: Algorithm = "ppo"


def objective(name: str, **settings: Any) -> Switch:
    """A switch of `objective`."""
    what = ", ".join(f"`objective.{key}: {value}`" for key, value in settings.items())
    return Switch(name, what, {"objective": Objective(**settings)})


def score(name: str, **settings: Any) -> Switch:
    """A switch of `score`."""
    what = ", ".join(f"`score.{key}: {value}`" for key, value in settings.items())
    return Switch(name, what, {"score": ScoreShaping(**FINE | settings)})


def argument(name: str, **settings: Any) -> Switch:
    """Switches of the module itself."""
    return Switch(name, ", ".join(f"`{key}: {value}`" for key, value in settings.items()), settings)


SWITCHES = [
    Switch("default", "the quickstart"),
    argument("value-warm-up", value_warmup_iterations=3),
    argument("value-head-on-policy", value_trunk="policy"),
    objective("decoupled-lambda", value_gae_lambda=1.0),
    objective("lambda-by-length", value_gae_lambda=1.0, gae_length_alpha=0.5),
    objective("monte-carlo", gae_lambda=1.0),
    objective("whitened-rewards", whiten_rewards="scale"),
    objective("shifted-rewards", whiten_rewards="shift"),
    objective("plain-advantages", whiten_advantages=False),
    objective("clip-higher", clip_range_high=0.28),
    objective("dual-clip", dual_clip=3.0),
    objective("free-values", value_clip_range=None),
    score("raw-scores", scaling=False, clip=None),
    score("no-eos-fine", missing_eos_penalty=0.0),
    score("eos-score", missing_eos_penalty=0.0, missing_eos_score=-1.0),
    score("overlong", overlong_buffer=24),
    argument("early-stop", max_approx_kl=0.02),
    argument("clipped-apart", value_gradient_clip_val=1.0),
    argument("one-epoch", ppo_epochs=1),
    argument("four-epochs", ppo_epochs=4),
    argument("constant-rate", lr_schedule="constant"),
    argument("ends-at-a-tenth", min_lr_factor=0.1),
    argument("four-answers", rollout_batch_size=16, samples_per_prompt=4),
    Switch("adaptive-kl", "`kl.target: 3`, `kl.horizon: 1000`", {"kl": KLPenalty(0.1, target=3.0, horizon=1000)}),
    Switch("weak-kl", "`kl.coef: 0.05`", {"kl_coef": 0.05}),
    Switch("strong-kl", "`kl.coef: 0.2`", {"kl_coef": 0.2}),
    Switch("faster", "learning rate of the policy 3e-4", {"lr": 3e-4}),
    Switch("faster-weak-kl", "learning rate of the policy 3e-4, `kl.coef: 0.07`", {"lr": 3e-4, "kl_coef": 0.07}),
]
