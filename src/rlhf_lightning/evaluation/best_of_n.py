"""Best-of-n: what choosing the best of n answers by a reward gains, and policies trained against it beside that.

Notation: B prompts, N answers to each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.arguments import AT_LEAST_1, check_arguments
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import prompt_pieces
from rlhf_lightning.evaluation.policy import Answer, Policy
from rlhf_lightning.evaluation.results import Curve, Lines, Point, Result, key_of_settings
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.statistics import result
from rlhf_lightning.evaluation.task import Bench, Progress, Task, files_of, name_of
from rlhf_lightning.functional import GaoForm, best_of_n, best_of_n_kl, fit_gao, kl_estimate
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.tokenizer import same_tokenizer


@dataclass(frozen=True)
class BestOfN(Task):
    """Score of the best of n answers for n = 1, 2, 4 .. `samples`, from one sampling run, against its KL.

    The answers are those of the reference, or of the first model where there is none. The other models, such as the
    checkpoints of a PPO run, are measured beside it: their score, and their KL to the same model.

    Args:
        samples: answers drawn to each prompt.
        proxy: reward model, or import path of a function, that the best is chosen by; null for the first of the
            rewards.
        judge: another one, which says what the chosen answer is worth; null for the second of the rewards, if any.
    """

    name: ClassVar[str] = "best_of_n"
    need: ClassVar[Need] = "prompts"
    samples: int = 64
    proxy: str | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        check_arguments(BestOfN, vars(self), {"samples": AT_LEAST_1}, "best_of_n.")

    def check(self, bench: Bench) -> None:
        """Refuse to begin without a model, a reward, or randomness."""
        if bench.reference is None:
            bench.check_policies(self.name)
        if self.proxy is None:
            bench.check_rewards(self.name)
        for reward in self._rewards(bench).values():
            bench.find(reward)
        if bench.sampling.temperature == 0:
            raise UserError("best_of_n chooses among answers that are drawn; set sampling.temperature above 0")

    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Measure best-of-n, and every other model, see `Task`."""
        base = bench.reference if bench.reference is not None else bench.policies[0]
        results, curves = self._best(base, rows, bench, lines)
        others = [model for model in bench.policies if model != base]
        found = {model: self._policy(model, base, rows, bench, lines) for model in dict.fromkeys(others)}
        for model, said in found.items():
            results.append(_mean("kl_k1", model, [line["k1"] for line in said], bench.seed, f"against={base}"))
            results += [_mean(name, model, [line[name] for line in said], bench.seed) for name in self._rewards(bench)]
        for curve in curves.copy() if found else []:
            start = curve.points[0]
            points = sorted((_policy_point(curve.y, said, bench.seed) for said in found.values()), key=_kl_of)
            fits = fits_of([start, *points], "rl")
            curves.append(Curve("policies", base, curve.x, curve.y, points, fits))
        return results, curves

    def _rewards(self, bench: Bench) -> dict[str, Any]:
        """Who gives each score of an answer."""
        given = [*bench.rewards, None, None]
        proxy = given[0] if self.proxy is None else self.proxy
        judge = given[1] if self.judge is None else self.judge
        return {"score": proxy, **({} if judge is None else {"judge_score": judge})}

    def _best(self, base: str, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        policy = bench.policy(base)

        def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
            asked = [rows[place] for place in places]
            answers = draw(policy, [r.written for r in asked], [r.row for r in asked], self.samples, bench)
            told(len(places) / 2)
            scores = self._scores(asked, answers, bench)
            return [
                {
                    "prompt": row.written.text,
                    "responses": [one.text for one in said],
                    **{name: per_row[place].tolist() for name, per_row in scores.items()},
                }
                for place, (row, said) in enumerate(zip(asked, answers, strict=True))
            ]

        key = self._key(base, bench, self.samples)
        said = self.each_row(base, key, rows, pieces_of_several(rows, self.samples, bench), ask, bench, lines)
        table = {name: torch.tensor([line[name] for line in said]) for name in self._rewards(bench)}
        results, curves = [], []
        for name, values in table.items():
            gained = {n: best_of_n(table["score"], n, values).tolist() for n in counts_up_to(self.samples)}
            each = [_mean(f"best_of_n_{name}", base, some, bench.seed, f"n={n}") for n, some in gained.items()]
            points: list[Point] = [
                (best_of_n_kl(n), one.value, one.low, one.high, one.count) for n, one in zip(gained, each, strict=True)
            ]
            results += each
            curves.append(Curve("best_of_n", base, "kl", name, points, fits_of(points, "best_of_n")))
        return results, curves

    def _policy(self, model: str, base: str, rows: list[TextRow], bench: Bench, lines: Lines) -> list[dict[str, Any]]:
        """One answer of a model to each prompt, with its scores and its KL."""
        policy, start = bench.policy(model), bench.policy(base)
        if not same_tokenizer(policy.tokenizer, start.tokenizer):
            raise UserError(f"{model} and {base} have different tokenizers, so there is no KL between them")

        def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
            asked = [rows[place] for place in places]
            answers = draw(policy, [r.written for r in asked], [r.row for r in asked], 1, bench)
            told(len(places) / 2)
            scores, kls = self._scores(asked, answers, bench), _kls(policy, start, [one for (one,) in answers], bench)
            return [
                {
                    "prompt": row.written.text,
                    "response": one.text,
                    "k1": kls[place],
                    **{name: float(per_row[place]) for name, per_row in scores.items()},
                }
                for place, (row, (one,)) in enumerate(zip(asked, answers, strict=True))
            ]

        key = self._key(model, bench, files_of(base))
        return self.each_row(model, key, rows, prompt_pieces(rows, bench), ask, bench, lines)

    def _scores(self, rows: Sequence[TextRow], answers: list[list[Answer]], bench: Bench) -> dict[str, Tensor]:
        """What each reward says of the answers, `[B, N]`."""
        said = [
            Scored(row.row, row.written, one.text, one.ended)
            for row, each in zip(rows, answers, strict=True)
            for one in each
        ]
        return {
            name: scores_of(reward, said, bench).reshape(len(rows), -1) for name, reward in self._rewards(bench).items()
        }

    def _key(self, model: str, bench: Bench, *more: Any) -> str:
        rewards = {name: bench.files_of_reward(reward) for name, reward in self._rewards(bench).items()}
        return key_of_settings(self.name, files_of(model), bench.sampling, bench.seed, bench.dtype, rewards, more)


class Scored(NamedTuple):
    """An answer that is to be scored.

    Attributes:
        row: number of its prompt.
        prompt: what was answered.
        response: what was said.
        ended: whether it ended by itself.
    """

    row: int
    prompt: WrittenPrompt
    response: str
    ended: bool


def scores_of(reward: str | RewardFunction, answers: Sequence[Scored], bench: Bench) -> Tensor:
    """What a reward says of answers, `[B]`, float32.

    Args:
        reward: one of the bench's judges.
        answers: B of them.
        bench: loads it, and says how much is read at once.

    Raises:
        UserError: a score that is not finite.
    """
    rows, prompts, responses, ended = ([*column] for column in zip(*answers, strict=True))
    found = bench.judge(reward).scores(prompts, responses, ended, rows, bench.max_tokens)
    if not bool(torch.isfinite(found).all()):
        row = rows[int((~torch.isfinite(found)).nonzero()[0])]
        raise UserError(f"{name_of(reward)} gives row {row} a score that is not finite; look at the reward")
    return found


def pieces_of_several(rows: Sequence[TextRow], samples: int, bench: Bench) -> list[list[int]]:
    """Places of rows that are answered together, each several times.

    Args:
        rows: all of them.
        samples: answers to each.
        bench: says how many answers at once.
    """
    size = max(1, bench.batch_size // samples)
    return [piece[i : i + size] for piece in prompt_pieces(rows, bench) for i in range(0, len(piece), size)]


class Drawing(NamedTuple):
    """How answers are drawn, where there is no bench.

    Attributes:
        sampling: how.
        seed: of all of them.
    """

    sampling: Sampling
    seed: int


def draw(
    policy: Policy, prompts: Sequence[WrittenPrompt], rows: Sequence[int], samples: int, how: Bench | Drawing
) -> list[list[Answer]]:
    """Several answers to each prompt, each by random numbers of its own.

    Args:
        policy: who answers.
        prompts: B of them.
        rows: the number of each.
        samples: N.
        how: sampling and seed.

    Returns:
        For each prompt N answers.
    """
    places = [("best of n", row, sample) for row in rows for sample in range(samples)]
    repeated = [written for written in prompts for _ in range(samples)]
    answers = policy.answer(repeated, how.sampling, policy.row_generators(how.seed, places))
    return [answers[start : start + samples] for start in range(0, len(answers), samples)]


def counts_up_to(samples: int) -> list[int]:
    """1, 2, 4 and so on, and the number of samples itself.

    Example:
        >>> counts_up_to(6)
        [1, 2, 4, 6]
    """
    return [*(2**power for power in range((samples - 1).bit_length())), samples]


def fits_of(points: Sequence[Point], form: GaoForm) -> dict[str, Any]:
    """A curve of Gao et al. 2022 through points, by its name; nothing where the points leave it open.

    Args:
        points: KL and score, that of the start first.
        form: which.
    """
    known = [(x, y) for x, y, *_ in points if x is not None and y is not None]
    distance = torch.tensor([math.sqrt(max(x, 0.0)) for x, _ in known], dtype=torch.float64)
    score = torch.tensor([y - known[0][1] for _, y in known], dtype=torch.float64)
    if len(distance[distance > 0].unique()) < 2:
        return {}
    fit = fit_gao(distance, score, form)
    peak = fit.peak if math.isfinite(fit.peak) else None
    return {form: {"alpha": fit.alpha, "beta": fit.beta, "r2": fit.r2, "start": known[0][1], "peak": peak}}


def _kls(policy: Policy, start: Policy, answers: list[Answer], bench: Bench) -> list[float]:
    """The k1 estimate of the KL of each answer, nats."""
    prompts, said = [one.prompt_ids for one in answers], [one.ids for one in answers]
    own, other = (
        each.logprobs(prompts, said, bench.sampling.temperature, bench.max_tokens) for each in (policy, start)
    )
    return [float(kl_estimate(mine, theirs).sum()) for mine, theirs in zip(own, other, strict=True)]


def _mean(metric: str, model: str, values: list[float], seed: int, group: str = "all") -> Result:
    found = result(metric, model, [(value, 1) for value in values], seed, group=group)
    assert found is not None, "there is a row"
    return found


def _policy_point(name: str, said: list[dict[str, Any]], seed: int) -> Point:
    score = _mean(name, "", [line[name] for line in said], seed)
    return float(np.mean([line["k1"] for line in said])), score.value, score.low, score.high, score.count


def _kl_of(point: Point) -> float:
    return point[0] or 0.0
