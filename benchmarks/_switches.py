"""The switches that `ablations.py` measures, each alone: what differs from the quickstart's settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf_lightning.cli.quickstart.stages import Algorithm


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


def options(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings as options are named: `kl.coef: 0.2`."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += options(value, f"{prefix}{name}.")
        else:
            found.append(f"`{prefix.replace('init_args.', '')}{name}: {'null' if value is None else value}`")
    return found


def switch(name: str, **settings: Any) -> Switch:
    """One of the last stage's module; groups such as `kl` as dicts of what is changed in them."""
    return Switch(name, ", ".join(options(settings)), settings)


def reward(name: str, **settings: Any) -> Switch:
    """One of `RewardModule`, whose models PPO then learns from."""
    return Switch(name, "reward model: " + ", ".join(options(settings)), reward=settings)


def objective(name: str, **settings: Any) -> Switch:
    """One of `objective`."""
    return switch(name, objective=settings)


def score(name: str, **settings: Any) -> Switch:
    """One of `score`."""
    return switch(name, score=settings)


SWITCHES = [
    Switch("default", "the quickstart"),
    switch("value-warm-up", value_warmup_iterations=3),
    switch("value-head-on-policy", value_trunk="policy"),
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
    switch("early-stop", max_approx_kl=0.02),
    switch("clipped-apart", value_gradient_clip_val=1.0),
    switch("one-epoch", ppo_epochs=1),
    switch("four-epochs", ppo_epochs=4),
    switch("constant-rate", lr_schedule="constant"),
    switch("ends-at-a-tenth", min_lr_factor=0.1),
    switch("four-answers", rollout_batch_size=16, samples_per_prompt=4),
    switch("adaptive-kl", kl={"target": 3.0, "horizon": 1000}),
    switch("weak-kl", kl={"coef": 0.05}),
    switch("strong-kl", kl={"coef": 0.2}),
    switch("faster", optimizer={"init_args": {"lr": 3e-4}}),
    switch("faster-weak-kl", optimizer={"init_args": {"lr": 3e-4}}, kl={"coef": 0.07}),
    switch("whitened-constant", objective={"whiten_rewards": "scale"}, lr_schedule="constant"),
    switch("whitened-monte-carlo", objective={"whiten_rewards": "scale", "gae_lambda": 1.0}),
    reward("hinge", objective="hinge"),
    reward("smoothed-labels", label_smoothing=0.1),
    reward("centred", center_coef=0.01),
    reward("language-loss", lm_coef=1.0),
    reward("average-loss", loss="average"),
    reward("per-sample-loss", loss="per_sample"),
    Switch(
        "four-heads-careful",
        "reward model: `num_heads: 4`; `reward_combination: mean_minus_std`",
        {"reward_combination": "mean_minus_std"},
        {"num_heads": 4},
    ),
    Switch("rloo", "RLOO (`quickstart/rloo.yaml`)", algorithm="rloo"),
    Switch("grpo", "GRPO (`quickstart/grpo.yaml`)", algorithm="grpo"),
    Switch("dpo", "DPO (`quickstart/dpo.yaml`)", algorithm="dpo"),
]
