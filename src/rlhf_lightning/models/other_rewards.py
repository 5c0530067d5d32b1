"""Rewards beside the main one: added to it by their weights, put in its place where they say so, or only logged.

Each reads responses in its own way: a model with its own tokenizer and template, a function text.

Notation: B responses, R padded response length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.arguments import POSITIVE, Range, check_arguments
from rlhf_lightning.batches import Sources, log_names
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.token_rewards import PerToken
from rlhf_lightning.models.reward_endpoints import RewardEndpoint
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.scorers import FunctionScorer, ModelScorer, Scorer, TextScorer
from rlhf_lightning.models.token_rewards import check_per_token

MAIN = "main"
"""How the main reward is called in logs."""


@dataclass(frozen=True)
class OtherReward:
    """A reward beside the main one.

    Args:
        reward: as for the module: folder or hub id of a reward model, or the import path of a function; from Python
            also the function. Or a service, as the arguments of a `RewardEndpoint`: `url`, and `model` of a chat model.
        weight: what its score is multiplied by before it is added to that of the main reward; 0 only logs it.
        scaling: before that, shift and scale it by the running mean and standard deviation of its scores so far.
        clip: then clip it to plus or minus this; None for no clipping.
        replaces_below: put this score in the place of all others where the probability that it means, the logistic
            function of its raw score, is below this (Touvron et al. 2023, Llama 2, section 3.2.3: safety, 0.15). It is
            not added then, and `weight` must be left 1. None never does.
        replaces_for: put it there for all prompts of these sources of a blend, too, whatever it says (Llama 2, as
            above: prompts about safety); named as the data name them, or as `train/score_from_NAME` does. None for no
            source.
        reward_weights: what the raw logit of each label of a reward model counts, as for the module.
        per_token: give a reward model's score along the response, not at its end. `difference` gives each token what
            the score has gained by it (Ng et al. 1999), so that the sum stays the score; `score` gives each the score
            up to it (process reward models, Lightman et al. 2023). None for the end. A function says so by a parameter
            `token_ids`.
        step_end: give them only at tokens that complete this text, such as a line's end, and at the last one. Or at
            this special token. docs/ppo.md says how line ends are written.
    """

    reward: str | RewardEndpoint | RewardFunction
    weight: float = 1.0
    scaling: bool = False
    clip: float | None = None
    replaces_below: float | None = None
    replaces_for: list[str] | None = None
    reward_weights: dict[str, float] | None = None
    per_token: PerToken | None = None
    step_end: str | None = None

    @property
    def may_lack(self) -> bool:
        """Whether some scores may be missing, NaN, since they are only logged and come from elsewhere."""
        return isinstance(self.reward, RewardEndpoint) and not self.weight

    @property
    def replaces(self) -> bool:
        """Whether it may take the place of the others, and so is not added to them."""
        return self.replaces_below is not None or self.replaces_for is not None

    def __post_init__(self) -> None:
        if isinstance(self.reward, Mapping):
            object.__setattr__(self, "reward", RewardEndpoint(**self.reward))
        ranges = {
            "weight": Range(),
            "reward_weights": Range(),
            "clip": POSITIVE,
            "replaces_below": Range(above=0, below=1),
        }
        check_arguments(OtherReward, vars(self), ranges, "other_rewards.")
        check_per_token(self.per_token, self.step_end, "other_rewards.")
        if self.per_token == "score" and self.replaces_below is not None:
            raise UserError(
                "other_rewards.replaces_below reads one score of the response, which per_token score does not give: "
                "leave one of them out"
            )
        if self.replaces and self.weight != 1:
            which = "replaces_below" if self.replaces_for is None else "replaces_for"
            raise UserError(
                f"other_rewards.weight ({self.weight}) must be 1 beside {which}: the score takes the place of "
                "the others as it is"
            )
        if self.replaces_for == []:
            raise UserError("other_rewards.replaces_for names no source; name one, or leave it out")


class OtherScorers(nn.Module):
    """What scores responses beside the main reward, by name.

    Args:
        scorers: models, which are moved and sharded with the module that this is part of, and functions.
    """

    def __init__(self, scorers: Mapping[str, ModelScorer | TextScorer | FunctionScorer]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name: each for name, each in scorers.items() if isinstance(each, nn.Module)})
        self.functions = {name: each for name, each in scorers.items() if not isinstance(each, nn.Module)}
        self.names = [*scorers]

    def by_name(self) -> dict[str, Scorer]:
        """All of them, in the order in which they were named."""
        found: dict[str, Any] = {**dict(self.models.items()), **self.functions}
        return {name: found[name] for name in self.names}


def check_other_rewards(settings: Mapping[str, OtherReward]) -> None:
    """Refuse names that logs could not hold.

    Args:
        settings: by name.

    Raises:
        UserError: names it.
    """
    for name in settings:
        if not name.isidentifier() or name == MAIN:
            raise UserError(
                f"other_rewards: '{name}' cannot be the name of a reward: use letters, digits and _, and not '{MAIN}', "
                "which is how the reward of `reward` is logged"
            )


def check_sources(settings: Mapping[str, OtherReward], names: Sequence[str] | None) -> None:
    """See that the sources that rewards ask for are among those of the data.

    Args:
        settings: of the rewards, by name.
        names: of the sources; None where prompts do not say where they come from.

    Raises:
        UserError: they are not, or there are no several sources.
    """
    for name, setting in settings.items():
        where, called = f"other_rewards.{name}.replaces_for", log_names(names or [])
        if setting.replaces_for is None:
            continue
        if len(called) < 2:
            raise UserError(
                f"{where} asks which source a prompt comes from, and the data have one alone, or do not say it: give "
                "an rlhf_lightning.Blend that is not streamed, or leave it out"
            )
        for wanted in setting.replaces_for:
            if wanted not in {*called, *(names or [])}:
                close = get_close_matches(wanted, called, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise UserError(f"{where}: '{wanted}' is no source of the data, which are {', '.join(called)}{hint}")


def total_scores(
    main: Tensor,
    others: Mapping[str, Tensor],
    raw: Mapping[str, Tensor],
    settings: Mapping[str, OtherReward],
    sources: Sources | None = None,
) -> Tensor:
    """One score of several.

    Args:
        main: of the main reward, `[B]`, or of its tokens, `[B, R]`.
        others: of the others, scaled and clipped as they are to count, by name, each of that shape.
        raw: the scores as their rewards gave them, a reward model's before calibration, by name, each `[B]`.
        settings: of the others, by name.
        sources: where the prompts come from; None where that is not known, so that none replaces by it.

    Returns:
        The weighted sum; where a score replaces the others, that one, of several the first. As `main`.

    Example:
        >>> settings = {"short": OtherReward("f", weight=0.5), "safe": OtherReward("g", replaces_below=0.2)}
        >>> others = {"short": torch.tensor([2.0, 2.0]), "safe": torch.tensor([3.0, -4.0])}
        >>> total_scores(torch.tensor([1.0, 1.0]), others, others, settings)
        tensor([ 2., -4.])
    """
    total = main
    for name, setting in settings.items():
        if not setting.replaces and setting.weight:
            total = total + setting.weight * others[name]
    for name, setting in reversed([*settings.items()]):
        if setting.replaces:
            there = _takes_over(setting, raw[name], sources)
            total = torch.where(there.view(-1, *[1] * (main.dim() - 1)), others[name], total)
    return total


def _takes_over(setting: OtherReward, raw: Tensor, sources: Sources | None) -> Tensor:
    """Where a score takes the place of the others: either reason suffices. `[B]`, bool."""
    low, asked = torch.zeros_like(raw, dtype=torch.bool), torch.zeros_like(raw, dtype=torch.bool)
    if setting.replaces_below is not None:
        low = raw.sigmoid() < setting.replaces_below
    if setting.replaces_for is not None and sources is not None:
        asked = sources.are_among(setting.replaces_for)
    return low | asked
