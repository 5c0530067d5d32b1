"""Over-optimisation, shown: what the reward model gives and what gold gives, the further a policy moves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.evaluate import Judged
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.cli.quickstart.stages import SAMPLING, gold, train_hard
from rlhf_lightning.cli.quickstart.toy import ToyPaths
from rlhf_lightning.evaluation import Judge, Policy
from rlhf_lightning.evaluation.best_of_n import Drawing, counts_up_to, draw, fits_of
from rlhf_lightning.functional import GaoFit, GaoForm, best_of_n, best_of_n_kl

PICTURE, NUMBERS = "over_optimisation.png", "over_optimisation.json"
KL_COEFS = (0.0, 0.1)
ITERATIONS = 36
BEST_OF, BEST_OF_PROMPTS = 64, 64


class Course(NamedTuple):
    """How scores change with the distance from the SFT model.

    Attributes:
        name: of what moves the answers.
        form: of the curve that fits it.
        points: KL to the SFT model (nats), reward-model score and gold score, the start first.
    """

    name: str
    form: GaoForm
    points: list[tuple[float, float, float]]

    def fits(self, column: int) -> dict[str, Any]:
        """Both curves of Gao et al. 2022 through one of the scores.

        Args:
            column: 1 for the reward model, 2 for gold.
        """
        points = [(point[0], point[column], None, None, None) for point in self.points]
        return {**fits_of(points, "best_of_n"), **fits_of(points, "rl")}

    @property
    def best(self) -> tuple[float, float, float]:
        """The point that gold likes best."""
        return max(self.points, key=lambda point: point[2])


def show_over_optimisation(
    sft: Path, reward: Path, data: ToyPaths, out: Path, seed: int, console: Console
) -> list[Course]:
    """Optimise against the reward model as hard as it goes: by PPO with and without a KL penalty, and by best-of-n.

    Args:
        sft: export of the SFT stage.
        reward: export of the reward stage.
        data: the embedded data.
        out: folder of the run, which gets the picture and the numbers.
        seed: of all random numbers.
        console: what is shown goes here.
    """
    courses = []
    for coef in KL_COEFS:
        name = f"PPO, KL coefficient {coef:g}" if coef else "PPO without a KL penalty"
        console.print(f"[bold]{name}[/bold]")
        points = train_hard(sft, reward, data, out / f"ppo_kl_{coef:g}", seed, coef, ITERATIONS)
        courses.append(Course(name, "rl", [_point(point) for point in points]))
    console.print(f"[bold]best of {BEST_OF}[/bold]")
    courses.append(Course("best-of-n", "best_of_n", best_of_n_points(sft, reward, data, seed)))
    plot_courses(out / PICTURE, courses)
    said = [{**course._asdict(), "score": course.fits(1), "gold": course.fits(2)} for course in courses]
    (out / NUMBERS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    print_courses(console, courses)
    console.print(f"picture  {out / PICTURE}\nnumbers  {out / NUMBERS}", soft_wrap=True, markup=False)
    return courses


def _point(judged: Judged) -> tuple[float, float, float]:
    return judged.kl, judged.proxy_score, judged.score


def best_of_n_points(sft: Path, reward: Path, data: ToyPaths, seed: int) -> list[tuple[float, float, float]]:
    """KL, reward-model score and gold score of the best of n answers, from one sampling run.

    Args:
        sft: whose answers they are.
        reward: chooses the best.
        data: has the held-out prompts.
        seed: of the answers.
    """
    rows = data.prompts_heldout.read_text(encoding="utf-8").splitlines()[:BEST_OF_PROMPTS]
    prompts = [WrittenPrompt(json.loads(row)["prompt"]) for row in rows]
    answers = draw(Policy.load(sft, batch_size=256), prompts, range(len(prompts)), BEST_OF, Drawing(SAMPLING, seed))
    written = [prompt for prompt in prompts for _ in range(BEST_OF)]
    texts = [one.text for said in answers for one in said]
    ended = [one.ended for said in answers for one in said]
    scores, golds = (
        Judge.load(judge).scores(written, texts, ended).reshape(len(prompts), BEST_OF) for judge in (str(reward), gold)
    )
    return [
        (best_of_n_kl(n), float(best_of_n(scores, n).mean()), float(best_of_n(scores, n, golds).mean()))
        for n in counts_up_to(BEST_OF)
    ]


def print_courses(console: Console, courses: list[Course]) -> None:
    """Print where each course begins, where gold is best, and where it ends.

    Args:
        console: where to.
        courses: what to print.
    """
    table = Table(title="Over-optimisation", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("", "", "KL to SFT (nats)", "reward-model score", "gold score"):
        table.add_column(column, justify="right" if column else "left")
    for course in courses:
        for when, (kl, score, true) in (
            ("start", course.points[0]),
            ("gold is best", course.best),
            ("end", course.points[-1]),
        ):
            table.add_row(course.name if when == "start" else "", when, f"{kl:.1f}", f"{score:+.2f}", f"{true:+.2f}")
    console.print(table)
    for course in courses:
        if fit := course.fits(2).get(course.form):
            curve = "d (alpha - beta log d)" if course.form == "rl" else "d (alpha - beta d)"
            console.print(
                f"{course.name}: gold follows {curve} with alpha {fit['alpha']:.2f}, beta {fit['beta']:.2f} "
                f"(explains {fit['r2']:.0%})",
                highlight=False,
            )


def plot_courses(path: Path, courses: list[Course]) -> None:
    """Draw score and gold against the square root of the KL, with the curve that fits gold.

    Args:
        path: the PNG.
        courses: one panel each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(courses), sharey=True)
    for axes, course in zip(panels, courses, strict=True):
        distance = [math.sqrt(max(kl, 0.0)) for kl, _, _ in course.points]
        axes.plot(distance, [score for _, score, _ in course.points], "o-", ms=4, label="reward-model score (proxy)")
        axes.plot(distance, [true for _, _, true in course.points], "s-", ms=4, lw=0.8, color="C1", label="gold score")
        if fit := course.fits(2).get(course.form):
            curve = GaoFit(course.form, fit["alpha"], fit["beta"], fit["r2"])
            along = torch.linspace(0, max(distance), 200, dtype=torch.float64)
            name = r"d ($\alpha$ - $\beta$ log d)" if course.form == "rl" else r"d ($\alpha$ - $\beta$ d)"
            label = f"gold, {name}: {fit['alpha']:.2f}, {fit['beta']:.2f}"
            axes.plot(along, fit["start"] + curve.predict(along), "--", color="C1", label=label)
        axes.set(title=course.name, xlabel=r"d = $\sqrt{\mathrm{KL}}$ to the SFT model ($\sqrt{\mathrm{nats}}$)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    panels[0].set_ylabel("mean score on held-out prompts")
    figure.savefig(path, dpi=110)
