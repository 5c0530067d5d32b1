"""How a step of SFT grows: time per token with the batch and with the length, memory with vocabulary and length.

    python benchmarks/growth.py
    python benchmarks/growth.py --device cuda --precision bf16-mixed

On a random model; each point is a run of its own in a process of its own, with the budget of tokens that the package
chooses (`max_tokens_per_batch: auto`). Time stands beside the arithmetic that the maths asks for, attention halved.
Prints Markdown. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu_process import make_context, run_alone
from _gpu_settings import Result, Settings, fit
from _synthetic import FULL, TINY, Shape, instruction_batches, write_model
from measuring import GIB, device_peak_memory, machine, median, peak_memory, resident_memory, steady, table

SMALL = Shape(6, 320, 5, 5, 832, 4096, 8, 256, 0, 2, 8, 2)
"""What a CPU is given: 10 million weights."""


def point(shape: Shape, settings: Settings) -> Result:
    """Steps of one shape.

    Args:
        shape: model and rows.
        settings: of device, precision and steps.

    Returns:
        Median seconds of a step, real tokens and floating-point operations of a step, and peak memory above what is
        held between two steps, such as weights and state of the optimizer, in bytes.
    """
    from rlhf_lightning import SFTModule

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        policy, _ = write_model(shape, Path(folder), with_reward=False)
        module = SFTModule(policy, lr_schedule="constant", warmup_steps=0)
        batches, work = instruction_batches(shape, settings.steps)
        held: list[int] = []
        seconds, _ = fit(module, batches, settings, after=lambda step: held.append(in_use(settings.device)))
    peak = device_peak_memory() if settings.device == "cuda" else peak_memory()
    counts = [float(batch.attention_mask.sum()) for batch in batches]
    return {
        "seconds": median(steady(seconds, settings.warmup)),
        "tokens": median(steady(counts, settings.warmup)),
        "flops": median(steady([each.flops for each in work], settings.warmup)),
        "above": peak - held[-1],
    }


def in_use(device: str) -> int:
    """Memory that is held between two steps."""
    return int(torch.cuda.memory_allocated()) if device == "cuda" else resident_memory()


def cost(name: str, points: dict[int, Result]) -> str:
    """Time per token against the first point."""
    first = next(iter(points.values()))
    base, base_flops = first["seconds"] / first["tokens"], first["flops"] / first["tokens"]
    rows = []
    for size, found in points.items():
        each = found["seconds"] / found["tokens"]
        rows.append(
            [
                f"{size:,}",
                f"{found['tokens']:,.0f}",
                f"{each * 1e6:,.1f} us",
                f"{each / base:.2f}",
                f"{found['flops'] / found['tokens'] / base_flops:.2f}",
                f"{found['flops'] / found['seconds'] / 1e9:,.0f}",
                f"{found['above'] / GIB:.2f} GiB",
            ]
        )
    head = [name, "tokens a step", "time per real token", "to the first", "arithmetic to it", "GFLOP/s", "peak above"]
    return table(head, rows)


def memory(points: dict[tuple[int, int], Result]) -> str:
    """Peak memory by vocabulary and length, beside the logits of all real tokens."""
    lines = []
    for (vocabulary, length), found in points.items():
        logits = found["tokens"] * vocabulary * 4
        numbers = (found["above"], logits)
        share = f"{found['above'] / logits:.2f}"
        lines.append([f"{vocabulary:,}", f"{length:,}", *(f"{number / GIB:.2f} GiB" for number in numbers), share])
    return table(["vocabulary", "length", "peak above weights and optimizer", "logits alone, float32", "share"], lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true", help="Lightning's (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16, 64, 256], help="rows of up to 256 tokens")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192], help="of a row")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step by length, at most (%(default)s)")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[4096, 32768, 151936])
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=4, help="of each point (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that do not count (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, to try the script")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which a point is ended (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="append the report to this file too")
    options = parser.parse_args()
    settings = Settings(options.device, options.tiny, options.precision, options.steps, options.warmup, "")
    shape = TINY if options.tiny else FULL if options.device == "cuda" else SMALL
    ask = partial(measured, make_context(options.device == "cuda", ["torch", "rlhf_lightning"]), options.seconds)
    parts = [f"{machine()}; {options.precision}, {shape.layers} layers of {shape.hidden}.\n"]
    by_batch = {n: ask(shape._replace(rows=n, max_length=256), settings) for n in options.batches}
    by_length = {
        n: ask(shape._replace(rows=max(1, options.tokens // n), max_length=n), settings) for n in options.lengths
    }
    rows = 4
    sized = {
        (v, n): ask(shape._replace(vocabulary=v, rows=rows, max_length=n), settings)
        for v in options.vocabularies
        for n in options.memory_lengths
    }
    for title, text in {
        "SFT by rows of a step, of up to 256 tokens": by_batch and cost("rows", by_batch),
        f"SFT by length, up to {options.tokens:,} tokens a step": by_length and cost("longest row", by_length),
        f"Memory of SFT by vocabulary and length, {rows} rows": sized and memory(sized),
    }.items():
        parts += [f"## {title}\n", text] if text else []
    report = "\n".join(parts)
    print(report)
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(report + "\n")


def measured(context: Any, seconds: float, shape: Shape, settings: Settings) -> Result:
    """A point; one that fails ends everything."""
    outcome = run_alone(context, point, (shape, settings), seconds)
    if outcome.result is None:
        sys.exit(f"{shape}: {outcome.reason}\n{outcome.output}")
    return dict(outcome.result)


if __name__ == "__main__":
    main()
