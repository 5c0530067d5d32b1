"""Whether a reward model can be trusted: accuracy, calibration, and how much of it is length.

Notation: N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from rlhf_lightning.arguments import AT_LEAST_1, check_arguments
from rlhf_lightning.batches import length_sorted_pieces
from rlhf_lightning.chat.messages import RefusedTurnsError, exact_text
from rlhf_lightning.data.rows import Need
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.results import Curve, Lines, Point, Result
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.statistics import ALL, intervals_of, result, results_by_group, sources
from rlhf_lightning.evaluation.task import Bench, Progress, Task, files_of, name_of
from rlhf_lightning.functional import (
    best_of_credit,
    bootstrap_interval,
    expected_calibration_error,
    pair_correct,
    reliability,
    ties_credit,
)
from rlhf_lightning.functional.intervals import Array
from rlhf_lightning.models.scalar_lm import Calibration
from rlhf_lightning.models.scorers import TextScorer

LENGTH_EDGES = (-200, -50, 50, 200)
"""Characters by which the better response of a pair is longer, between which accuracy is reported."""
_MARGIN_LEVELS = 8
_TOKENS_PER_CHARACTER = 0.3
_BEST_OF = 4


class Pairs(NamedTuple):
    """All pairs of all rows, the better response first.

    Attributes:
        places: of each pair's row among the rows, `[N]`, int64.
        margins: raw score of the better response less that of the other, `[N]`, float64.
        lengths: characters by which the better one is longer, `[N]`, int64.
        weights: of each pair; those of one row together count as the row does, `[N]`, float64.
    """

    places: NDArray[np.int64]
    margins: Array
    lengths: NDArray[np.int64]
    weights: Array

    @classmethod
    def of(cls, rows: list[TextRow], scores: list[list[float]]) -> Pairs:
        """Pairs of responses of which one ranks above the other.

        Args:
            rows: with two responses or more.
            scores: of each row's responses.
        """
        found: list[tuple[int, float, int, float]] = []
        for place, (row, own) in enumerate(zip(rows, scores, strict=True)):
            ranks, lengths = row.ranks or range(len(own)), [len(text.strip()) for text in row.responses]
            pairs = [
                (i, j) if ranks[i] < ranks[j] else (j, i)
                for i, j in combinations(range(len(own)), 2)
                if ranks[i] != ranks[j] and row.responses[i] != row.responses[j]
            ]
            found += [(place, own[i] - own[j], lengths[i] - lengths[j], row.weight / len(pairs)) for i, j in pairs]
        places, margins, longer, weights = zip(*found, strict=True) if found else ((), (), (), ())
        return cls(np.array(places, int), np.array(margins, float), np.array(longer, int), np.array(weights, float))


@dataclass(frozen=True)
class Reward(Task):
    """What each reward model, or reward function, prefers, against what people preferred.

    Args:
        num_bins: of the reliability diagram, from a confidence of 0.5 to 1.
    """

    name: ClassVar[str] = "reward"
    need: ClassVar[Need] = "preference"
    num_bins: int = 10

    def __post_init__(self) -> None:
        check_arguments(Reward, vars(self), {"num_bins": AT_LEAST_1}, "reward.")

    def by_default(self, bench: Bench) -> bool:
        """Wherever there are rewards."""
        return bool(bench.rewards)

    def check(self, bench: Bench) -> None:
        """Refuse to begin without any."""
        bench.check_rewards(self.name)

    def _key(self, reward: Any, bench: Bench) -> str:
        weighed = [] if bench.files_of_reward(reward) == files_of(reward) else [bench.files_of_reward(reward)]
        return self.key(reward, bench.dtype, *weighed)

    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Measure each reward, see `Task`."""
        results: list[Result] = []
        curves: list[Curve] = []
        for reward in bench.rewards:
            judge = bench.judge(reward)
            found = _score(self, judge, self._key(reward, bench), rows, bench, lines)
            read = [(row, line) for row, line in zip(rows, found, strict=True) if "scores" in line]
            if len(read) < len(rows):
                reason = next(line["reason"] for line in found if "scores" not in line)
                rank_zero_warn(
                    f"{judge.name} cannot score {len(rows) - len(read)} of {len(rows)} rows, the first: {reason}"
                )
            kept, scores = [row for row, _ in read], [line.get("raw_scores", line["scores"]) for _, line in read]
            pairs, name = Pairs.of(kept, scores), name_of(reward)
            results += _accuracy(name, kept, pairs, bench.seed) + _length(name, pairs, len(kept), bench.seed)
            results += _best_of(name, kept, scores, bench.seed)
            if isinstance(judge.scores_by, TextScorer):  # a function's scores are no log-odds
                more, curve = _calibration(name, pairs, len(kept), self.num_bins, bench.seed)
                results, curves = results + more, [*curves, *curve]
        return results, curves


