"""How fast and in how much memory data is prepared, how soon a second start is ready, how fast batches come.

    python benchmarks/data.py --tokenizer FOLDER

Writes synthetic preference pairs of the shape of Anthropic HH itself; nothing else is needed but a tokenizer. Prints
Markdown. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_LENGTH = 2048
GIB = 2**30

COMMON = """
the to and you a of I that is in it for on are be with your can have do this not as but or if what they about people
would like there so just some how know think want get from could one make more will me at all something don't it's an my
their which who good when out time help also sure other should them because up need really any way has he we by sorry
use am many work much see than find things most were these was other where then well being into find its feel only very
right first even person take might going talk say may question try lot been want please give tell different here better
back thing did why day such look often his her since usually money water food before over after too never family
children friend school country world year hand place part number point home story fact month life case week
"""
SYLLABLES = (
    "b c d f g h l m n p r s t v w br cl cr dr fl gr pl pr sh sl st tr th ch",
    "a e i o u ai ea ee ie oo ou",
    "b d g l m n p r s t ck ct ld ll mp ng nt rd rk rm rn rt sh ss st th",
)
"""Beginnings, middles and ends that rare words are made of."""


class Sample(NamedTuple):
    """What one command took."""

    seconds: float
    parent: int
    worker: int
    output: str


# Data


def word_pool(rng: random.Random, size: int = 1_000_000) -> list[str]:
    """Running text: common words by Zipf's law, one word in twelve a rare one, commas and full stops."""
    starts, middles, ends = map(str.split, SYLLABLES)
    rare = ["".join(map(rng.choice, (starts, middles, ends, middles, ends))) for _ in range(20_000)]
    common = COMMON.split()
    words = rng.choices(common, [1 / (rank + 3) for rank in range(len(common))], k=size)
    for i in range(0, size, 12):
        words[i] = rng.choice(rare)
    for i in range(7, size - 1, 13):
        words[i] += rng.choice((".", ".", ",", "?"))
    return words


def write_pairs(path: Path, count: int, seed: int = 1) -> None:
    """Pairs of whole dialogues; lengths are log-normal, in words, as measured on Anthropic HH."""
    rng = random.Random(seed)
    pool = word_pool(rng)

    def text(mean: float, deviation: float) -> str:
        length = max(1, min(600, int(rng.lognormvariate(mean, deviation))))
        start = rng.randrange(len(pool) - length)
        return " ".join(pool[start : start + length])

    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for _ in range(count):
            prompt = f"\n\nHuman: {text(2.6, 0.9)}"
            for _ in range(rng.choices(range(6), (35, 30, 20, 10, 4, 1))[0]):
                prompt += f"\n\nAssistant: {text(3.4, 0.9)}\n\nHuman: {text(2.6, 0.9)}"
            chosen, rejected = (f"{prompt}\n\nAssistant: {text(3.5, 0.95)}" for _ in range(2))
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")


# Measuring


