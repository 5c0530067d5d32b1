"""Which of several models answers better, by a judge that compares their answers to the same prompts.

Notation: N rows, M models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.chat.endpoint import Endpoint
from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import answer, prompt_pieces, prompt_was_cut, say_cut
from rlhf_lightning.evaluation.comparing import INSTRUCTIONS, EndpointJudge, Verdict, compare_scores
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.results import Curve, Lines, Result, key_of_settings
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.statistics import result
from rlhf_lightning.evaluation.task import Bench, Progress, Task, files_of
from rlhf_lightning.functional import bradley_terry, length_controlled_win_rate

_AT_ONCE = 64  # pairs between two writes of what an endpoint said
_SAMPLES = 200  # of the intervals that take a fit each


class Compared(NamedTuple):
    """Two models on the same rows.

    Attributes:
        first: whose wins are counted.
        second: the other one.
        verdicts: one for each row.
    """

    first: str
    second: str
    verdicts: list[Verdict]


@dataclass(frozen=True)
class WinRate(Task):
    """How often the judge likes the answers of one model better than those of another, a tie counting half.

    Args:
        judge: reward model, or import path of a function, that scores answers; null for the first of the rewards.
        endpoint: a chat model that compares answers, in place of a judge that scores them.
        instructions: what it is told before the answers; null for instructions of ours.
        against: one of the models, which all others are compared with; null for every pair.
        tie_margin: scores that differ by no more than this are a tie.
    """

    name: ClassVar[str] = "winrate"
    need: ClassVar[Need] = "prompts"
    judge: str | None = None
    endpoint: Endpoint | None = None
    instructions: str | None = None
    against: str | None = None
    tie_margin: float = 0.0

    def __post_init__(self) -> None:
        check_arguments(WinRate, vars(self), prefix="winrate.")
        if self.judge is not None and self.endpoint is not None:
            raise UserError("winrate.judge and winrate.endpoint both judge; give one of them")

    def check(self, bench: Bench) -> None:
        """Refuse to begin with fewer than two models, or without a judge."""
        if len(set(bench.policies)) < 2:
            raise UserError("winrate compares models; name two or more with --models")
        if self.against is not None and self.against not in bench.policies:
            raise UserError(f"winrate.against '{self.against}' is none of the models ({', '.join(bench.policies)})")
        if self.endpoint is None:
            if self.judge is None and not bench.rewards:
                raise UserError("winrate needs a judge: a reward in --rewards or winrate.judge, or winrate.endpoint")
            bench.find(self._judge_of(bench))

    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Compare the models, see `Task`."""
        models = list(dict.fromkeys(bench.policies))
        said = {model: self._answers(model, rows, bench, lines) for model in models}
        pairs = [(mine, theirs) for theirs, mine in combinations(models, 2)]
        if self.against is not None:
            pairs = [(model, self.against) for model in models if model != self.against]
        compared, results = [], []
        for first, second in pairs:
            verdicts = self._verdicts(first, second, said, rows, bench, lines)
            compared.append(Compared(first, second, verdicts))
            lengths, others = ([len(line["response"]) for line in said[model]] for model in (first, second))
            results += results_of_pair(compared[-1], lengths, others, bench.seed)
        if len(models) > 2:
            results += ranking(models, compared, bench.seed)
        return results, []

    def _judge_of(self, bench: Bench) -> Any:
        return self.judge if self.judge is not None else bench.rewards[0]

    def _answers(self, model: str, rows: list[TextRow], bench: Bench, lines: Lines) -> list[dict[str, Any]]:
        """A line for each row: the answer of a model, with its score if the judge scores."""
        policy = bench.policy(model)
        scoring = None if self.endpoint is not None else self._judge_of(bench)
        judge = None if scoring is None else bench.judge(scoring)

        def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
            asked = [rows[place] for place in places]
            answers = answer(policy, asked, bench.sampling, bench, told)
            said = [
                {
                    "prompt": row.written.text,
                    "response": one.text,
                    "ended": one.ended,
                    "cut": prompt_was_cut(policy, row, one, bench.sampling),
                }
                for row, one in zip(asked, answers, strict=True)
            ]
            return said if judge is None else with_scores(judge, asked, said, bench)

        judged_by = None if judge is None else bench.files_of_reward(judge.name)
        key = key_of_settings(self.name, files_of(model), bench.sampling, bench.seed, bench.dtype, judged_by)
        found = self.each_row(model, key, rows, prompt_pieces(rows, bench), ask, bench, lines)
        say_cut(model, found)
        return found

    def _verdicts(
        self,
        first: str,
        second: str,
        said: dict[str, list[dict[str, Any]]],
        rows: list[TextRow],
        bench: Bench,
        lines: Lines,
    ) -> list[Verdict]:
        """What the judge thinks of the answers of two models; what an endpoint says is kept, and not asked again."""
        if self.endpoint is None:
            mine, theirs = ([_number(line["score"]) for line in said[model]] for model in (first, second))
            return compare_scores(mine, theirs, self.tie_margin)
        judge = EndpointJudge(self.endpoint, self.instructions or INSTRUCTIONS)
        both = f"{first} against {second}"
        answers = [[line["response"] for line in said[model]] for model in (first, second)]
        made_by = [said[model][0]["key"] for model in (first, second)]
        key = key_of_settings(self.name, self.endpoint.asked, judge.instructions, made_by)
        known = lines.made_before(self.name, both, key)
        told = bench.report(f"{self.name} of {both} by {judge.name}", len(rows))
        verdicts = [
            Verdict(known[row.row]["win"], known[row.row]["consistent"]) if row.row in known else None for row in rows
        ]
        missing = [place for place, verdict in enumerate(verdicts) if verdict is None]
        for start in range(0, len(missing), _AT_ONCE):
            told(len(rows) - len(missing) + start)
            places = missing[start : start + _AT_ONCE]
            asked = [[texts[place] for place in places] for texts in ([r.written.text for r in rows], *answers)]
            found = judge.compare(*asked)
            new = []
            for place, verdict in zip(places, found, strict=True):
                verdicts[place] = verdict
                # Under a key that is not looked for: what stayed unjudged is asked again the next time.
                kept = key if verdict.win is not None else f"{key} unjudged"
                line = {"metric": self.name, "model": both, "row": rows[place].row, "key": kept}
                new.append({**line, **verdict._asdict()})
            lines.add(new)
        told(len(rows))
        return [verdict for verdict in verdicts if verdict is not None]


