"""What `rlhf plan` foretells beside what a process on this CPU takes: one step each of SFT, reward model and PPO.

    python benchmarks/plan.py                       (12 runs, one after the other; under 6 GiB at once)
    python benchmarks/plan.py --only ppo --tiny     (a try)
    python benchmarks/plan.py --strategies ddp zero2 zero3 fsdp2 --small    (on two processes, all weights)

Every run is a process of its own that trains a random model on sequences as long as they may be. Its anonymous memory
(`RssAnon` of `/proc`) is read every few milliseconds from outside; what it had after it trained a model of a few
thousand weights, all libraries loaded by then, is subtracted. The second step is the one that counts, for the first
makes the optimizer's state. Linux only.

glibc keeps freed memory below some size for itself. Here it is told to give back whatever is larger than 64 KiB, unless
`--plain` asks for what it does by itself: the difference is what the allocator adds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _ranks import run_ranks, strategy_of
from _synthetic import TINY, Shape, write_model
from measuring import GIB, machine, table

SHAPE = Shape(
    layers=6,
    hidden=640,
    heads=10,
    kv_heads=5,
    intermediate=1792,
    vocabulary=20480,
    rows=2,
    max_length=192,
    micro_tokens=192,
    prompts=2,
    prompt_length=160,
    new_tokens=32,
)
SMALL = SHAPE._replace(layers=8, hidden=384, heads=6, kv_heads=3, intermediate=1024, vocabulary=8192)
"""Of 18 million weights, for machines that are busy; buffers weigh more in it."""
_EVERY = 0.002
_READY = "ready"


def arguments(stage: str, mode: str, again: bool, lm: str, reward: str, shape: Shape) -> dict[str, Any]:
    """Those of the module."""
    common = {
        "model_name_or_path": lm,
        "micro_batch_size": shape.rows // 2,
        "finetune": {"mode": mode},
        "gradient_checkpointing": again,
        "lr_schedule": "constant",
        "warmup_steps": 0,
    }
    if stage == "ppo":
        lengths = {"max_new_tokens": shape.new_tokens, "min_new_tokens": shape.new_tokens}
        sizes = {"rollout_batch_size": shape.prompts, "minibatch_size": shape.prompts, "ppo_epochs": 2}
        return {**common, **sizes, "reward": reward, "sampling": lengths, "score": {"scaling": False}}
    return {**common, **({"prefix_sharing": False} if stage == "reward" else {})}


PLANNED = {
    "ddp": "ddp",
    **{f"zero{stage}": {"class_path": "DeepSpeedStrategy", "init_args": {"stage": stage}} for stage in (1, 2, 3)},
    "fsdp2": {"class_path": "FSDP2Strategy"},
}
"""Strategies as a config names them."""


def planned(stage: str, settings: dict[str, Any], shape: Shape, strategy: str = "auto", processes: int = 1) -> Any:
    """The plan of such a run."""
    import rlhf_lightning
    from rlhf_lightning.planning import Request, plan

    cls = {"sft": "SFTModule", "reward": "RewardModule", "ppo": "PPOModule"}[stage]
    data = {"max_length": shape.max_length, "batch_size": shape.rows, "max_prompt_length": shape.prompt_length}
    data |= {"batch_size": shape.rows * processes}
    trainer = {"strategy": PLANNED.get(strategy, strategy)}
    return plan(Request(getattr(rlhf_lightning, cls), settings, data, trainer, processes, on_gpu=False))


def train(stage: str, settings: dict[str, Any], shape: Shape, strategy: str = "auto") -> None:
    """Two steps on rows without padding, in this process."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    import rlhf_lightning
    from rlhf_lightning.batches import InstructionBatch, PreferenceBatch, PromptBatch

    ids = torch.randint(2, shape.vocabulary, (shape.rows, shape.max_length))
    full, rows = torch.ones_like(ids, dtype=torch.bool), torch.arange(shape.rows)
    batch: Any = InstructionBatch(ids, full, full, rows)
    if stage == "reward":
        batch = PreferenceBatch(ids, full, ids.flip(0), full, rows, prompt_lengths=torch.ones(shape.rows).long())
    elif stage == "ppo":
        asked = slice(0, shape.prompts), slice(0, shape.prompt_length)
        batch = PromptBatch(ids[asked], full[asked], ["w2"] * shape.prompts, rows[: shape.prompts])
    cls = {"sft": "SFTModule", "reward": "RewardModule", "ppo": "PPOModule"}[stage]
    module = getattr(rlhf_lightning, cls)(**settings)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    kind = strategy_of(strategy)
    quiet |= {"logger": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    trainer = pl.Trainer(accelerator="cpu", devices=processes, strategy=kind, max_epochs=1, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader([batch] * 2, batch_size=None))


def run(job: dict[str, Any], shape: Shape) -> None:
    """A run in this process: first on a tiny model, then, once that is said, on the one that is measured."""
    import gc
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    train(job["stage"], job["tiny"], TINY)
    gc.collect()
    print(_READY, flush=True)
    time.sleep(0.2)
    train(job["stage"], job["settings"], shape)


def run_rank(job: dict[str, Any], shape: Shape, out: Path) -> None:
    """The same on one rank of several, which looks at itself."""
    import gc

    from memory_sharded import Peak, anonymous_memory

    train(job["stage"], job["tiny"], TINY, job["strategy"])
    gc.collect()
    before, peak = anonymous_memory(), Peak()
    peak.take()
    train(job["stage"], job["settings"], shape, job["strategy"])
    peak.stop()
    out.write_text(json.dumps({"peak": peak.take() - before}), encoding="utf-8")


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process has now; 0 when it has gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")), 0)


def measured(words: list[str], plain: bool) -> float:
    """Bytes that a run takes at the most beyond what it had before it loaded models."""
    allocator = {} if plain else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | allocator)
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == _READY:
            break
    baseline = peak = anonymous(child.pid)
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(_EVERY)
    if child.returncode:
        raise SystemExit(f"a run ended with code {child.returncode}: {' '.join(words)}")
    return peak - baseline


