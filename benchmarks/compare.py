"""Ours and the peer by turns: the same rows in the same order, batch shape, precision and optimizer; what each takes.

    python benchmarks/compare.py --stage sft --model FOLDER --data FILE --peer-python TRL_ENV/bin/python
    python benchmarks/compare.py --stage generate --model FOLDER --data FILE
    python benchmarks/compare.py --make-peer-env FOLDER [--peer-packages trl==1.12.0 peft] [--torch torch==2.13.0]

Each run is a process of its own. Tokens are counted once, here, in the rows that both are given (real tokens, never
padding); the run stops if a side saw others. Prints Markdown. Linux only: memory is read from /proc. See README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from measuring import GIB, machine, median, steady, table

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "peer")
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LEARNING_RATE = {"sft": 1e-5, "reward": 1e-5, "ppo": 2e-6, "generate": 0.0}
TARGETS = {"sft": (2.5, 0.6), "reward": (3.0, 0.5), "ppo": (3.0, 0.5), "lora": (4.0, 0.2), "generate": (1.8, None)}
"""How many times as fast, and in what share of the memory, we want to be."""


class Side(NamedTuple):
    """All runs of one side, in order."""

    name: str
    runs: list[dict[str, Any]]

    def seconds(self, warmup: int, clock: str = "seconds") -> list[float]:
        """Of every step that counts, of all runs."""
        return list(itertools.chain.from_iterable(steady(run[clock], warmup) for run in self.runs))

    def most(self, what: str) -> float:
        """The largest of all runs."""
        return float(max(run[what] for run in self.runs))


# Setting up


def make_peer_environment(folder: Path, torch: str, packages: list[str], index: list[str]) -> None:
    """A virtual environment of the peer's own, so that its pins never touch ours."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", *index]
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, torch, *packages], check=True)  # pinned again, or pip may fetch another build
    print(f"use --peer-python {folder / 'bin' / 'python'}")


def find_peer(options: argparse.Namespace) -> Path | None:
    """The Python of the peer; None where it is in our environment: plain transformers, or our best options."""
    if options.stage == "generate" or (options.as_shipped and not (options.peer_python or options.peer_env)):
        return None
    python = options.peer_python or (options.peer_env and options.peer_env / "bin" / "python")
    if python is None or not Path(python).is_file():
        needed = "trl==1.12.0" if options.stage == "ppo" else "trl"
        sys.exit(
            f"no peer at '{python}': make one with `python benchmarks/compare.py --make-peer-env FOLDER "
            f"--peer-packages {needed} peft`, then pass --peer-env FOLDER"
        )
    return Path(python)


