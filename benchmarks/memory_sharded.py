"""What a process holds when a model is split over several: loading, weights with gradients and optimizer, a step.

    python benchmarks/memory_sharded.py --strategy zero3 --processes 1 2 4 [--weights 200 --stage sft]

Each row is a run of its own, on CPUs over gloo, of a random model of Llama's shape. What counts is anonymous memory
(`RssAnon`: what a process has written, without files it has mapped), above what was there once all is imported and the
processes have met; of several processes that of the one that holds most. One process runs without any strategy, and in
bfloat16 with float32 master weights, as everybody would who has one. `--strategy` is a name of ours (`zero1` to
`zero3`, `zero3-offload`, `fsdp2`), one that Lightning knows (`ddp`), or a file of `configs/trainer/`, of which the
strategy is taken. Prints Markdown. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import _ranks
from _ranks import run_ranks
from measuring import machine, table

HERE = Path(__file__).resolve().parent
MIB = 2**20
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


# What a process holds


def anonymous_memory() -> int:
    """Bytes that this process has written and still holds. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Peak:
    """The most that was held between two looks, from a thread that looks a hundred times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, anonymous_memory())

    def take(self) -> int:
        """The most since the last call."""
        most, self.most = max(self.most, anonymous_memory()), 0
        return most

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self._thread.join()


def tensors_by_size(least: int = MIB) -> list[tuple[int, str]]:
    """Storages of tensors that Python still knows, largest first, each once: its bytes, and who holds it."""
    import torch

    found: dict[int, tuple[int, str]] = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and each.device.type == "cpu":
            for tensor in (each, each.grad if each.is_leaf else None, getattr(each, "ds_tensor", None)):
                if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    storage = tensor.untyped_storage()
                    if storage.nbytes() >= least:
                        found[storage.data_ptr()] = (storage.nbytes(), f"{tensor.dtype} {list(tensor.shape)}")
    return sorted(found.values(), reverse=True)


# One process of a run


def strategy_of(name: str) -> Any:
    """What a Trainer takes for a name, or for a file of `configs/trainer/`."""
    if name.endswith(".yaml"):
        import yaml

        given = yaml.safe_load(Path(name).read_text())["trainer"]["strategy"]
        if isinstance(given, str):
            return given
        module, _, kind = given["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), kind)(**given.get("init_args", {}))
    return _ranks.strategy_of(name)


def module_of(stage: str, folder: Path) -> tuple[Any, list[Any]]:
    """The stage, all of its weights trained, and two batches."""
    from _synthetic import TINY, instruction_batches, preference_batches, prompt_batches

    from rlhf_lightning import PPOModule, RewardModule, Sampling, SFTModule

    policy, reward = str(folder / "policy"), str(folder / "reward")
    shape = TINY._replace(rows=2, max_length=16, prompts=2, prompt_length=8)
    common: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0}
    if stage == "ppo":
        rows = shape.prompts * int(os.environ["WORLD_SIZE"])
        sizes = {"rollout_batch_size": rows, "minibatch_size": rows, "ppo_epochs": 1}
        module: Any = PPOModule(policy, reward, sampling=Sampling(max_new_tokens=2), **sizes, **common)
        return module, prompt_batches(shape, 3)
    kind: Any = RewardModule if stage == "reward" else SFTModule
    batches = (preference_batches if stage == "reward" else instruction_batches)(shape, 3)[0]
    return kind(policy, **common), batches


def work(options: argparse.Namespace) -> None:
    """What each process of a run does; writes what it held."""
    import pytorch_lightning as pl
    import torch

    torch.set_num_threads(1)
    module, batches = module_of(options.stage, options.folder)
    peak = Peak()
    held: dict[str, Any] = {}

    class Look(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.strategy.barrier()
            gc.collect()
            held["start"] = anonymous_memory()
            peak.take()

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            held["setup peak"] = peak.take()
            held["ready tensors"] = tensors_by_size()

        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            peak.take()

        def on_before_optimizer_step(self, trainer: Any, *arguments: Any) -> None:
            # The second time: the optimizer makes its state in the first step.
            held["held"] = anonymous_memory()
            held["held tensors"] = tensors_by_size()

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            held["step peak"] = peak.take()

    load = module.configure_model

    def configure_model() -> None:
        if "loaded" in held:
            return
        load()
        held["load peak"] = peak.take()
        gc.collect()
        held["loaded"] = anonymous_memory()
        held["loaded tensors"] = tensors_by_size()

    module.configure_model = configure_model
    one = int(os.environ["WORLD_SIZE"]) == 1
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="auto" if one and not options.alone else strategy_of(options.strategy),
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Look()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    peak.stop()
    held["weights"] = sum(getattr(p, "ds_numel", None) or p.numel() for p in module.parameters())
    options.out.write_text(json.dumps(held), encoding="utf-8")


# The runs


def run(options: argparse.Namespace, folder: Path, processes: int) -> list[dict[str, Any]]:
    """Start the processes of one run; what each held."""
    words = ["--strategy", options.strategy, "--folder", str(folder), "--stage", options.stage]
    return run_ranks(str(HERE / "memory_sharded.py"), [*words, "--precision", options.precision], folder, processes)


def write_models(folder: Path, millions: int) -> None:
    """A policy and a reward model of about so many weights, in files of at most an eighth of them."""
    from _synthetic import Shape, write_model

    width = 64 * max(1, round((millions * 1e6 / 16 / 12.5) ** 0.5 / 64))
    layers = max(1, round((millions * 1e6 - 2 * 4096 * width) / (11 * width**2)))
    shape = Shape(layers, width, width // 64, width // 64, 7 * width // 3 // 64 * 64, 4096, 2, 16, 64, 2, 8, 2)
    write_model(shape, folder)


def shares(held: list[dict[str, Any]], name: str) -> int:
    """The most that any process held, above what it had at the start."""
    return max(each[name] - each["start"] for each in held)


NAMES = {
    "load peak": "peak while loading",
    "loaded": "loaded",
    "setup peak": "peak of the set-up",
    "held": "weights, gradients, optimizer",
    "step peak": "peak of a step",
}


def report(options: argparse.Namespace, folder: Path) -> str:
    """All runs, and each beside that of one process."""
    runs = {processes: run(options, folder, processes) for processes in options.processes}
    rows = []
    for processes, held in runs.items():
        row = [str(processes)]
        for name in NAMES:
            share = f" ({shares(held, name) / shares(runs[1], name):.2f})" if 1 in runs else ""
            row.append(f"{shares(held, name) / MIB:,.0f} MiB{share}")
        rows.append(row)
        if options.tensors:
            for name in ("loaded tensors", "ready tensors", "held tensors"):
                print(processes, name, sum(size for size, _ in held[0][name]) // MIB, "MiB")
                for size, what in held[0][name][:12]:
                    print(f"   {size / MIB:8.1f} MiB  {what}")
    title = f"## {options.stage}, {options.strategy}, {options.precision}, {options.millions} million weights\n"
    return f"{title}\n{table(['processes', *NAMES.values()], rows)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="zero3")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stage", choices=["sft", "reward", "ppo"], default="sft")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true")
    parser.add_argument("--millions", type=int, default=150, help="weights of each model (%(default)s)")
    parser.add_argument("--tensors", action="store_true", help="also print the largest tensors of the first process")
    parser.add_argument("--alone", action="store_true", help="the strategy on one process, too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--markdown", type=Path, help="append the report to this file too")
    options = parser.parse_args()
    if options.out:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options.millions)
        text = f"{machine()}.\n\n{report(options, Path(folder))}"
    print(text)
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
