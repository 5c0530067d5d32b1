"""What each technique buys on the quickstart's task: every switch alone beside the default, several seeds.

    python benchmarks/ablations.py                # goes on where it was stopped
    python benchmarks/ablations.py --only default dual-clip --seeds 1
    python benchmarks/ablations.py --no-runs --record benchmarks/ablations.json --page docs/ablations.md

SFT and the default reward model are made once for each seed; then each switch trains what it changes, the reward model
or the last stage. A run's numbers go to `result.json` in its folder, at the end to the record that is named, and what
has been run with the same settings is not run again. Models are removed once they are judged, so that all runs take
little disk. Judge is the gold score of the toy data, on answers to 384 held-out prompts that are drawn with the same
random numbers by each model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import time
import warnings
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _switches import SWITCHES, Switch
from measuring import table

from rlhf_lightning.cli.quickstart.report import summarise, win_rate
from rlhf_lightning.cli.quickstart.stages import (
    answer,
    gold_accuracy,
    settings_of,
    train_last,
    train_reward,
    train_sft,
)
from rlhf_lightning.cli.quickstart.toy import (
    ToyPaths,
    build_toy_tokenizer,
    toy_paths,
    toy_texts,
    write_toy_data,
    write_toy_model,
)
from rlhf_lightning.warning_filters import filter_warnings

BEGIN, END = "<!-- made by `make ablations` -->\n", "<!-- end -->\n"
Result = dict[str, Any]
Results = dict[str, dict[int, Result]]
"""By the name of a switch and the seed."""


@cache
def _quickstart_settings(algorithm: str) -> str:
    others = () if algorithm == "ppo" else (f"quickstart/{algorithm}.yaml",)
    return "\n".join(repr(settings_of(stage, 1, *others)) for stage in ("sft", "reward", "policy"))


def settings_key(switch: Switch) -> str:
    """All that a run of a switch depends on but its seed: the quickstart's settings, and what is changed in them."""
    changes = repr((switch.algorithm, switch.settings, switch.reward))
    return hashlib.sha256(f"{_quickstart_settings(switch.algorithm)}\n{changes}".encode()).hexdigest()[:16]


def base_of(folder: Path, seed: int) -> tuple[ToyPaths, Path, Path, list[dict[str, Any]]]:
    """Data, SFT model, reward model and the SFT model's answers of a seed, made if they are not there."""
    data, sft, reward = toy_paths(folder / "data"), folder / "sft" / "export", folder / "reward" / "export"
    answers = folder / "sft.json"
    if not answers.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        data = write_toy_data(folder / "data", seed)
        base = write_toy_model(folder / "base", build_toy_tokenizer(toy_texts(data)), seed)
        train_sft(base, data, folder / "sft", seed)
        train_reward(sft, data, folder / "reward", seed)
        rows = answer(sft, reward, sft, data.prompts_heldout)
        answers.write_text(json.dumps(rows), encoding="utf-8")
    return data, sft, reward, json.loads(answers.read_text(encoding="utf-8"))


def run(switch: Switch, seed: int, root: Path) -> Result:
    """One run of a switch.

    Args:
        switch: what is changed.
        seed: of everything.
        root: folder of all runs.

    Returns:
        Win rate over SFT by gold, KL in nats, means of answers, processor seconds of the stages that were trained.
    """
    seeded = root / f"seed-{seed}"
    folder = seeded / "switches" / switch.name
    shutil.rmtree(folder, ignore_errors=True)
    data, sft, reward, before = base_of(seeded, seed)
    started, result = time.process_time(), {"settings": settings_key(switch)}
    if switch.reward is not None:
        reward = train_reward(sft, data, folder / "reward", seed, **switch.reward).export
        result["reward_seconds"] = time.process_time() - started
        started = time.process_time()
    settings = {"reward": reward, **switch.settings}
    by = settings.pop("reward")
    last, _ = train_last(switch.algorithm, sft, by, data, folder / "last", seed, **settings)
    result["seconds"] = time.process_time() - started
    after = answer(last.export, reward, sft, data.prompts_heldout)
    kl = sum(row["kl"] for row in after) / len(after)
    result |= {"win_rate": win_rate(*([row["gold"] for row in rows] for rows in (after, before)))}
    result |= {**summarise(after, kl=kl), "reward_accuracy": gold_accuracy(reward, data.preferences_validation)}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def report(results: Results, times: bool = False) -> str:
    """A row for each switch: its win rates and KL by seed, their means, and with `times` its processor time."""
    default = results.get("default", {})
    lines = []
    for switch in SWITCHES:
        found = results.get(switch.name, {})
        if not found:
            continue
        wins = [each["win_rate"] for each in found.values()]
        gained = gains(found, default).values()
        timed = [(each, default.get(seed, {})) for seed, each in found.items()]
        costs = [each["seconds"] / base["seconds"] for each, base in timed if "seconds" in each and "seconds" in base]
        lines.append(
            [
                f"`{switch.name}`",
                switch.what,
                " ".join(f"{100 * win:.1f}" for win in wins),
                f"{100 * mean(wins):.1f}",
                f"{round(mean(gained), 1) + 0.0:+.1f}" if gained and switch.name != "default" else "",
                f"{mean(each['kl'] for each in found.values()):.1f}",
                f"{mean(each['gold_mean'] for each in found.values()):.2f}",
                *([f"{mean(costs):.2f}" if costs else ""] if times else []),
            ]
        )
    head = [
        "switch",
        "what it sets",
        "win rate over SFT by seed, %",
        "mean",
        "to the default",
        "KL, nats",
        "gold",
        *(["time"] if times else []),
    ]
    return table(head, lines)


