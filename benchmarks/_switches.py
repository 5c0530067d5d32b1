"""The switches that `ablations.py` measures, each alone: what differs from the quickstart's settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from rlhf_lightning.cli.pipeline.steps import read_pipeline
from rlhf_lightning.cli.quickstart.stages import Algorithm, gold
from rlhf_lightning.cli.recipes import find_recipe, read_config


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


PAPERS = ("stiennon2020", "instructgpt", "bai2022", "llama2", "ppo_max", "n_plus")
_OF_PPO = {
    "kl",
    "score",
    "objective",
    "lr_schedule",
    "min_lr_factor",
    "ppo_epochs",
    "value_trunk",
    "value_warmup_iterations",
}
_OF_REWARD = {"loss", "objective", "lm_coef", "center_coef", "num_heads"}


def paper(name: str) -> Switch:
    """PPO and reward model as in a paper's recipe, with rates, sizes and sampling of the quickstart, and one reward."""
    values = read_config(find_recipe(f"papers/{name}.yaml"))["values"]
    pipeline = read_pipeline([f"papers/{name}.yaml"], [f"{value}=x" for value in values], None)
    options = {step.name: step.options for step in pipeline.steps}

    def kept(step: str, names: set[str]) -> dict[str, Any]:
        given = {key.removeprefix("model."): value for key, value in options[step].items()}
        return {key: value for key, value in given.items() if key in names}

    learnt = kept("helpful" if name == "llama2" else "reward", _OF_REWARD)
    own = {key: value for key, value in learnt.items() if (key, value) != ("loss", "last_token")}
    return Switch(f"paper-{name}", f"of `papers/{name}.yaml`", kept("ppo", _OF_PPO), own or None)


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
    *map(paper, PAPERS),
    Switch("gold-as-reward", "`reward`: gold itself", {"reward": f"{gold.__module__}.{gold.__qualname__}"}),
    Switch("rloo", "RLOO (`quickstart/rloo.yaml`)", algorithm="rloo"),
    Switch("grpo", "GRPO (`quickstart/grpo.yaml`)", algorithm="grpo"),
    Switch("dpo", "DPO (`quickstart/dpo.yaml`)", algorithm="dpo"),
]
