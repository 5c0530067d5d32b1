"""What grows with what: memory of the loss with tokens, cost of SFT per token with the batch, PPO with processes.

    python benchmarks/scaling.py [--model FOLDER --data FILE]
    python benchmarks/scaling.py --processes

Without a model only the first part is run, on random numbers of the shape of a small model's output layer; each
measurement in a process of its own. With `--processes` the last part alone: PPO on two processes with a core each
beside one with one core, by turns, on a random model; and what a step of SFT sends on each strategy, beside theory,
which does not depend on how busy the machine is. Prints Markdown. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _ranks import run_ranks
from _synthetic import Shape, write_model
from measuring import GIB, machine, median, steady, table

HERE = Path(__file__).resolve().parent
MIB = 2**20

LOSS = """
import json, sys, time
sys.path.insert(0, {here!r})
import torch
from measuring import peak_memory, resident_memory
from rlhf_lightning.functional import cross_entropy_sum, linear_cross_entropy_sum
way, tokens, width, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
hidden = torch.randn(tokens, width, requires_grad=True)
weight = torch.randn(vocabulary, width).mul_(width ** -0.5).requires_grad_()
targets = torch.randint(vocabulary, (tokens,))
weight.grad = torch.full_like(weight, 0.0)  # a model's is there anyway; zeros_like would not touch the memory yet
before, began = resident_memory(), time.perf_counter()
if way == "ours":
    loss = linear_cross_entropy_sum(hidden, weight, None, targets)[0]
else:
    loss = cross_entropy_sum(hidden @ weight.t(), targets)
loss.backward()
seconds = time.perf_counter() - began
grads = [float(hidden.grad.norm()), float(weight.grad.norm())]
memory = peak_memory() - before
print("RESULT", json.dumps({{"memory": memory, "seconds": seconds, "loss": loss.item(), "grads": grads}}))
"""


def run(command: list[str], threads: int) -> str:
    """What a process prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{command[:2]} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def loss_memory(options: argparse.Namespace) -> str:
    """Peak memory of forward and backward pass of the loss, above what was there before."""
    rows = []
    for tokens in options.tokens:
        results = {}
        for way in ("ours", "plain"):
            arguments = [way, str(tokens), str(options.width), str(options.vocabulary)]
            output = run([sys.executable, "-c", LOSS.format(here=str(HERE)), *arguments], options.threads)
            results[way] = json.loads(output.rpartition("RESULT")[2])
        ours, plain = results["ours"], results["plain"]
        pairs = zip([ours["loss"], *ours["grads"]], [plain["loss"], *plain["grads"]], strict=True)
        apart = max(abs(a / b - 1) for a, b in pairs)
        logits = tokens * options.vocabulary * 4
        memory = [ours["memory"], plain["memory"], logits]
        rows.append(
            [
                f"{tokens:,}",
                *(f"{amount / MIB:,.0f} MiB" for amount in memory),
                f"{ours['memory'] / plain['memory']:.2f}",
                f"{plain['seconds'] / ours['seconds']:.2f} times as fast",
                f"{apart:.0e}",
            ]
        )
    head = ["tokens", "ours", "full logits", "the logits alone", "share", "speed", "loss and gradient norms apart"]
    title = f"## Memory of the loss, hidden size {options.width}, vocabulary {options.vocabulary:,}, float32\n"
    return f"{title}\n{table(head, rows)}"


def sft_cost(options: argparse.Namespace) -> str:
    """Time per real token of our SFT, by the rows of a step."""
    results = {size: sft(options, size) for size in options.batches}
    base = results[options.batches[0]][0]
    rows = [
        [str(size), f"{cost * 1e3:.2f} ms", f"{cost / base:.2f}", f"{tokens:,.0f}", f"{peak / GIB:.2f} GiB"]
        for size, (cost, tokens, peak) in results.items()
    ]
    head = ["rows a step", "time per real token", f"to that at {options.batches[0]}", "tokens a step", "peak memory"]
    title = f"## SFT by batch, max_tokens_per_batch {options.max_tokens_per_batch}\n"
    return f"{title}\n{table(head, rows)}"


