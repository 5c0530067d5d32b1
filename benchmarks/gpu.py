"""How much of a device our stages use, and what takes their time, on random models and synthetic rows.

    python benchmarks/gpu.py [--parts sft reward ...] [--minutes 10]
    python benchmarks/gpu.py --device cpu --tiny     (a try, which compiles no code)

Needs torch, transformers, pytorch-lightning and peft, with what they bring and jsonargparse and protobuf, and downloads
nothing: the models are random, of Llama's shape, with 0.5 or 1 billion weights and a vocabulary of 32,768 or 151,936
words, and their tokenizers lists of words. Each part runs in a process of its own. One that fails, that lacks what it
needs (TRL and vLLM need not be there), or for which no time is left, is left out with one line, and the others are
told: as Markdown, a table when the last part of it is done. Linux only.

| parts | what they measure |
|---|---|
| `profile` | kernels of one SFT step, by kind and by name, and how long the device is busy; on a CPU operators |
| `syncs` | how often a step of SFT, reward model and PPO, and decoding, make the host wait for the device |
| `sft`, `reward`, and `-152k`, `-1b` of them | model FLOP utilisation of 0.5B, of a large vocabulary, of 1B |
| `sft-compiled`, `reward-compiled` | the same of 0.5B with `compile`, and how long the first step takes with it |
| `sft-trl` | TRL's SFTTrainer on the rows of `sft` |
| `layouts` | SFT padded, unpadded and packed, with cuDNN's attention and without |
| `optimizer` | a step of AdamW: as torch comes, foreach, fused |
| `head` | output layer and loss of 8,192 tokens, forward and backward, of both vocabularies |
| `ppo`, `ppo-compiled`, `ppo-lora` | where the time of an iteration goes |
| `decoding`, `decoding-bf16`, and `-256` of them | new tokens a second of ours and `generate`, and time to the first |
| `continuous` | transformers' continuous batching |
| `vllm`, `vllm-256` | the same prompts by vLLM, as our engine runs it |

Model FLOP utilisation is the arithmetic that the maths of a step asks for, by the time it took and the device's peak:
6 x (weights in the matrices of the blocks) for each real token, 6 x hidden x vocabulary for each token that is taught,
and 6 x layers x hidden x L^2 for the causal attention of an example of L tokens. Padding, recomputation and the logits
of tokens that are not taught are no part of it, and what both sides of a pair share counts once. Published figures
often count all of the square of attention, 12 x layers x hidden x L^2; that stands beside it as "attention unhalved".
The share of bandwidth is what a decoding step must read at the least, the weights once, in the type of its products,
and the keys and values of the tokens so far, by its time and the device's bandwidth.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _gpu_parts import GROUPS, PARTS, PRELOADED, measure, write_models
from _gpu_peaks import Peaks, choose_peaks, look_at_device
from _gpu_process import Outcome, make_context, run_alone
from _gpu_settings import Result, Settings

LEAST_SECONDS = 5
"""That a part is given."""


def rate(number: float) -> str:
    """Three digits, or all before the point.

    Example:
        >>> rate(3350), rate(1.234)
        ('3,350', '1.23')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def tell(results: dict[str, Result], group: Any, peaks: Peaks) -> str:
    """Markdown of the parts of a group, and their notes; nothing if none of them has a result."""
    own = {name: results[name] for name in group.PARTS if name in results}
    if not own:
        return ""
    notes = [note for result in own.values() for note in result.get("notes", [])]
    return "\n".join([group.tell(own, peaks), *notes]).rstrip()


class Run:
    """One run: parts one after the other, until the time is over, and the text of them as it comes.

    Args:
        options: from the command line.
        folder: for the models.
    """

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options = options
        asked = options.device, options.tiny, options.precision, options.steps, options.warmup
        self.settings = Settings(*asked, folder)
        self.ends = time.monotonic() + 60 * options.minutes
        self.context = make_context(options.fresh, PRELOADED)
        self.failed = False

    def say(self, text: str) -> None:
        """Print Markdown, and append it to the file that was asked for."""
        print(text, flush=True)
        if self.options.markdown:
            with self.options.markdown.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def alone(self, title: str, function: Any, *arguments: Any) -> Outcome:
        """Call a function in a process of its own, and tell on the error stream how it went."""
        left, began = self.ends - time.monotonic(), time.monotonic()
        if left < LEAST_SECONDS:
            return Outcome(None, f"the {self.options.minutes:g} minutes are over")
        outcome = run_alone(self.context, function, arguments, left)
        print(f"{title}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        if outcome.failed:
            self.failed = True
            print(outcome.output, file=sys.stderr)
        return outcome

    def look(self) -> Peaks:
        """Name the device and what it can do."""
        outcome = self.alone("device", look_at_device, self.settings)
        if outcome.failed and not self.options.fresh:  # perhaps a library asked for the device before it was time
            self.failed, self.context = False, make_context(True, PRELOADED)
            outcome = self.alone("device, from a fresh interpreter", look_at_device, self.settings)
        if outcome.reason:
            sys.exit(f"the device does not work: {outcome.reason}")
        device = outcome.result
        peaks = choose_peaks(device, self.options.peak_tflops, self.options.peak_bandwidth)
        self.say(
            f"{device['machine']}; {self.options.precision}. Peak {peaks.source}: {peaks.tflops:.3g} TFLOP/s, "
            f"{rate(peaks.bandwidth)} GB/s (matrix product here {device['tflops']:.3g} TFLOP/s, "
            f"copy {rate(device['bandwidth'])} GB/s).\n"
        )
        return peaks

    def run(self) -> None:
        """Everything."""
        peaks = self.look()
        shapes = [*dict.fromkeys(shape for name in self.options.parts for shape in PARTS[name].shapes)]
        models = self.alone("models", write_models, shapes, self.settings)
        for group in GROUPS:
            results: dict[str, Result] = {}
            reasons = []
            for name in (name for name in group.PARTS if name in self.options.parts):
                lacks = models.reason and PARTS[name].shapes
                outcome = models if lacks else self.alone(name, measure, name, self.settings)
                if outcome.reason:
                    reasons.append(f"{name} is left out: {outcome.reason}")
                else:
                    results[name] = outcome.result
            if text := "\n\n".join(filter(None, [tell(results, group, peaks), "\n".join(reasons)])):
                self.say(text + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights, to try the script")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which nothing more is run (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=["bf16-mixed", "bf16-true", "32-true"],
        help="of training; bf16-mixed by default, on a CPU 32-true",
    )
    parser.add_argument("--steps", type=int, help="of training (8; 3 in a try)")
    parser.add_argument("--warmup", type=int, help="first steps that do not count (2; 1 in a try)")
    parser.add_argument("--peak-tflops", type=float, help="of the device; by default by its name, or measured")
    parser.add_argument("--peak-bandwidth", type=float, help="the same in GB/s")
    parser.add_argument("--fresh", action="store_true", help="import everything anew for each part")
    parser.add_argument("--markdown", type=Path, help="append the report to this file too")
    options = parser.parse_args(arguments)
    options.precision = options.precision or ("bf16-mixed" if options.device == "cuda" else "32-true")
    for name, usual, tiny in (("steps", 8, 3), ("warmup", 2, 1)):
        if getattr(options, name) is None:
            setattr(options, name, tiny if options.tiny else usual)
    if options.warmup >= options.steps:
        parser.error("--warmup must be less than --steps")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the script with --device cpu --tiny")
    return options


def main() -> None:
    """Run the parts that were asked for."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, folder)
        run.run()
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
