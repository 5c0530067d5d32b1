"""Which curves stand in which picture, whoever draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from rlhf_lightning.evaluation.results import Evaluation
from rlhf_lightning.report.logs import Curve, Numbers
from rlhf_lightning.report.run import Run
from rlhf_lightning.report.thinning import smooth, smoothing_width

Style = Literal["line", "faint", "points"]


class Line(NamedTuple):
    """One line of a picture.

    Attributes:
        label: in the legend; empty for none.
        x: `[N]`.
        y: `[N]`, finite.
        color: number of its colour.
        style: a line, a faint one behind others, or one with its points marked.
        low: lower ends of intervals, `[N]`, NaN where not known; None without.
        high: upper ends.
    """

    label: str
    x: Numbers
    y: Numbers
    color: int
    style: Style = "line"
    low: Numbers | None = None
    high: Numbers | None = None


class Chart(NamedTuple):
    """A picture.

    Attributes:
        key: its file name, without an ending.
        title: what is shown.
        note: how to read it.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        lines: those behind first.
        has_diagonal: whether x = y is shown.
    """

    key: str
    title: str
    note: str
    x_label: str
    y_label: str
    lines: list[Line]
    has_diagonal: bool = False


class Spec(NamedTuple):
    """A picture of one or several metrics over the steps of a run.

    Attributes:
        title: what is shown.
        unit: of the vertical axis.
        series: metric, without `train/` or `val/`, and what it is called where there are several.
        note: how to read it.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    note: str = ""


SPECS = {
    "score": Spec("Score", "score", (("score", ""),), "What the reward gives, before shaping. It should rise."),
    "raw_score": Spec(
        "Raw score", "raw score", (("raw_score", ""),), "What the reward model's head says, uncalibrated."
    ),
    "reward": Spec(
        "Shaped reward",
        "reward",
        (("reward", ""),),
        "The score after scaling, clipping and penalties, less the KL penalty.",
    ),
    "kl": Spec(
        "KL to the reference",
        "nats per response",
        (("kl", "k1 estimate"), ("kl_k3", "k3 estimate")),
        "How far the policy has gone. Hundreds mean collapse.",
    ),
    "entropy": Spec("Entropy", "nats per token", (("entropy", ""),), "A fall to 0 is collapse."),
    "response_length": Spec("Response length", "tokens", (("response_length", ""),), "Watch for length creep."),
    "eos_rate": Spec("Responses that end by themselves", "share", (("eos_rate", ""),)),
    "loss": Spec(
        "Loss", "loss", (("loss", ""),), "Held out, it should fall; where it rises again, the model overfits."
    ),
    "objective": Spec("Objective", "objective", (("objective", ""),), "What is minimised, all terms together."),
    "perplexity": Spec("Perplexity", "perplexity", (("perplexity", ""),)),
    "accuracy": Spec("Accuracy", "share of pairs", (("accuracy", ""),), "Pairs whose better side scores higher."),
    "margin": Spec("Margin", "chosen - rejected", (("margin", ""),)),
    "sides": Spec("Scores of both sides", "raw score", (("chosen_score", "chosen"), ("rejected_score", "rejected"))),
    "rewards": Spec(
        "Implicit rewards of both sides", "reward", (("chosen_reward", "chosen"), ("rejected_reward", "rejected"))
    ),
    "side_logprobs": Spec(
        "Log-probabilities of both sides", "nats", (("chosen_logprob", "chosen"), ("rejected_logprob", "rejected"))
    ),
    "nll": Spec("Negative log-likelihood of chosen responses", "nats per token", (("nll", ""),)),
    "value_loss": Spec("Value loss", "loss", (("value_loss", ""),)),
    "explained_variance": Spec(
        "Explained variance",
        "share",
        (("explained_variance", ""),),
        "Of the values. 1 is perfect, 0 no better than a constant.",
    ),
    "policy_loss": Spec(
        "Policy loss", "loss", (("policy_loss", ""),), "Near 0 by construction; its height says little."
    ),
    "clip_fraction": Spec("Clipped", "share", (("clip_fraction", "ratio"), ("value_clip_fraction", "value"))),
    "approx_kl": Spec(
        "KL of one iteration", "nats per token", (("approx_kl", ""),), "Above 0.1 the steps are too big."
    ),
    "no_signal": Spec("Prompts without a signal", "share", (("no_signal", ""),)),
    "score_std": Spec("Spread of the scores", "standard deviation", (("score_std", ""),)),
    "kl_coef": Spec("KL coefficient", "coefficient", (("kl_coef", ""),)),
    "lr": Spec("Learning rate", "learning rate", (("lr", "policy"), ("value_lr", "value"))),
    "grad_norm": Spec(
        "Gradient norm", "norm", (("grad_norm", "whole"), ("grad_norm_policy", "policy"), ("grad_norm_value", "value"))
    ),
    "seconds": Spec(
        "Time of an iteration",
        "seconds",
        (("seconds_generating", "generating"), ("seconds_scoring", "scoring"), ("seconds_updating", "updating")),
    ),
    "tokens_per_second": Spec("Throughput", "tokens per second", (("tokens_per_second", ""),)),
    "memory_gib": Spec("Memory", "GiB", (("memory_gib", ""),), "The most that the first process has held so far."),
    "padding_share": Spec("Padding", "share", (("padding_share", ""),)),
}
"""Pictures in the order in which they are shown; what else was logged comes after them."""