def _score(
    task: Reward, judge: Judge, key: str, rows: list[TextRow], bench: Bench, lines: Lines
) -> list[dict[str, Any]]:
    """Lines of all rows with the scores of their responses, or why there are none."""
    scorer = judge.scores_by
    calibration = scorer.model.calibration if isinstance(scorer, TextScorer) else None
    refused = {i: why for i, row in enumerate(rows) if (why := _refusal(judge, row))}
    sound = [i for i in range(len(rows)) if i not in refused]
    lengths = [sum(len(exact_text(rows[i].written.prompt)) + len(text) for text in rows[i].responses) for i in sound]
    tokens = (torch.tensor(lengths, dtype=torch.float64) * _TOKENS_PER_CHARACTER).long()
    pieces = [[sound[i] for i in piece] for piece in length_sorted_pieces(tokens, None, bench.max_tokens)]
    pieces += [[*refused]] if refused else []

    def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
        if places[0] in refused:
            return [{"prompt": rows[i].written.text, "reason": refused[i]} for i in places]
        said = [rows[i].said(judge.chat) for i in places]
        prompts = [rows[i].written for i, texts in zip(places, said, strict=True) for _ in texts]
        numbers = [rows[i].row for i, texts in zip(places, said, strict=True) for _ in texts]
        flat = judge.scores(prompts, [text for texts in said for text in texts], None, numbers, bench.max_tokens)
        each = flat.split([len(texts) for texts in said])
        return [_line(rows[i], scores, calibration) for i, scores in zip(places, each, strict=True)]

    return task.each_row(judge.name, key, rows, pieces, ask, bench, lines)


def _line(row: TextRow, scores: Tensor, calibration: Calibration | None) -> dict[str, Any]:
    """What is kept of a row: the scores of its responses, or why they say nothing."""
    line = {"prompt": row.written.text, "responses": list(row.responses)}
    if not bool(torch.isfinite(scores).all()):
        return line | {"reason": f"row {row.row} has a score that is not finite"}
    if calibration is None:
        return line | {"scores": scores.tolist()}
    return line | {"scores": scores.tolist(), "raw_scores": (scores * calibration.std + calibration.mean).tolist()}


def _refusal(judge: Judge, row: TextRow) -> str:
    """Why a reward model cannot read a prompt; nothing if it can."""
    if judge.chat is None:
        return ""
    try:
        judge.chat.render(row.written.prompt, row.written.tools)
    except RefusedTurnsError as error:
        return str(error)
    return ""


def _per_row(pairs: Pairs, rows: int, values: Any, inside: Any = True) -> Array:
    """Sums over the pairs of each row, of some pairs only; rows without any are left out. `[rows, 2]`."""
    chosen = np.broadcast_to(np.asarray(inside), pairs.places.shape)
    columns: list[Any] = [
        np.bincount(pairs.places[chosen], weights=each[chosen], minlength=rows)
        for each in (pairs.weights * values, pairs.weights)
    ]
    table = np.stack(columns, axis=1)
    kept: Array = table[table[:, 1] > 0]
    return kept


def _accuracy(name: str, rows: list[TextRow], pairs: Pairs, seed: int) -> list[Result]:
    correct = pair_correct(torch.from_numpy(pairs.margins)).numpy()
    by_row = sources(rows) | _margin_levels(rows)
    groups = {group: inside[pairs.places] for group, inside in by_row.items()}
    groups |= intervals_of(pairs.lengths, "length", LENGTH_EDGES)
    found = [
        result("reward_accuracy", name, _per_row(pairs, len(rows), correct, inside), seed, group=group)
        for group, inside in groups.items()
    ]
    found.append(result("reward_margin", name, _per_row(pairs, len(rows), pairs.margins), seed))
    return [one for one in found if one is not None]


