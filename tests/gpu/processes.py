"""On a GPU, too, two processes train as one; where there is one GPU, both have it, and speak over gloo.

    PYTHONPATH=src python tests/gpu/processes.py [--device cpu]

Needs torch, transformers, pytorch-lightning, peft, jsonargparse and protobuf; DeepSpeed's rows are left
out, with a line, where it is not installed. Prints a table of the largest difference of any weight after five steps in
float32, responses drawn at temperature 1, and ends with 1 if one is above the tolerance, or if a run fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _synthetic import TINY, instruction_batches, preference_batches, prompt_batches, write_model

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
STAGES = ("sft", "sft lora", "reward", "ppo", "ppo lora")
STEPS = 5
TOLERANCE = 2e-5
"""Float32 on a GPU sums in another order for another shape of the batch; nothing is drawn near enough to a border."""


def share(batch: Any, rank: int, processes: int) -> Any:
    """Every `processes`-th row."""
    return type(batch)(*(field if field is None else field[rank::processes] for field in batch))


class Shares(IterableDataset[Any]):
    """This process's part of each batch; Lightning would deal batches out as if they were rows, were it no stream."""

    def __init__(self, batches: list[Any]) -> None:
        rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.batches = [share(batch, rank, processes) for batch in batches]

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        return iter(self.batches)


def make(stage: str, folder: Path) -> tuple[Any, list[Any]]:
    """A module, and batches of all processes together."""
    from rlhf_lightning import FineTune, PPOModule, RewardModule, Sampling, SFTModule

    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.3)

    options: dict[str, Any] = {"optimizer": sgd, "lr_schedule": "constant", "warmup_steps": 0, "gradient_clip_val": 0.1}
    if stage.endswith("lora"):
        options["finetune"] = FineTune("lora", rank=4)
    if stage.startswith("sft"):
        return SFTModule(str(folder / "policy"), micro_batch_size=2, **options), instruction_batches(TINY, STEPS)[0]
    if stage == "reward":
        return RewardModule(str(folder / "policy"), micro_batch_size=1, **options), preference_batches(TINY, STEPS)[0]
    sizes = {"rollout_batch_size": TINY.prompts, "minibatch_size": TINY.prompts, "ppo_epochs": 1, "micro_batch_size": 1}
    sampling = Sampling(max_new_tokens=TINY.new_tokens)
    module = PPOModule(str(folder / "policy"), str(folder / "reward"), sampling=sampling, **sizes, **options)
    return module, prompt_batches(TINY, STEPS)


def strategy_of(name: str, gloo: bool) -> Any:
    """By its name here."""
    backend = {"process_group_backend": "gloo"} if gloo else {}
    if name == "auto":
        return "auto"
    if name == "ddp":
        from pytorch_lightning.strategies import DDPStrategy

        return DDPStrategy(**backend)
    if name == "fsdp2":
        return _fsdp2(gloo, backend)
    from rlhf_lightning import DeepSpeedStrategy

    return DeepSpeedStrategy(stage=int(name[4]), **backend)


def _fsdp2(gloo: bool, backend: dict[str, Any]) -> Any:
    """FSDP2; with gloo, on a GPU that processes share, the group may be bound to no device."""
    from rlhf_lightning import FSDP2Strategy

    class Unbound(FSDP2Strategy):
        def _setup_distributed(self) -> None:
            super()._setup_distributed()
            torch.distributed.distributed_c10d._get_default_group().bound_device_id = None  # only NCCL can be split

    return (Unbound if gloo else FSDP2Strategy)(**backend)


def train(stage: str, name: str, folder: Path, device: str, gloo: bool) -> dict[str, Any]:
    """Fit in this process; the trained weights (on the first rank alone) and what was logged."""
    import pytorch_lightning as pl

    from rlhf_lightning.training import consolidated_state_dict

    torch.manual_seed(0)
    module, batches = make(stage, folder)
    found: dict[str, Any] = {"logged": []}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics.items()
            found["logged"].append(
                {key: float(value) for key, value in metrics if key.endswith(("loss", "score", "kl"))}
            )

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            state = consolidated_state_dict(pl_module, pl_module.export_model) or {}
            found["weights"] = {key: weight.double().flatten().tolist() for key, weight in state.items()}

    # Two processes on one GPU are two nodes for Lightning.
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        num_nodes=1 if name == "auto" else 2,
        strategy=strategy_of(name, gloo),
        max_steps=STEPS,
        precision="32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Keep()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(Shares(batches), batch_size=None))
    return found


def environment(rank: int, port: int, device: str, gpus: int) -> dict[str, str]:
    """As torchrun would set it for one of two nodes with one process each."""
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "GROUP_RANK": str(rank)}
    launched |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "gpu"}
    if device == "cuda":
        return {**os.environ, **launched, "CUDA_VISIBLE_DEVICES": str(rank % gpus)}
    return {**os.environ, **launched, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def on_two(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every stage on two processes, in one start of them; what the first found, or why it failed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    out, gpus = folder / f"{name}.json", max(1, torch.cuda.device_count())
    command = [sys.executable, __file__, "--device", options.device, "--inside", name, str(folder), str(out)]
    processes = [
        subprocess.Popen(
            command,
            env=environment(rank, port, options.device, gpus),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=options.timeout)[0])
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            said.append(process.communicate()[0] + f"\nkilled after {options.timeout} s")
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if len(done) < len(STAGES):
        codes = [process.returncode for process in processes]
        where = f"{name} failed at {STAGES[len(done)]}, exit codes {codes}"
        print(f"{where}:\n{said[0][-2500:]}\n--- second ---\n{said[1][-800:]}", file=sys.stderr)
    return done


def inside(name: str, folder: Path, out: Path, device: str) -> None:
    """What each process does: all stages, one after the other; the first writes what it found after each."""
    gloo = device == "cpu" or os.environ["CUDA_VISIBLE_DEVICES"] == "0" or torch.cuda.device_count() == 1
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[stage] = train(stage, name, folder, device, gloo)
        if os.environ["RANK"] == "0":
            out.with_suffix(".part").write_text(json.dumps(found))
            out.with_suffix(".part").rename(out)


def distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Largest difference of any weight; infinite where what was logged differs."""
    for mine, other in zip(one["logged"], two["logged"], strict=True):
        if any(abs(mine[key] - other[key]) > 1e-3 * (1 + abs(mine[key])) for key in mine):
            return float("inf")
    pairs = [(torch.tensor(two["weights"][key]), torch.tensor(value)) for key, value in one["weights"].items()]
    return max(float((a - b).abs().max()) for a, b in pairs)


def main() -> int:
    """Run, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one strategy (%(default)s)")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.inside:
        name, folder, out = options.inside
        inside(name, Path(folder), Path(out), options.device)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the script with --device cpu")
    wanted = [name for name in options.strategies if not name.startswith("zero") or find_spec("deepspeed")]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}; left out: {sorted({*options.strategies} - {*wanted}) or 'nothing'}\n")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write_model(TINY, folder)
        one = {stage: train(stage, "auto", folder, options.device, gloo=False) for stage in STAGES}
        two = {name: on_two(name, folder, options) for name in wanted}
    worst = 0.0
    print("| | " + " | ".join(wanted) + " |\n|---|" + "---|" * len(wanted))
    for stage in STAGES:
        far = [distance(one[stage], two[name][stage]) if stage in two[name] else float("inf") for name in wanted]
        worst = max(worst, *far)
        print(f"| {stage} | " + " | ".join(f"{each:.0e}" for each in far) + " |")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