MAIN = (
    *("score_against_kl", "score", "reward", "kl", "loss", "accuracy"),
    *("response_length", "entropy", "eos_rate", "margin"),
)
"""Pictures that are shown at once and lie beside the page as PNG; the others are behind a click."""

_DRAWN = {metric for spec in SPECS.values() for metric, _ in spec.series} | {"ratio"}
PARTS = {"train": "training", "val": "held out", "judge": "judge"}


def curve_charts(runs: Sequence[Run]) -> list[Chart]:
    """Pictures of everything that runs of one stage logged: of one run, or of several over one another.

    Args:
        runs: of the same stage.
    """
    specs = {key: spec for spec_key, spec in SPECS.items() for key, spec in _split(spec_key, spec, len(runs) > 1)}
    for name in (name for run in runs for name in run.curves):
        metric = name.partition("/")[2] or name
        if metric not in _DRAWN:
            specs.setdefault(metric, Spec(metric, metric, ((metric, ""),)))
    charts = [_over_steps(_file_name(key), spec, runs) for key, spec in specs.items()]
    return [chart for chart in charts if chart.lines]


def _split(key: str, spec: Spec, several_runs: bool) -> Iterator[tuple[str, Spec]]:
    """A picture of several metrics as one for each, where each shows several runs."""
    if not several_runs or len(spec.series) == 1:
        yield key, spec
        return
    for metric, label in spec.series:
        yield metric, spec._replace(title=f"{spec.title}: {label}", series=((metric, label),))


def _over_steps(key: str, spec: Spec, runs: Sequence[Run]) -> Chart:
    lines: list[Line] = []
    lost = 0
    for run_number, run in enumerate(runs):
        names = [(metric, label, part) for metric, label in spec.series for part in (*PARTS, "")]
        names = [each for each in names if _named(each[2], each[0]) in run.curves]
        for number, (metric, label, part) in enumerate(names):
            logged = run.curves[_named(part, metric)]
            curve = _finite(logged)
            lost += len(logged.steps) - len(curve.steps)
            if not len(curve.steps):
                continue
            if len(runs) > 1:
                legend, color = run.name if number == 0 else "", run_number
            else:
                legend, color = _legend(names, label, part), number
            lines += _drawn(curve, legend, color, with_raw=len(runs) == 1, marked=part in ("val", "judge"))
    lines.sort(key=lambda line: _ORDER[line.style])
    note = f"{spec.note} {lost:,} values that are not finite are left out.".strip() if lost else spec.note
    if len(runs) > 1 and {line.style for line in lines} >= {"line", "points"}:
        note = f"{note} Marked points are held out.".strip()
    return Chart(key, spec.title, note, "iteration" if runs[0].is_online else "optimizer step", spec.unit, lines)


_ORDER: dict[Style, int] = {"faint": 0, "line": 1, "points": 2}


def _legend(names: list[tuple[str, str, str]], label: str, part: str) -> str:
    """What tells a line of one run from the others in its picture."""
    words = [
        label if len({each[0] for each in names}) > 1 else "",
        PARTS.get(part, "") if len({each[2] for each in names}) > 1 else "",
    ]
    return ", ".join(filter(None, words))