def _margin_levels(rows: list[TextRow]) -> dict[str, Any]:
    """Rows by how much people preferred their best response, if that is said: by levels, or by quarters of the rows."""
    margins = np.array([row.margin for row in rows])
    levels = np.unique(margins)
    if len(levels) <= 1:
        return {}
    if len(levels) <= _MARGIN_LEVELS:
        return {f"margin={level:g}": margins == level for level in levels}
    return intervals_of(margins, "margin", np.unique(np.quantile(margins, [0.25, 0.5, 0.75])).tolist())


def _length(name: str, pairs: Pairs, rows: int, seed: int) -> list[Result]:
    """What length alone says of the pairs, and of what the model prefers."""
    longer = pair_correct(torch.from_numpy(pairs.lengths)).numpy()  # of the better response
    correct = pair_correct(torch.from_numpy(pairs.margins)).numpy()
    agrees = correct * longer + (1 - correct) * (1 - longer)
    found = [
        result("longer_is_better", name, _per_row(pairs, rows, longer), seed),
        result("prefers_longer", name, _per_row(pairs, rows, agrees), seed),
        result("wins_longer", name, _per_row(pairs, rows, longer, correct == 1), seed),
    ]
    return [one for one in found if one is not None]


def _calibration(name: str, pairs: Pairs, rows: int, num_bins: int, seed: int) -> tuple[list[Result], list[Curve]]:
    if len(pairs.places) == 0:
        return [], []
    found = reliability(torch.from_numpy(pairs.margins), num_bins)
    sums = np.zeros((rows, num_bins, 3))
    np.add.at(sums, pairs.places, found.sums.numpy() * pairs.weights[:, None, None])  # [rows, M, 3]
    sums = sums[sums[..., 2].sum(axis=1) > 0]
    error = result(
        "calibration_error",
        name,
        sums.reshape(len(sums), -1),
        seed,
        lambda totals: expected_calibration_error(totals.reshape(*totals.shape[:-1], num_bins, 3)),
    )
    points: list[Point] = []
    counts = torch.bincount(found.bins, minlength=num_bins).tolist()
    for place, count in enumerate(counts):
        if count:
            inside = sums[sums[:, place, 2] > 0, place]
            confidence, correct, weight = inside.sum(axis=0).tolist()
            low, high = bootstrap_interval(inside[:, 1:], seed=seed) or (None, None)
            points.append((confidence / weight, correct / weight, low, high, count))
    return [error] if error else [], [Curve("reliability", name, "predicted", "observed", points)]


def _best_of(name: str, rows: list[TextRow], scores: list[list[float]], seed: int) -> list[Result]:
    """RewardBench 2's scores, where rows have four responses or more."""
    best: list[tuple[float, int]] = []
    ties: list[tuple[float, float]] = []
    sizes: list[int] = []
    for row, own in zip(rows, scores, strict=True):
        ranks = np.array(row.ranks or range(len(own)))
        is_best = ranks == ranks.min()
        if len(own) < _BEST_OF or is_best.all():
            continue
        correct, wrong = np.array(own)[is_best], np.array(own)[~is_best]
        if len(correct) == 1:
            best.append((best_of_credit(correct, wrong), 1))
            sizes.append(len(own))
        else:
            ties.append(ties_credit(correct, wrong))
    groups = {ALL: np.ones(len(best), dtype=bool)}
    if len(each := sorted({*sizes})) > 1:
        groups |= {f"responses={size}": np.array(sizes) == size for size in each}
    found = [
        result("ties_accuracy", name, [(accurate, 1) for accurate, _ in ties], seed),
        result("ties_margin", name, [(close, 1) for _, close in ties], seed),
    ]
    best_of_4 = results_by_group("best_of_4", name, best, groups, seed) if best else []
    return best_of_4 + [one for one in found if one is not None]