def main() -> None:
    """Plan and measure each run, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("sft", "reward", "ppo"))
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights")
    parser.add_argument("--plain", action="store_true", help="leave the allocator of the C library as it is")
    parser.add_argument("--markdown", help="append the table to this file")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--strategies", nargs="+", choices=PLANNED, help="on two processes, all weights trained")
    parser.add_argument("--small", action="store_true", help="a model of 18 million weights")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = TINY if given.tiny else SMALL if given.small else SHAPE
    if given.run:
        job = json.loads(given.run)
        run_rank(job, shape, given.out) if given.out else run(job, shape)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lm, reward = write_model(shape, Path(folder))
        tiny = write_model(TINY, Path(folder, "tiny"))
        stages = [given.only] if given.only else ["sft", "reward", "ppo"]
        for strategy, stage in itertools.product(given.strategies or (), stages):
            settings = arguments(stage, "all", False, lm, reward, shape)
            small = arguments(stage, "all", False, *tiny, TINY)
            for each, size in ((settings, shape), (small, TINY)):
                if stage == "ppo":
                    each |= {"rollout_batch_size": 2 * size.prompts, "minibatch_size": 2 * size.prompts}
            plan = planned(stage, settings, shape, strategy, 2)
            job = json.dumps({"stage": stage, "settings": settings, "tiny": small, "strategy": strategy})
            words = ["--run", job, *(["--tiny"] if given.tiny else []), *(["--small"] if given.small else [])]
            found = max(rank["peak"] for rank in run_ranks(__file__, words, Path(folder), 2))
            sizes = f"{plan.held / GIB:.3f}", f"{plan.peak / GIB:.3f}", f"{found / GIB:.3f}"
            rows.append([stage, strategy, "kept", *sizes, f"{plan.peak / found - 1:+.1%}"])
            print(*rows[-1], file=sys.stderr, flush=True)
        one = itertools.product(("all", "lora"), (False, True), stages) if not given.strategies else ()
        for mode, again, stage in one:
            settings = arguments(stage, mode, again, lm, reward, shape)
            plan = planned(stage, settings, shape)
            small = arguments(stage, mode, again, *tiny, TINY)
            job = json.dumps({"stage": stage, "settings": settings, "tiny": small})
            found = measured(["--run", job, *(["--tiny"] if given.tiny else [])], given.plain)
            sizes = f"{plan.held / GIB:.2f}", f"{plan.peak / GIB:.2f}", f"{found / GIB:.2f}"
            rows.append([stage, mode, "again" if again else "kept", *sizes, f"{plan.peak / found - 1:+.1%}"])
            print(*rows[-1], file=sys.stderr, flush=True)
    header = [
        "stage",
        "strategy" if given.strategies else "trained",
        "activations",
        "held",
        "planned peak",
        "measured peak",
        "plan is off by",
    ]
    text = f"{machine()}\n\n{table(header, rows)}"
    print(text)
    if given.markdown:
        with Path(given.markdown).open("a", encoding="utf-8") as file:
            print(text, file=file)


if __name__ == "__main__":
    main()