def _named(part: str, metric: str) -> str:
    return f"{part}/{metric}" if part else metric


def _finite(curve: Curve) -> Curve:
    kept = np.isfinite(curve.values)
    return Curve(curve.steps[kept], curve.values[kept])


def _drawn(curve: Curve, label: str, color: int, with_raw: bool, marked: bool) -> Iterator[Line]:
    """A curve as lines: a long one smoothed, before a faint one of what was logged."""
    width = smoothing_width(len(curve.steps))
    if marked and width == 1:
        yield Line(label, curve.steps, curve.values, color, "points")
        return
    if with_raw and width > 1:
        yield Line("", curve.steps, curve.values, color, "faint")
    label = f"{label}, mean over {width}" if label and with_raw and width > 1 else label
    yield Line(label, curve.steps, smooth(curve.values, width), color)


def score_against_kl(runs: Sequence[Run]) -> Chart | None:
    """Score over the root of the KL, where over-optimisation shows: the score goes on rising, the judge's falls.

    Args:
        runs: of the same stage.

    Returns:
        The picture; None where no run has both.
    """
    lines: list[Line] = []
    for number, run in enumerate(runs):
        for part, label in (("train", "score in training"), ("val", "score held out"), ("judge", "held-out judge")):
            if not {f"{part}/score", f"{part}/kl"} <= run.curves.keys():
                continue
            kl, score = _together(run.curves[f"{part}/kl"], run.curves[f"{part}/score"])
            width = smoothing_width(len(kl))
            x, y = (each[:: max(1, len(kl) // 300)] for each in (smooth(kl, width), smooth(score, width)))
            color = number if len(runs) > 1 else len(lines)
            words = [run.name if len(runs) > 1 else "", label]
            style: Style = "line" if part == "train" else "points"
            lines.append(Line(": ".join(filter(None, words)), np.sqrt(np.maximum(x, 0)), y, color, style))
    if not lines:
        return None
    note = "Each point is a moment of the run. A judge that falls while the score rises is over-optimisation."
    if not any("judge" in line.label for line in lines):
        note = "Each point is a moment of the run. Whether the answers are better, too, only a judge can say."
    return Chart("score_against_kl", "Score against KL", note, "√KL (√nats per response)", "score", lines)


def _together(one: Curve, other: Curve) -> tuple[Numbers, Numbers]:
    """Values of two curves at the steps that both have, finite ones."""
    _, first, second = np.intersect1d(one.steps, other.steps, return_indices=True)
    values = one.values[first], other.values[second]
    kept = np.isfinite(values[0]) & np.isfinite(values[1])
    return values[0][kept], values[1][kept]


def evaluation_charts(evaluations: Sequence[Evaluation]) -> list[Chart]:
    """The curves of evaluations, those of one metric and the same axes in one picture.

    Args:
        evaluations: as `rlhf evaluate` found them.
    """
    charts: dict[tuple[str, str, str], Chart] = {}
    for curve in (curve for evaluation in evaluations for curve in evaluation.curves):
        # An array of floats has NaN where a point has None.
        points = np.array([point[:4] for point in curve.points], dtype=np.float64).reshape(-1, 4)
        points = points[np.isfinite(points[:, :2]).all(axis=1)]
        if not len(points):
            continue
        axes = (curve.metric, curve.x, curve.y)
        is_first = all(other[0] != curve.metric or other == axes for other in charts)
        key = _file_name(curve.metric if is_first else "_".join(axes))
        is_reliability = curve.metric == "reliability"
        note = _RELIABILITY if is_reliability else ""
        empty = Chart(key, _title(curve.metric), note, curve.x, curve.y, [], has_diagonal=is_reliability)
        lines = charts.setdefault(axes, empty).lines
        columns = points[np.argsort(points[:, 0], kind="stable")].T
        lines.append(Line(curve.model, columns[0], columns[1], len(lines), "points", columns[2], columns[3]))
    return list(charts.values())


_RELIABILITY = (
    "Of the pairs to which the reward model gives a chance of x that the chosen side is better, the share where it is. "
    "On the diagonal its chances can be taken at their word; below it, it is too sure."
)


def _title(metric: str) -> str:
    return metric.replace("_", " ").replace("-", " ").capitalize()


def _file_name(key: str) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in key)
