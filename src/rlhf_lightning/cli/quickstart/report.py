"""What the quickstart shows: a table, a picture, answers side by side, and the same numbers as JSON."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Points = list[tuple[float, float, float]]


def win_rate(ours: list[float], theirs: list[float]) -> float:
    """Share of pairs that the first wins; a tie counts half.

    Example:
        >>> win_rate([1.0, 2.0], [0.0, 2.0])
        0.75
    """
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return sum(wins) / len(wins)


def summarise(answers: list[dict[str, Any]], kl: float) -> dict[str, float]:
    """Means over answers.

    Args:
        answers: each with `gold`, `score`, `ended` and `tokens`.
        kl: to the reference, nats per response.
    """
    count = len(answers)
    return {
        "gold_mean": sum(row["gold"] for row in answers) / count,
        "score_mean": sum(row["score"] for row in answers) / count,
        "kl": kl,
        "eos_share": sum(row["ended"] for row in answers) / count,
        "length_mean": sum(row["tokens"] for row in answers) / count,
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    """Print the numbers of all stages.

    Args:
        console: where to.
        results: nested as in `results.json`.
    """
    algorithm = results["algorithm"]
    sft, reward, last = results["sft"], results["reward"], results[algorithm]
    stages = Table(title="Training", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("stage", "measured on held-out data", "value", "seconds"):
        stages.add_column(column, justify="right" if column in ("value", "seconds") else "left")
    seconds = results["seconds"]
    stages.add_row("SFT", "loss (nats per token)", f"{sft['loss']:.3f}", f"{seconds['sft']:.0f}")
    stages.add_row("", "perplexity", f"{sft['perplexity']:.2f}", "")
    stages.add_row(
        "reward model",
        "accuracy against the noisy labels",
        f"{reward['accuracy_labels']:.1%}",
        f"{seconds['reward']:.0f}",
    )
    stages.add_row("", "accuracy against gold", f"{reward['accuracy_gold']:.1%}", "")
    won = f"{last['win_rate_gold']:.1%}"
    stages.add_row(algorithm.upper(), "win rate over SFT by gold", won, f"{seconds[algorithm]:.0f}")
    console.print(stages)
    answers = Table(
        title=f"Answers to {results['prompts']} held-out prompts", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for column in ("", "gold score", "reward-model score", "KL to SFT (nats)", "ends with EOS", "tokens"):
        answers.add_column(column, justify="right" if column else "left")
    for name, row in (("SFT", sft), (algorithm.upper(), last)):
        answers.add_row(
            name,
            f"{row['gold_mean']:+.2f}",
            f"{row['score_mean']:+.2f}",
            f"{row['kl']:.1f}",
            f"{row['eos_share']:.1%}",
            f"{row['length_mean']:.1f}",
        )
    console.print(answers)


def print_answers(
    console: Console, sft: list[dict[str, Any]], last: list[dict[str, Any]], name_of_last: str, count: int = 5
) -> None:
    """Print the answers of both models to the same prompts.

    Args:
        console: where to.
        sft: answers of the SFT model.
        last: answers of the last model to the same prompts.
        name_of_last: how it is called.
        count: how many.
    """
    for before, after in list(zip(sft, last, strict=True))[:count]:
        console.print(f"[bold]{escape(before['prompt'].strip())}[/bold]")
        for name, row in (("SFT", before), (name_of_last, after)):
            console.print(f"  [cyan]{name}[/cyan] (gold {row['gold']:+.1f}) {escape(row['response'])}")
        console.print()


def read_curve(log: Path, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric.

    Args:
        log: CSV written by Lightning's `CSVLogger`.
        name: for instance `train/loss`.
    """
    with log.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [float(row["step"]) for row in rows], [float(row[name]) for row in rows]


def _smooth(values: list[float], width: int = 9) -> list[float]:
    windows = [values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot_curves(
    path: Path, sft_log: Path, reward_log: Path, last_log: Path, points: Points, algorithm: str = "ppo"
) -> None:
    """Draw SFT loss, reward accuracy, the course of the last stage, and gold and proxy score against KL.

    Args:
        path: the PNG.
        sft_log: CSV of the SFT stage.
        reward_log: CSV of the reward stage.
        last_log: CSV of the last stage.
        points: KL, proxy score and gold score of the SFT model and of each validation of the last stage.
        algorithm: what that was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from_pairs = algorithm == "dpo"
    shown = ("train/margin", "lead of the chosen answer") if from_pairs else ("train/score", "score of the rollout")
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, course, overview = figure.subplots(2, 2).flat
    for axes, log, name, label in (
        (loss, sft_log, "train/loss", "train"),
        (loss, sft_log, "val/loss", "held out"),
        (accuracy, reward_log, "train/accuracy", "train"),
        (accuracy, reward_log, "val/accuracy", "held out"),
        (course, last_log, *shown),
    ):
        steps, values = read_curve(log, name)
        validation = name.startswith("val/")
        axes.plot(steps, values if validation else _smooth(values), marker="o" if validation else "", label=label)
    loss.set(title="SFT", xlabel="optimizer step", ylabel="loss (nats per token)")
    accuracy.set(title="Reward model", xlabel="optimizer step", ylabel="accuracy against the labels")
    steps_of, measured = ("optimizer step", "implicit reward") if from_pairs else ("iteration", "reward-model score")
    course.set(title=algorithm.upper(), xlabel=steps_of, ylabel=measured)
    kl, proxy, gold = zip(*points, strict=True)
    overview.plot(kl, proxy, marker="o", label="reward-model score (proxy)")
    overview.plot(kl, gold, marker="s", label="gold score")
    overview.set(
        title=f"{algorithm.upper()} on held-out prompts",
        xlabel="KL to the SFT model (nats per answer)",
        ylabel="mean score",
    )
    for axes in (loss, accuracy, course, overview):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