def make_job(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything both sides are told."""
    names = ("stage", "steps", "rows", "max_length", "max_prompt_length", "new_tokens", "precision", "device", "seed")
    return {
        **{
            name: getattr(options, name)
            for name in (*names, "variant", "eos", "temperature", "peer_settings", "peer_value")
        },
        "model": str(options.model.resolve()),
        "data": str(options.data.resolve()),
        "learning_rate": options.learning_rate or LEARNING_RATE[options.stage],
        "as_shipped": options.as_shipped,
        "ours_options": dict(map(read_option, options.ours_options)),
        "lora": LORA,
        "work": str(work),
        "cache": str(work / "cache"),
        "rows_file": str(work / "rows.jsonl"),
        "reward": str(work / "reward"),
        "reward_adapter": str(work / "reward_adapter"),
    }


def read_option(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        sys.exit(f"--ours-options takes NAME=VALUE, not '{text}'")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


# Running


def run_process(command: list[Any], threads: int) -> None:
    """Run a script; its output is shown only where it fails."""
    count = str(threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-8000:]}")


def run_sides(options: argparse.Namespace, job_file: Path, work: Path, peer: Path | None) -> dict[str, Side]:
    """Ours, the peer, ours, the peer, and so on."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number, side in itertools.product(range(options.rounds), SIDES):
        report = work / f"{side}_{number}.json"
        if peer is None:
            script = "_generate.py" if options.stage == "generate" else "_ours.py"
            command = [sys.executable, HERE / script, job_file, report, side]
        else:
            command = [sys.executable if side == "ours" else peer, HERE / f"_{SCRIPTS[side]}.py", job_file, report]
        run_process(command, options.threads)
        runs[side].append(json.loads(report.read_text(encoding="utf-8")))
        seconds = median(steady(runs[side][-1]["seconds"], options.warmup))
        print(f"round {number + 1}, {side}: {seconds:.3f} s a step", file=sys.stderr, flush=True)
    return {side: Side(runs[side][0]["name"], runs[side]) for side in SIDES}


SCRIPTS = {"ours": "ours", "peer": "trl"}


def tokens_of_steps(job: dict[str, Any]) -> list[int]:
    """Real tokens of the rows of each step."""
    names = ("input_ids", "chosen_ids", "rejected_ids")
    lines = Path(job["rows_file"]).read_text(encoding="utf-8").splitlines()
    lengths = [sum(len(row.get(name, ())) for name in names) for row in map(json.loads, lines)]
    steps = [sum(lengths[start : start + job["rows"]]) for start in range(0, len(lengths), job["rows"])]
    return steps * job["steps"] if job["stage"] == "generate" else steps


def check_tokens(sides: dict[str, Side], expected: list[int]) -> None:
    """Both sides saw the rows of the file, step by step, and nothing else."""
    for side, number in itertools.product(sides.values(), range(len(sides["ours"].runs))):
        seen = side.runs[number]["tokens"][: len(expected)]
        if seen != expected:
            sys.exit(f"{side.name} saw {seen} real tokens in its steps, the rows hold {expected}")


# Telling


def comparison(sides: dict[str, Side], job: dict[str, Any], tokens: list[int], warmup: int) -> str:
    """Speed and memory of both, and the ratios."""
    ours, peer = sides["ours"], sides["peer"]
    per_step = median([float(count) for count in tokens])
    new = job["rows"] * job["new_tokens"]
    counted = {"ppo": per_step + new, "generate": float(new)}.get(job["stage"], per_step)
    seconds = {side: each.seconds(warmup) for side, each in sides.items()}
    medians = {side: median(each) for side, each in seconds.items()}
    cpu = {side: median(each.seconds(warmup, "cpu_seconds")) for side, each in sides.items()}
    # Steps differ in length, so the rate is over all of them: tokens of the steps that count by their time.
    total = {side: sum(each) for side, each in seconds.items()}
    counts = [counted] * len(tokens) if job["stage"] in ("ppo", "generate") else list(map(float, tokens))
    if job["stage"] == "ppo":
        counts = [count + new for count in tokens]
    all_tokens = sum(steady(counts, warmup)) * len(ours.runs)
    rates = {side: all_tokens / total[side] for side in SIDES}
    unit = "new tokens/s" if job["stage"] == "generate" else "real tokens/s"
    rows = [
        ["seconds a step, median", *(f"{medians[side]:.3f}" for side in SIDES), ratio(medians)],
        ["fastest to slowest", *(f"{min(seconds[side]):.3f} to {max(seconds[side]):.3f}" for side in SIDES), ""],
        ["processor seconds a step, median", *(f"{cpu[side]:.3f}" for side in SIDES), ratio(cpu)],
        [unit, *(f"{rates[side]:,.0f}" for side in SIDES), f"**{rates['ours'] / rates['peer']:.2f}** times"],
        memory_row("peak memory of the process", sides, "peak"),
        memory_row("libraries, part of it", sides, "libraries"),
    ]
    above = {side: each.most("peak") - each.most("libraries") for side, each in sides.items()}
    rows.append(
        [
            "peak above the libraries",
            *(f"{above[side] / GIB:.2f} GiB" for side in SIDES),
            share(above["ours"], above["peer"]),
        ]
    )
    if job["device"] == "cuda":
        rows.append(memory_row("peak allocated on the GPU", sides, "device_peak"))
    return table(["", ours.name, peer.name, "ours to theirs"], rows)


def ratio(seconds: dict[str, float]) -> str:
    """How many times as fast ours is."""
    return f"{seconds['peer'] / seconds['ours']:.2f} times as fast"


def share(ours: float, peer: float) -> str:
    """Ours as a part of theirs."""
    return f"**{ours / peer:.2f}**" if peer else "-"


def memory_row(name: str, sides: dict[str, Side], what: str) -> list[str]:
    """One kind of memory of both."""
    values = [sides[side].most(what) for side in SIDES]
    return [name, *(f"{value / GIB:.2f} GiB" for value in values), share(*values)]


def curves(sides: dict[str, Side], stage: str) -> str:
    """What both logged, step by step, of their first runs."""
    logged = {side: each.runs[0]["metrics"] for side, each in sides.items()}
    names = [name for name in logged["ours"] if name in logged["peer"]]
    if not names:
        return ""
    columns = [(f"{name}, {side}", logged[side][name]) for name in names for side in SIDES]
    steps = min(len(values) for _, values in columns)
    rows = [[str(step + 1), *(f"{values[step]:.4f}" for _, values in columns)] for step in range(steps)]
    text = table(["step", *(head for head, _ in columns)], rows)
    if stage in ("sft", "reward"):
        apart = max(abs(a - b) for a, b in zip(logged["ours"]["loss"], logged["peer"]["loss"], strict=False))
        return f"{text}\nThe losses are at most {apart:.5f} apart.\n"
    return (
        f"{text}\nResponses are drawn at random, so these agree in size only, unless --temperature is as good as 0.\n"
        if stage == "ppo"
        else ""
    )


def settings(sides: dict[str, Side], job: dict[str, Any], tokens: list[int], options: argparse.Namespace) -> str:
    """What was run, in words."""
    shape = f"up to {job['max_length']} tokens"
    if job["stage"] in ("ppo", "generate"):
        shape = f"prompts of up to {job['max_prompt_length']} tokens, {job['new_tokens']} new tokens"
    versions = [", ".join(f"{name} {number}" for name, number in sides[s].runs[0]["versions"].items()) for s in SIDES]
    chosen = [json.dumps(sides[side].runs[0]["settings"]) for side in SIDES]
    model = Path(job["model"]).name
    lines = [
        f"{machine()}; {options.threads} threads, {job['precision']}.",
        f"Model {model}; {job['rows']} rows a step ({shape}; {sum(tokens) / len(tokens):,.0f} real tokens on average); "
        f"{job['steps']} steps of which the first {options.warmup} do not count, {options.rounds} rounds by turns.",
        f"Ours: {versions[0]}; {chosen[0]}.",
        f"Peer: {versions[1]}; {chosen[1]}.",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def report(sides: dict[str, Side], job: dict[str, Any], tokens: list[int], options: argparse.Namespace) -> str:
    """The whole text."""
    variant = f", {job['variant']}" if job["stage"] == "ppo" else ""
    speed, memory = TARGETS["lora" if job["stage"] == "ppo" and job["variant"] == "lora" else job["stage"]]
    wanted = f"Target: {speed} times as fast" + (f", {memory} of the memory.\n" if memory else ".\n")
    if sides["peer"].name == "rlhf_lightning":
        wanted = "Target: no more than a tenth slower than the best options.\n"
    parts = [
        f"## {job['stage']}{variant}, against {sides['peer'].name}\n",
        settings(sides, job, tokens, options),
        comparison(sides, job, tokens, options.warmup),
        wanted,
        curves(sides, job["stage"]),
    ]
    return "\n".join(part for part in parts if part)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["sft", "reward", "ppo", "generate"])
    parser.add_argument("--model", type=Path, help="Hugging Face folder both start from")
    parser.add_argument("--data", type=Path, help="preference pairs, such as Anthropic HH; SFT takes the chosen side")
    parser.add_argument("--peer-python", type=Path, help="Python of the peer's environment")
    parser.add_argument("--peer-env", type=Path, help="the same as its folder")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (decoding: runs) (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, by turns (%(default)s)")
    parser.add_argument("--rows", type=int, help="rows a step (8; decoding: 32)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row (%(default)s)")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of a response (%(default)s)")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both (%(default)s)")
    parser.add_argument("--learning-rate", type=float, help="of both; by default as is usual for the stage")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--variant",
        choices=["full", "shared", "lora"],
        default="full",
        help="of our PPO: a value "
        "model of its own, on the policy's trunk, or adapters on one base; lora also for the peer",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="PPO: of both; near 0 the responses agree too")
    parser.add_argument(
        "--eos",
        choices=["fixed", "stop"],
        default="fixed",
        help="PPO: every response has its full length, or ends where it ends (%(default)s)",
    )
    parser.add_argument(
        "--peer-settings",
        choices=["fast", "default"],
        default="fast",
        help="without gradient checkpointing, or as TRL comes, with it (%(default)s)",
    )
    parser.add_argument(
        "--peer-value",
        choices=["lora", "full"],
        default="lora",
        help="the peer's value model in the variant lora: with adapters too, or trained whole (%(default)s)",
    )
    parser.add_argument("--ours-options", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of our module")
    parser.add_argument(
        "--as-shipped",
        action="store_true",
        help="ours computes its steps as the recipe of the stage does; without a peer, beside our best options",
    )
    parser.add_argument("--markdown", type=Path, help="append the report to this file too")
    parser.add_argument("--work", type=Path, help="folder for everything written; by default a temporary one")
    parser.add_argument(
        "--make-peer-env", type=Path, metavar="FOLDER", help="make an environment for the peer, and end"
    )
    parser.add_argument("--torch", default="torch==2.13.0", help="its torch, as for pip (%(default)s)")
    parser.add_argument("--peer-packages", nargs="+", default=["trl", "peft"], help="what else it holds (trl peft)")
    parser.add_argument("--index-url", help="where pip looks, for instance for a torch without CUDA")
    options = parser.parse_args()
    if options.make_peer_env is None and not (options.stage and options.model and options.data):
        parser.error("--stage, --model and --data are needed")
    options.rows = options.rows or (32 if options.stage == "generate" else 8)
    return options


def main() -> None:
    """Prepare, run by turns, check, tell."""
    options = parse()
    if options.make_peer_env:
        index = ["--index-url", options.index_url] if options.index_url else []
        make_peer_environment(options.make_peer_env, options.torch, options.peer_packages, index)
        return
    peer = find_peer(options)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        job = make_job(options, work)
        job_file = work / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_process([sys.executable, HERE / "_rows.py", job_file], options.threads)
        tokens = tokens_of_steps(job)
        sides = run_sides(options, job_file, work, peer)
        check_tokens(sides, tokens)
        text = report(sides, job, tokens, options)
    print(text)
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
