"""Several processes of one run on this machine, as torchrun would start them, over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(script: str, words: list[str], folder: Path, processes: int) -> list[dict[str, Any]]:
    """Start a script on every rank, and wait for all; what each wrote to the file behind `--out`, as JSON.

    Args:
        script: path of it.
        words: its other arguments.
        folder: for logs and results.
        processes: to be started.
    """
    port, running, outs = str(free_port()), [], []
    for rank in range(processes):
        outs.append(folder / f"{rank}.json")
        command = [sys.executable, script, *words, "--out", str(outs[-1])]
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "TORCHELASTIC_RUN_ID": "benchmark",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        log = (folder / f"{rank}.log").open("w")
        running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    if any([process.wait() for process in running]):  # noqa: C419  # of all, not until one has failed
        sys.exit(f"a process failed:\n{(folder / '0.log').read_text()[-4000:]}")
    return [json.loads(out.read_text(encoding="utf-8")) for out in outs]


def strategy_of(name: str) -> Any:
    """What a Trainer takes for a name: of ours (`zero1` to `zero3`, `zero3-offload`, `fsdp2`), or of Lightning's."""
    if name == "fsdp2":
        from rlhf_lightning import FSDP2Strategy

        return FSDP2Strategy()
    if name.startswith("zero"):
        from rlhf_lightning import DeepSpeedStrategy

        offload = name.endswith("-offload")
        number = int(name[4])
        offloads = {"offload_optimizer": offload, "offload_parameters": offload and number == 3}
        return DeepSpeedStrategy(stage=number, **offloads)
    return name