def sft(options: argparse.Namespace, rows: int) -> tuple[float, float, float]:
    """Seconds per real token, tokens a step, and peak memory at one batch size."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        job: dict[str, Any] = {
            "stage": "sft",
            "model": str(options.model.resolve()),
            "data": str(options.data.resolve()),
            "cache": str(work / "cache"),
            "rows": rows,
            "steps": options.steps,
            "max_length": options.max_length,
            "precision": "32-true",
            "device": "cpu",
            "learning_rate": 1e-5,
            "seed": 1,
            "variant": "full",
            "ours_options": {"max_tokens_per_batch": options.max_tokens_per_batch},
        }
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        run([sys.executable, str(HERE / "_ours.py"), str(work / "job.json"), str(work / "out.json")], options.threads)
        report = json.loads((work / "out.json").read_text(encoding="utf-8"))
    seconds, tokens = (steady(report[name], options.warmup) for name in ("seconds", "tokens"))
    return median([time / count for time, count in zip(seconds, tokens, strict=True)]), median(tokens), report["peak"]


THEORY = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 3, "fsdp2": 3}
"""What a step of one micro-batch sends by the ZeRO paper (Rajbhandari et al. 2020, section 7), in models' sizes."""


PROMPTS = 16
"""Rows of a rollout of one process."""


def ppo_by_processes(options: argparse.Namespace, folder: Path) -> str:
    """Tokens per second of PPO on one process and on two, each with a core of its own: as many rows each, or in all."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("two processes need two cores")
    words = ["ppo", "--folder", str(folder), "--cores", *map(str, cores), "--steps", str(options.steps + 1)]
    one = (1, PROMPTS)
    rates: dict[tuple[int, int], list[float]] = {one: [], (2, 2 * PROMPTS): [], (2, PROMPTS): []}
    for _ in range(options.rounds):
        for processes, prompts in rates:
            asked = [*words, "--prompts", str(prompts)]
            first = run_ranks(str(HERE / "_scaling.py"), asked, folder, processes)[0]
            rates[processes, prompts].append(first["tokens"] / median(steady(first["seconds"], 1)))
    rows = [
        [
            str(processes),
            str(prompts),
            ", ".join(f"{rate:,.0f}" for rate in found),
            f"{median(found) / median(rates[one]) / processes:.2f}",
        ]
        for (processes, prompts), found in rates.items()
    ]
    title = "## PPO by processes, each with one core; DDP, real tokens per second, all rows as long as they may be\n"
    return f"{title}\n{table(['processes', 'rows of a rollout', 'tokens/s, each round', 'to as many times one'], rows)}"


def sent_by_strategy(folder: Path) -> str:
    """What a step sends on two processes, in sizes of the model."""
    found = run_ranks(str(HERE / "_scaling.py"), ["sent", "--folder", str(folder), "--strategies", *THEORY], folder, 2)[
        0
    ]
    kinds = ("all_reduce", "reduce_scatter", "all_gather")
    rows = []
    for name, theory in THEORY.items():
        size = 4 * found[name]["weights"]
        parts = [f"{found[name]['bytes'].get(kind, 0) / size:.2f}" for kind in kinds]
        rows.append([name, *parts, f"{found[name]['volume'] / size:.2f}", str(theory)])
    weights = next(iter(found.values()))["weights"]
    about = f"{weights / 1e6:.1f} million weights, float32, 2 processes"
    title = f"## What a step of SFT sends, in sizes of the model ({about})\n"
    return f"{title}\n{table(['strategy', *kinds, 'sent', 'theory'], rows)}"


def by_processes(options: argparse.Namespace) -> list[str]:
    """The part on several processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(Shape(6, 320, 5, 5, 832, 4096, 2, 16, 64, 2, 8, 2), folder)
        parts = [sent_by_strategy(folder)]
        return parts if options.rounds < 1 else [*parts, ppo_by_processes(options, folder)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--width", type=int, default=576, help="hidden size of the loss measurement (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="its vocabulary (%(default)s)")
    parser.add_argument("--model", type=Path, help="Hugging Face folder, for the part on SFT")
    parser.add_argument("--data", type=Path, help="preference pairs or demonstrations")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="rows of a step")
    parser.add_argument("--max-tokens-per-batch", type=int, default=512, help="of a micro-batch (%(default)s)")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps at each size (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that do not count (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--processes", action="store_true", help="only the part on several processes")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of PPO, by turns; 0 for what is sent alone (%(default)s)"
    )
    parser.add_argument("--markdown", type=Path, help="append the report to this file too")
    options = parser.parse_args()
    if options.processes:
        parts = [f"{machine()}.\n", *by_processes(options)]
    else:
        parts = [f"{machine()}; {options.threads} threads.\n", loss_memory(options)]
    if not options.processes and options.model and options.data:
        parts.append(sft_cost(options))
    text = "\n".join(parts)
    print(text)
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
