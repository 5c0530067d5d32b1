"""One score of several rewards': each as it counts, by the moments of its own scores, then all together.

Notation: B responses, R padded response length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from rlhf_lightning.algorithms.online.controllers import RunningMoments
from rlhf_lightning.algorithms.online.experience import Measurements
from rlhf_lightning.algorithms.online.rollout import raw_score
from rlhf_lightning.batches import Sources
from rlhf_lightning.functional.masked import Reduce, masked_moments
from rlhf_lightning.models.other_rewards import MAIN, OtherReward, check_sources, total_scores
from rlhf_lightning.models.scorers import Scorer


class RewardCombination:
    """What becomes of the scores of `other_rewards`, and what is remembered of them.

    Args:
        settings: of the other rewards, by name.

    Attributes:
        moments: of the scores of each so far.
    """

    def __init__(self, settings: Mapping[str, OtherReward]) -> None:
        self.settings = settings
        self.moments = {name: RunningMoments() for name in settings}
        self._has_warned = False

    def check(self, sources: Sources | None) -> None:
        """Refuse prompts to train on that do not say where they come from, if rewards ask for it.

        Args:
            sources: of a batch.
        """
        check_sources(self.settings, None if sources is None else sources.names)

    def update(self, measured: Measurements, reduce: Reduce) -> None:
        """Take new scores into the moments.

        Args:
            measured: what all rewards say.
            reduce: sums a tensor over all ranks.
        """
        for name, scores in measured.others.items():
            if not self.settings[name].may_lack:
                self.moments[name].update(scores, reduce)

    def means(self, measured: Measurements, reduce: Reduce) -> dict[str, Tensor]:
        """What is logged of each reward, over all ranks: the mean of the scores that it has given.

        Args:
            measured: with one score of all.
            reduce: sums a tensor over all ranks.

        Returns:
            `score_NAME`, scalars; nothing of a reward without a score.
        """
        found = {}
        for name, scores in measured.others.items():
            there = torch.ones_like(scores, dtype=torch.bool)
            if name != MAIN and self.settings[name].may_lack:
                there = ~scores.isnan()
                if not int(reduce(there.sum())):
                    continue
            _, found[f"score_{name}"], _ = masked_moments(scores.nan_to_num(), there, reduce)
        return found

    def of(self, measured: Measurements, scorers: Mapping[str, Scorer], sources: Sources | None) -> Measurements:
        """With one score of the main reward's and the others', and the main one's as `main` among those.

        Args:
            measured: what all of them say.
            scorers: of the others, by name.
            sources: where the prompts come from; None where that is not known.
        """
        if not measured.others:
            return measured
        self._warn_of_sources(sources)
        raw = {name: raw_score(scorers[name], each).get("raw_score", each) for name, each in measured.others.items()}
        counted = {name: self._counted(name, each) for name, each in measured.others.items()}
        scores = total_scores(measured.scores, counted, raw, self.settings, sources)
        dense = self._dense(measured, raw, sources)
        return measured._replace(scores=scores, others={MAIN: measured.scores, **measured.others}, dense=dense)

    def _dense(self, measured: Measurements, raw: Mapping[str, Tensor], sources: Sources | None) -> Tensor | None:
        """The part of the total that is given along the responses, `[B, R]`.

        Scaled as the scores are, but not shifted or clipped: what that adds or takes is given at the end.
        """
        if measured.dense is None and not measured.dense_others:
            return None
        none = torch.zeros_like(measured.logprobs)
        parts = {name: measured.dense_others.get(name, none) for name in self.settings}
        scaled = {
            name: part / self.moments[name].std if self.settings[name].scaling else part for name, part in parts.items()
        }
        main = none if measured.dense is None else measured.dense
        return total_scores(main, scaled, raw, self.settings, sources)

    def _counted(self, name: str, scores: Tensor) -> Tensor:
        setting = self.settings[name]
        scores = self.moments[name].scale(scores) if setting.scaling else scores
        return scores if setting.clip is None else scores.clamp(-setting.clip, setting.clip)

    def _warn_of_sources(self, sources: Sources | None) -> None:
        """Training has refused them; what is evaluated may come from anywhere."""
        if sources is None and not self._has_warned and any(each.replaces_for for each in self.settings.values()):
            self._has_warned = True
            rank_zero_warn(
                "the prompts that are evaluated do not say which source they come from, so replaces_for of "
                "other_rewards does nothing there"
            )

    def state(self) -> dict[str, Any]:
        """What `load` goes on from."""
        return {name: {**vars(each)} for name, each in self.moments.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments of a checkpoint; those of a reward that the run no longer has are gone.

        Args:
            state: what `state` gave.
        """
        for name, kept in state.items():
            if name in self.moments:
                self.moments[name] = RunningMoments(**kept)
