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

from rlhf_lightning.cli.quickstart.report import plot_curves, print_answers, print_table, summarise, win_rate
from rlhf_lightning.cli.quickstart.stages import Algorithm, answer, gold_accuracy, train_last, train_reward, train_sft
from rlhf_lightning.cli.quickstart.toy import build_toy_tokenizer, toy_texts, write_toy_data, write_toy_model
from rlhf_lightning.errors import UserError
from rlhf_lightning.report import save_report
from rlhf_lightning.report.run import read_runs
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
    if out.exists() and any(out.iterdir()) and not (out / "data" / "sft.jsonl").exists():
        raise UserError(f"'{out}' is not empty and holds no quickstart; choose another --out")
    started = time.perf_counter()
    console.print(Rule("1/4 data, tokenizer and a random model, made on the spot"))
    data = write_toy_data(out / "data", seed)
    base = write_toy_model(out / "base", build_toy_tokenizer(toy_texts(data)), seed)
    console.print(Rule("2/4 supervised fine-tuning on good and bad answers"))
    sft = train_sft(base, data, out / "sft", seed)
    console.print(Rule("3/4 reward model on noisy preferences"))
    reward = train_reward(sft.export, data, out / "reward", seed)
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
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = save_report(read_runs([out / "sft", out / "reward", out / algorithm]), out / "report.html")
    print_answers(console, before, after, algorithm.upper())
    print_table(console, results)
    console.print(f"models   {sft.export}  {reward.export}  {last.export}", soft_wrap=True)
    console.print(f"report   {page}\ncurves   {out / 'curves.png'}\nnumbers  {out / RESULTS}", soft_wrap=True)
    console.print(f"{results['seconds']['total']:.0f} seconds in all")
    return results


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
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (%(default)s)")
    parser.add_argument("--algorithm", choices=[*LAST], default="ppo", help="how the run ends (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of data, weights and sampling (%(default)s)")
    parsed = parser.parse_args(args)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    filter_warnings()
    run_quickstart(parsed.out, parsed.seed, Console(), parsed.algorithm)
