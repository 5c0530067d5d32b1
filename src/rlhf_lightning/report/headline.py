"""What a run came to: numbers before and after, the best of them, and what they mean in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_lightning.report.logs import Curve
from rlhf_lightning.report.run import Run

_ENDS = 20  # a beginning and an end of training curves are a twentieth of it each
_FALL = 0.25  # of what a judge's score has gained, or of its spread, before its fall is called one
_RISE = 1.01  # of a held-out loss over its lowest, before it is called overfitting


class Headline(NamedTuple):
    """One number of a run.

    Attributes:
        label: what it is.
        metric: as it was logged.
        before: at the beginning; of training curves, which are noisy, the mean over the first twentieth. None where
            there is one value only.
        after: the same at the end.
        best: the best value; None where neither more nor less is better.
        best_at: finished steps at the best value.
        better: whether the end is better than the beginning; None where that cannot be said.
        is_share: whether it is a share, shown in percent.
    """

    label: str
    metric: str
    before: float | None
    after: float
    best: float | None
    best_at: float | None
    better: bool | None
    is_share: bool

    @property
    def course(self) -> str:
        """From the beginning to the end, as text."""
        return self.show(self.after) if self.before is None else f"{self.show(self.before)} -> {self.show(self.after)}"

    def show(self, value: float) -> str:
        """A value of this number, as text.

        Example:
            >>> Headline("Accuracy", "val/accuracy", 0.5, 0.7, 0.7, 10, True, True).show(0.7)
            '70.0%'
            >>> Headline("Loss", "val/loss", 999.6, 1.5, 1.5, 10, True, False).show(999.6)
            '1,000'
        """
        if self.is_share:
            return f"{value:.1%}".replace("100.0%", "100%")
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


_SHARES = ("accuracy", "eos_rate")
_OF_STAGES: dict[str, tuple[tuple[str, str, int], ...]] = {
    "SFT": (
        ("Held-out loss", "val/loss", -1),
        ("Held-out perplexity", "val/perplexity", -1),
        ("Training loss", "train/loss", -1),
    ),
    "Reward model": (
        ("Held-out accuracy", "val/accuracy", 1),
        ("Held-out loss", "val/loss", -1),
        ("Held-out margin", "val/margin", 0),
        ("Training loss", "train/loss", -1),
    ),
    "DPO": (
        ("Held-out accuracy", "val/accuracy", 1),
        ("Held-out margin", "val/margin", 0),
        ("Held-out loss", "val/loss", -1),
        ("Training loss", "train/loss", -1),
    ),
    "online": (
        ("Held-out judge", "judge/score", 1),
        ("Held-out score", "val/score", 1),
        ("Score in training", "train/score", 1),
        ("KL to the reference", "train/kl", 0),
        ("Response length", "train/response_length", 0),
        ("End by themselves", "train/eos_rate", 0),
    ),
    "other": (("Held-out loss", "val/loss", -1), ("Training loss", "train/loss", -1)),
}
"""For each stage its numbers, and whether more (1) or less (-1) is better."""


def headlines(run: Run) -> list[Headline]:
    """The numbers that say most about a run, those that were logged."""
    wanted = _OF_STAGES["online"] if run.is_online else _OF_STAGES.get(run.stage, _OF_STAGES["other"])
    return [
        headline
        for label, metric, direction in wanted
        if metric in run.curves and (headline := _headline(label, metric, direction, run.curves[metric]))
    ]


def _headline(label: str, metric: str, direction: int, curve: Curve) -> Headline | None:
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if not len(values):
        return None
    ends = max(1, len(values) // _ENDS) if metric.startswith("train/") else 1
    before = float(values[:ends].mean()) if len(values) > 1 else None
    after = float(values[-ends:].mean())
    best = best_at = better = None
    if direction:
        # Single steps of training are noise, whose best is luck.
        if not metric.startswith("train/"):
            place = int((direction * values).argmax())
            best, best_at = float(values[place]), float(steps[place])
        better = None if before is None or before == after else direction * (after - before) > 0
    is_share = metric.rpartition("/")[2] in _SHARES
    return Headline(label, metric, before, after, best, best_at, better, is_share)


def verdict(run: Run) -> str:
    """What the curves of a run say, in a sentence or two; empty where they say nothing for certain."""
    numbers = {headline.metric: headline for headline in headlines(run)}
    if run.is_online:
        return _online_verdict(run, numbers)
    accuracy, loss = numbers.get("val/accuracy"), numbers.get("val/loss")
    said = []
    if accuracy is not None:
        said.append(
            f"It puts {accuracy.show(accuracy.after)} of the held-out pairs in the right order; guessing gives 50%."
        )
    if loss is not None and loss.best is not None and loss.best_at is not None:
        if loss.after > loss.best * _RISE if loss.best > 0 else False:
            said.append(
                f"The held-out loss was lowest, {loss.show(loss.best)}, at step {loss.best_at:,.0f} and has risen to "
                f"{loss.show(loss.after)} since: what came after fits the training rows only."
            )
        elif loss.better:
            said.append(f"The held-out loss fell: {loss.course}.")
    return " ".join(said)


def _online_verdict(run: Run, numbers: dict[str, Headline]) -> str:
    score = numbers.get("val/score") or numbers.get("train/score")
    judge = numbers.get("judge/score")
    if score is None:
        return ""
    course = f"The score: {score.course}"
    if judge is None or judge.best is None or judge.best_at is None:
        return (
            f"{course}. That is what training was after; whether the answers are better too, a judge that training has "
            "not seen must say (rlhf evaluate, or the callback Evaluate)."
        )
    values = run.curves["judge/score"].values
    fallen = judge.best - judge.after > _FALL * float(np.nanmax(values) - np.nanmin(values))
    said = f"{course}; the held-out judge: {judge.course}"
    if fallen and score.better:
        return (
            f"{said}: over-optimised. The judge was best, {judge.show(judge.best)}, at iteration {judge.best_at:,.0f}; "
            "take a checkpoint from there, raise the KL coefficient, or lower the learning rate."
        )
    if judge.better and score.better:
        return f"{said}: the answers became better, not only the score."
    return f"{said}."


def summary_lines(run: Run, report: str = "") -> list[str]:
    """A few lines for a terminal: before and after, best values, where things lie.

    Args:
        run: as it was read.
        report: path of its report, if one was written.
    """
    lines = [f"{run.stage}: {extent(run)}"]
    numbers = headlines(run)
    width = max((len(each.label) for each in numbers), default=0)
    for each in numbers:
        best = f"   best {each.show(each.best)} at {each.best_at:,.0f}" if each.best is not None else ""
        lines.append(f"  {each.label:<{width}}  {each.course}{best}")
    places = [*([("report", report)] if report else []), *((each.what, str(each.path)) for each in run.artefacts)]
    lines += [f"  {what:<{max(width, 11)}}  {path}" for what, path in places if what in _PLACES]
    return lines


_PLACES = ("report", "export", "checkpoints", "samples")


def extent(run: Run) -> str:
    """How many steps a run made, and in what time."""
    took = f" in {duration(run.logs.seconds)}" if run.logs.seconds and run.logs.seconds >= 1 else ""
    return f"{run.steps:,} {'iteration' if run.is_online else 'step'}{'' if run.steps == 1 else 's'}{took}"


def duration(seconds: float) -> str:
    """A time as one says it.

    Example:
        >>> [duration(seconds) for seconds in (0.4, 75, 5400)]
        ['0 s', '1 min 15 s', '1 h 30 min']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs, by their dotted names; `-` where a run has none.

    Args:
        runs: to be compared.
    """
    flat = [_flat(run.settings) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    values = {name: [each.get(name, "-") for each in flat] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _flat(value: object, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        inner = (_flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items())
        return {path: text for each in inner for path, text in each.items()}
    return {name: str(value)}