def measure(command: list[str], environment: dict[str, str]) -> Sample:
    """Run a command; time, and the peak resident memory of it and of the largest process it starts."""
    started = time.perf_counter()
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            for pid in family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0), peak_memory(pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    parent = peaks.pop(process.pid, 0)
    return Sample(seconds, parent, max(peaks.values(), default=0), text)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def peak_memory(pid: int) -> int:
    """Peak resident memory so far, in bytes; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


START = """
import json, sys, time
began = time.perf_counter()
from rlhf_lightning.data import InstructionDataModule, PreferenceDataModule
imported = time.perf_counter()
kind, tokenizer, source, cache, num_proc = sys.argv[1:]
cls = {"sft": InstructionDataModule, "reward": PreferenceDataModule}[kind]
data = cls(tokenizer, source, cache_dir=cache, num_proc=int(num_proc), max_length=%d, batch_size=8)
data.prepare_data()
data.setup("fit")
next(iter(data.train_dataloader()))
print("RESULT", json.dumps({"imports": imported - began, "ready": time.perf_counter() - imported}))
"""

LOAD = """
import json, sys, time
from rlhf_lightning.data import InstructionDataModule
tokenizer, source, way = sys.argv[1:]
options = {} if way == "plain" else {way: True}
data = InstructionDataModule(tokenizer, source, max_length=%d, batch_size=8, **options)
data.setup("fit")
began = time.perf_counter()
tokens = slots = batches = 0
for batch in data.train_dataloader():
    tokens += int(batch.attention_mask.sum())
    slots += batch.attention_mask.numel()
    batches += 1
    if time.perf_counter() - began > 20:
        break
print("RESULT", json.dumps({"tokens": tokens, "padding": 1 - tokens / slots, "batches": batches,
                            "seconds": time.perf_counter() - began}))
"""


def run_script(script: str, *arguments: Any, environment: dict[str, str]) -> dict[str, Any]:
    """What a script in a process of its own reports."""
    sample = measure([sys.executable, "-c", script % MAX_LENGTH, *map(str, arguments)], environment)
    return dict(json.loads(sample.output.rpartition("RESULT")[2])) | {"memory": sample.parent, "whole": sample.seconds}


def prepare(tokenizer: str, data: Path, out: Path, num_proc: int, environment: dict[str, str]) -> tuple[Sample, int]:
    """Prepare all three kinds; what it took, and the tokens of all texts, each counted once."""
    command = [sys.executable, "-m", "rlhf_lightning", "prepare", f"--tokenizer={tokenizer}", f"--data={data}"]
    command += [f"--out={out}", f"--num_proc={num_proc}", f"--max_length={MAX_LENGTH}", "--overwrite=true"]
    sample = measure(command, environment)
    parts = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["parts"]
    return sample, sum(part["tokens"] for name, part in parts.items() if name.startswith("preference"))


def packing(folder: Path) -> tuple[int, int, float, float]:
    """Examples, rows they are packed into, share of the rows' tokens that is filled, and seconds."""
    from rlhf_lightning.data.packing import pack
    from rlhf_lightning.data.preparing.prepared import PreparedFolder

    lengths = PreparedFolder.open(folder).part("finetune", "train").total_lengths
    began = time.perf_counter()
    rows = pack(lengths, MAX_LENGTH)
    seconds = time.perf_counter() - began
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    return len(lengths), len(rows), float(lengths.sum() / (len(rows) * MAX_LENGTH)), seconds


# Telling


def machine() -> str:
    """Processor, cores, memory and versions."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "pyarrow"))
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, {versions}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def main() -> None:
    """Measure everything, largest size last, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer; the targets are for SmolLM2's")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 40_000, 80_000, 160_000], help="pairs")
    parser.add_argument("--num-proc", type=int, default=2, help="processes that tokenise (%(default)s)")
    parser.add_argument(
        "--sft-tokens-per-second", type=float, default=1000, help="what SFT of a 135M model consumes (%(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder for everything written; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(options, options.work or Path(temporary))


def run(options: argparse.Namespace, work: Path) -> None:
    """Measure and print."""
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RLHF_LIGHTNING_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    sizes = sorted(options.sizes)
    print(f"{machine()}\n\n## Preparing ({options.num_proc} processes, all three kinds, report included)\n", flush=True)
    rows, samples = [], []
    for size in sizes:
        file, out = work / f"pairs_{size}.jsonl.gz", work / f"prepared_{size}"
        write_pairs(file, size)
        sample, tokens = prepare(options.tokenizer, file, out, options.num_proc, environment)
        samples.append(sample)
        speeds = [f"{size / sample.seconds:,.0f}", f"{tokens / sample.seconds:,.0f}"]
        memory = [f"{sample.parent / GIB:.2f} GiB", f"{sample.worker / GIB:.2f} GiB"]
        rows.append([f"{size:,}", f"{sample.seconds:.1f}", *speeds, f"{tokens / size:.0f}", *memory])
    columns = ["pairs", "seconds", "pairs/s", "tokens/s", "tokens per pair", "parent, peak", "largest worker, peak"]
    print(table(columns, rows), flush=True)
    file, folder = work / f"pairs_{sizes[-1]}.jsonl.gz", work / f"prepared_{sizes[-1]}"
    starts = starting(options, file, folder, work / "cache", environment)
    loads = loading(options, folder, environment)
    examples, packed, filled, seconds = packing(folder)
    print(
        f"## Packing\n\n{examples:,} examples into {packed:,} rows of {MAX_LENGTH} tokens in {seconds:.1f} s: ", end=""
    )
    print(f"{filled:.2%} of the tokens are filled\n\n## Targets\n")
    worst = max(max(sample.parent, sample.worker) for sample in samples)
    slopes = np.diff([sample.seconds for sample in samples]) / np.diff(sizes)  # seconds for each pair more
    slowest = min(loads) / options.sft_tokens_per_second
    targets = [
        (f"{sizes[-1]:,} pairs in 150 s or less", f"{samples[-1].seconds:.0f} s", samples[-1].seconds <= 150),
        ("resident memory below 1.5 GiB in every process", f"{worst / GIB:.2f} GiB", worst < 1.5 * GIB),
        (
            "linear: a further pair takes no longer at the end than at the beginning (up to 20%)",
            f"{slopes[-1] / slopes[0]:.2f} times as long" if len(slopes) > 1 else "needs 3 sizes",
            len(slopes) > 1 and slopes[-1] <= 1.2 * slopes[0],
        ),
        ("second start ready for the first batch in 3 s", f"{max(starts):.2f} s", max(starts) < 3),
        ("loader at least 20 times what SFT consumes", f"{slowest:,.0f} times", slowest >= 20),
        (f"packing fills 98% at {MAX_LENGTH}", f"{filled:.2%}", filled >= 0.98),
    ]
    print(
        table(
            ["target", "measured", "met"], [[name, value, "yes" if met else "**no**"] for name, value, met in targets]
        )
    )


def starting(
    options: argparse.Namespace, file: Path, folder: Path, cache: Path, environment: dict[str, str]
) -> list[float]:
    """Seconds from the end of the imports to the first batch, at the second start."""
    print(f"## Second start, {options.sizes and max(options.sizes):,} pairs, in a fresh process\n", flush=True)
    rows, ready = [], []
    for kind, source, name in (
        ("sft", file, "SFT, from the cache"),
        ("reward", folder, "reward model, prepared folder"),
    ):
        arguments = (kind, options.tokenizer, source, cache, options.num_proc)
        first = run_script(START, *arguments, environment=environment)
        second = run_script(START, *arguments, environment=environment)
        ready.append(second["ready"])
        numbers = [first["ready"], second["ready"], second["imports"], second["whole"]]
        rows.append([name, *(f"{number:.2f} s" for number in numbers), f"{second['memory'] / GIB:.2f} GiB"])
    head = ["", "first start", "second start", "imports, not in it", "whole process", "peak memory"]
    print(table(head, rows), flush=True)
    return ready


def loading(options: argparse.Namespace, folder: Path, environment: dict[str, str]) -> list[float]:
    """Tokens per second of the SFT loader in its three ways, one process, no workers."""
    print("## SFT batches of 8, no loader workers\n", flush=True)
    rows, speeds = [], []
    for way in ("plain", "length_grouped", "packing"):
        result = run_script(LOAD, options.tokenizer, folder, way, environment=environment)
        speeds.append(result["tokens"] / result["seconds"])
        times = f"{speeds[-1] / options.sft_tokens_per_second:,.0f}"
        rows.append([way, f"{result['batches']:,}", f"{speeds[-1]:,.0f}", f"{result['padding']:.1%}", times])
    print(table(["", "batches", "tokens/s", "padding", "times what SFT consumes"], rows), flush=True)
    return speeds


if __name__ == "__main__":
    main()
