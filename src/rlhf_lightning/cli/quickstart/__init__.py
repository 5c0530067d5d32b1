"""`rlhf quickstart`: all stages on text that the package generates, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from rlhf_lightning.cli.places import at_home
from rlhf_lightning.cli.quickstart.over_optimise import Course, show_over_optimisation
from rlhf_lightning.cli.quickstart.report import plot_curves, print_answers, print_table, summarise, win_rate
from rlhf_lightning.cli.quickstart.stages import (
    Algorithm,
    StageResult,
    answer,
    gold_accuracy,
    train_last,
    train_reward,
    train_sft,
)
from rlhf_lightning.cli.quickstart.toy import (
    ToyPaths,
    build_toy_tokenizer,
    is_free_for_toy_data,
    toy_paths,
    toy_texts,
    write_toy_data,
    write_toy_model,
)
from rlhf_lightning.errors import UserError
from rlhf_lightning.report import save_report
from rlhf_lightning.report.run import read_runs
from rlhf_lightning.runs.lock import locked
from rlhf_lightning.runs.whole_files import write_whole
from rlhf_lightning.runs.writable import check_folder
from rlhf_lightning.warning_filters import filter_warnings

RESULTS = "results.json"


LAST: dict[Algorithm, str] = {
    "ppo": "PPO against the reward model",
    "rloo": "RLOO against the reward model",
    "grpo": "GRPO against the reward model",
    "dpo": "DPO on the same preferences",
}
"""How the run may end."""


def run_quickstart(out: Path, seed: int, console: Console, algorithm: Algorithm = "ppo") -> dict[str, Any]:
    """Train, evaluate and report.

    Args:
        out: folder of the run.
        seed: of the data, the weights and the sampling.
        console: what is shown goes here.
        algorithm: what improves the SFT model.

    Returns:
        The numbers of `results.json`.

    Raises:
        UserError: the folder holds something else.
    """
    _check_out(out)
    started = time.perf_counter()
    data, sft, reward = _three_stages(out, seed, console)
    console.print(Rule(f"4/4 {LAST[algorithm]}"))
    last, curve = train_last(algorithm, sft.export, reward.export, data, out / algorithm, seed)
    console.print(Rule("answers to held-out prompts"))
    before, after = (answer(m.export, reward.export, sft.export, data.prompts_heldout) for m in (sft, last))
    sft_losses = {"loss": sft.metrics["val/loss"], "perplexity": sft.metrics["val/perplexity"]}
    golds = [[row["gold"] for row in rows] for rows in (after, before)]
    kl = last.metrics.get("val/kl", sum(row["kl"] for row in after) / len(after))
    results: dict[str, Any] = {
        "seed": seed,
        "algorithm": algorithm,
        "prompts": len(before),
        "sft": {**sft_losses, **summarise(before, kl=0.0)},
        "reward": {
            "accuracy_labels": reward.metrics["val/accuracy"],
            "accuracy_gold": gold_accuracy(reward.export, data.preferences_validation),
        },
        algorithm: {**summarise(after, kl=kl), "win_rate_gold": win_rate(*golds)},
        "seconds": {
            "sft": sft.seconds,
            "reward": reward.seconds,
            algorithm: last.seconds,
            "total": time.perf_counter() - started,
        },
        "models": {"sft": str(sft.export), "reward": str(reward.export), algorithm: str(last.export)},
    }
    points = [(each["kl"], each["score_mean"], each["gold_mean"]) for each in (results["sft"], results[algorithm])]
    points[1:] = curve.points or points[1:]
    plot_curves(out / "curves.png", sft.log, reward.log, last.log, points, algorithm)
    write_whole(out / RESULTS, json.dumps(results, indent=2) + "\n")
    page = save_report(read_runs([out / "sft", out / "reward", out / algorithm]), out / "report.html")
    print_answers(console, before, after, algorithm.upper())
    print_table(console, results)
    places = f"report   {page}\ncurves   {out / 'curves.png'}\nnumbers  {out / RESULTS}"
    console.print(f"models   {sft.export}  {reward.export}  {last.export}\n{places}", soft_wrap=True, markup=False)
    console.print(f"{results['seconds']['total']:.0f} seconds in all")
    return results


def run_over_optimise(out: Path, seed: int, console: Console) -> list[Course]:
    """Show over-optimisation, on the models of a quickstart that ended in the same folder, or on new ones.

    Args:
        out: folder of the run.
        seed: of the data, the weights and the sampling.
        console: what is shown goes here.

    Raises:
        UserError: the folder holds something else.
    """
    _check_out(out)
    started = time.perf_counter()
    if _is_made(out, seed):
        console.print(Rule(Text(f"with the models of '{out}'")))
    else:
        _three_stages(out, seed, console)
    data, sft, reward = toy_paths(out / "data"), out / "sft" / "export", out / "reward" / "export"
    console.print(Rule("4/4 against the reward model, as hard as it goes"))
    courses = show_over_optimisation(sft, reward, data, out, seed, console)
    console.print(f"{time.perf_counter() - started:.0f} seconds in all")
    return courses


def _check_out(out: Path) -> None:
    if not is_free_for_toy_data(out, out / "data"):
        raise UserError(f"'{out}' is not empty and holds no quickstart; choose another --out")


def _is_made(out: Path, seed: int) -> bool:
    """Whether a quickstart of this seed has ended in a folder."""
    try:
        results: Any = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("seed") == seed


def _three_stages(out: Path, seed: int, console: Console) -> tuple[ToyPaths, StageResult, StageResult]:
    """Data, the SFT model and the reward model."""
    (out / RESULTS).unlink(missing_ok=True)  # they are of the models that are replaced from here on
    console.print(Rule("1/4 data, tokenizer and a random model, made on the spot"))
    data = write_toy_data(out / "data", seed)
    base = write_toy_model(out / "base", build_toy_tokenizer(toy_texts(data)), seed)
    console.print(Rule("2/4 supervised fine-tuning on good and bad answers"))
    sft = train_sft(base, data, out / "sft", seed)
    console.print(Rule("3/4 reward model on noisy preferences"))
    return data, sft, train_reward(sft.export, data, out / "reward", seed)


def main(args: Sequence[str]) -> None:
    """Entry point of `rlhf quickstart`.

    Args:
        args: the words after `quickstart`.
    """
    parser = argparse.ArgumentParser(
        prog="rlhf quickstart",
        description="Train a tiny model from scratch through SFT, reward model and PPO, or another algorithm, on text "
        "that the package generates, and compare its answers before and after. Takes a few minutes on 2 CPU cores.",
    )
    parser.add_argument("--out", type=at_home, default=Path("runs/quickstart"), help="folder of the run (%(default)s)")
    parser.add_argument("--algorithm", choices=[*LAST], default="ppo", help="how the run ends (%(default)s)")
    parser.add_argument(
        "--over_optimise",
        action="store_true",
        help="end instead by optimising against the reward model as hard as it goes, and draw what gold says of it",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of data, weights and sampling (%(default)s)")
    parsed = parser.parse_args(args)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    filter_warnings()
    check_folder("--out", parsed.out)
    try:
        with locked(parsed.out, "--out"):
            if parsed.over_optimise:
                run_over_optimise(parsed.out, parsed.seed, Console())
            else:
                run_quickstart(parsed.out, parsed.seed, Console(), parsed.algorithm)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into code 1 and no word
            raise KeyboardInterrupt from error
        raise