def gains(found: dict[int, Result], default: dict[int, Result]) -> dict[int, float]:
    """By how many points each seed's win rate differs from the default's of that seed."""
    return {
        seed: 100 * (each["win_rate"] - default[seed]["win_rate"]) for seed, each in found.items() if seed in default
    }


def picture(results: Results, path: Path) -> None:
    """What each switch gains, a row for each, the best on top: a dot for each seed, a bar at their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    default = results["default"]
    gained = {each.name: gains(results.get(each.name, {}), default) for each in SWITCHES if each.name != "default"}
    names = sorted((name for name, each in gained.items() if each), key=lambda name: mean(gained[name].values()))
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=1, zorder=0)
    for number, seed in enumerate(sorted(default)):
        places = [(gained[name][seed], row) for row, name in enumerate(names) if seed in gained[name]]
        axes.plot(*zip(*places, strict=True), "o", ms=4, color=f"C{number}", alpha=0.7, label=f"seed {seed}")
    for row, name in enumerate(names):
        axes.plot(mean(gained[name].values()), row, "|", ms=12, mew=2, color="black")
        kl = mean(each["kl"] for each in results[name].values())
        axes.annotate(f"{kl:.1f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.annotate("KL", (1.01, len(names)), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(
        ylim=(-0.7, len(names) - 0.3), xlabel="win rate over SFT less that of the default on the same seed, points"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def write(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1], encoding="utf-8")


def known(root: Path, record: Path | None, seeds: list[int]) -> Results:
    """Results of the folder and of the record, the folder's first, as far as the settings are still the same."""
    recorded = json.loads(record.read_text(encoding="utf-8")) if record and record.is_file() else {}
    found: Results = {}
    for switch in SWITCHES:
        key = settings_key(switch)
        for seed in seeds:
            path = root / f"seed-{seed}" / "switches" / switch.name / "result.json"
            own = [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
            for result in (*own, recorded.get(switch.name, {}).get(str(seed))):
                if result and result["settings"] == key:
                    found.setdefault(switch.name, {})[seed] = result
                    break
    return found


def keep(results: Results, record: Path) -> None:
    """Write results to a record, whose other seeds stay; a line for each, so that changes can be read."""
    old = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    switches = []
    for switch in SWITCHES:
        both = old.get(switch.name, {}) | {str(seed): each for seed, each in results.get(switch.name, {}).items()}
        lines = [f"    {json.dumps(seed)}: {json.dumps(both[seed])}" for seed in sorted(both, key=int)]
        if lines:
            switches.append(f"  {json.dumps(switch.name)}: {{\n" + ",\n".join(lines) + "\n  }")
    record.write_text("{\n" + ",\n".join(switches) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/ablations"), help="folder of all runs (%(default)s)")
    parser.add_argument("--only", nargs="*", choices=[each.name for each in SWITCHES], help="names of switches")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=0, help="of a run (as many as there are cores)")
    parser.add_argument("--no-runs", action="store_true", help="print what is there")
    parser.add_argument("--record", type=Path, help="results that are there already, to which those of now are added")
    parser.add_argument("--times", action="store_true", help="processor time beside the default's: of quiet machines")
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--picture", type=Path, help="draw the switches here")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    filter_warnings()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = known(options.root, options.record, options.seeds)
    for seed in [] if options.no_runs else options.seeds:
        for switch in SWITCHES:
            if (options.only and switch.name not in options.only) or seed in results.get(switch.name, {}):
                continue
            result = results.setdefault(switch.name, {})[seed] = run(switch, seed, options.root)
            print(f"seed {seed} {switch.name}: {result['win_rate']:.1%} at {result['kl']:.2f} nats", flush=True)
    results = {name: dict(sorted(each.items())) for name, each in results.items()}
    if options.record:
        keep(results, options.record)
    text = report(results, options.times)
    print(text)
    if options.page:
        write(options.page, text)
    if options.picture:
        picture(results, options.picture)


if __name__ == "__main__":
    main()