def with_scores(
    judge: Judge, rows: Sequence[TextRow], said: list[dict[str, Any]], bench: Bench, name: str = "score"
) -> list[dict[str, Any]]:
    """Lines with what a judge scores their answers.

    Args:
        judge: who scores.
        rows: B of them.
        said: B lines with `response` and `ended`.
        bench: says how much is read at once.
        name: of the score in a line.
    """
    responses, ended = [line["response"] for line in said], [line["ended"] for line in said]
    numbers = [row.row for row in rows]
    scores = judge.scores([row.written for row in rows], responses, ended, numbers, bench.max_tokens).tolist()
    return [{**line, name: score} for line, score in zip(said, scores, strict=True)]


def results_of_pair(compared: Compared, lengths: list[int], other_lengths: list[int], seed: int) -> list[Result]:
    """Win rates and what belongs to them; a row that was not judged counts for nothing but itself.

    Args:
        compared: two models.
        lengths: characters of the answers of the first, one for each row.
        other_lengths: of the second.
        seed: of the intervals.

    Raises:
        UserError: no row was judged.
    """
    model, group, verdicts = compared.first, f"against={compared.second}", compared.verdicts
    judged = [place for place, verdict in enumerate(verdicts) if verdict.win is not None]
    _say_unjudged(compared, len(judged))
    wins = torch.tensor([verdicts[place].win for place in judged], dtype=torch.float64)
    own, others = (torch.tensor(some)[judged] for some in (lengths, other_lengths))

    def at_equal_length(rows: Tensor) -> float:
        return length_controlled_win_rate(wins[rows], own[rows], others[rows])

    low, high = _interval(len(judged), at_equal_length, seed) or (None, None)
    controlled = at_equal_length(torch.arange(len(judged)))
    ties = [(float(win == 0.5), 1) for win in wins.tolist()]
    found = [
        result("win_rate", model, [(win, 1) for win in wins.tolist()], seed, group=group),
        Result("win_rate_length_controlled", model, group, controlled, low, high, len(judged)),
        result("tie_rate", model, ties, seed, group=group),
        result("unjudged", model, [(verdict.win is None, 1) for verdict in verdicts], seed, group=group),
    ]
    if consistent := [(verdict.consistent, 1) for verdict in verdicts if verdict.consistent is not None]:
        found.append(result("position_consistency", model, consistent, seed, group=group))
    return [one for one in found if one is not None]


def _say_unjudged(compared: Compared, judged: int) -> None:
    problems = Counter(verdict.problem for verdict in compared.verdicts if verdict.win is None)
    if not problems:
        return
    said = ", ".join(f"{count} {problem}" for problem, count in problems.most_common(3))
    pair, rows = f"{compared.first} against {compared.second}", len(compared.verdicts)
    if not judged:
        raise UserError(f"none of the {rows} rows of {pair} could be judged ({said}); look at the judge")
    rank_zero_warn(f"{pair}: {rows - judged} of {rows} rows are unjudged and count for neither ({said})")


def ranking(models: list[str], compared: list[Compared], seed: int) -> list[Result]:
    """Strengths of the models by Bradley and Terry, in nats, with mean 0.

    Args:
        models: M names.
        compared: their pairs, all on the same rows.
        seed: of the intervals.
    """
    place = {model: number for number, model in enumerate(models)}
    count = len(compared[0].verdicts)
    wins = torch.zeros(count, len(models), len(models), dtype=torch.float64)
    for first, second, verdicts in compared:
        for row, verdict in enumerate(verdicts):
            if verdict.win is not None:
                wins[row, place[first], place[second]] = verdict.win
                wins[row, place[second], place[first]] = 1 - verdict.win
    strengths = bradley_terry(wins.sum(dim=0)).tolist()
    bounds: Any = [[None] * len(models)] * 2
    if count > 1:
        drawn = bradley_terry(torch.stack([wins[rows].sum(dim=0) for rows in _resampled(count, seed)]))
        bounds = np.percentile(drawn.numpy(), [2.5, 97.5], axis=0).tolist()
    judged = int(wins.any(dim=-1).any(dim=-1).sum())
    columns = zip(models, strengths, *bounds, strict=True)
    return [Result("strength", model, "all", value, low, high, judged) for model, value, low, high in columns]


def _resampled(count: int, seed: int) -> list[Tensor]:
    """Rows drawn anew with replacement, several times."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(count, size=count)) for _ in range(_SAMPLES)]


def _interval(count: int, statistic: Callable[[Tensor], float], seed: int) -> tuple[float, float] | None:
    """The 95% interval of a number that is no ratio of sums over rows; None for fewer than two rows."""
    if count < 2:
        return None
    low, high = np.percentile([statistic(rows) for rows in _resampled(count, seed)], [2.5, 97.5])
    return float(low), float(high)


def _number(score: float | None) -> float:
    return float("nan") if score is None else score  # JSON has no other numbers
