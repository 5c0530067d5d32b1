"""A node is lost under torchrun and comes back: the run goes on by itself, and ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from algorithms.test_stage_resume import assert_same
from helpers.cli_runs import SFT, save_model, save_pairs, short
from helpers.forked import environment, run_ranks

CALLBACKS = """\
trainer:
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {every_n_train_steps: 2, save_last: true}
  - class_path: helpers.failing.WaitAt
    init_args: {step: 3}
"""
NODES = ["--config=trainer/ddp.yaml", "--config=callbacks.yaml", "--trainer.devices=1", "--trainer.num_nodes=2"]


def words(run: str) -> list[str]:
    return [
        "fit",
        *SFT,
        *NODES,
        *short("lm", "pairs.jsonl", run, steps=6),
        "--trainer.max_epochs=-1",
        "--ckpt_path=auto",
    ]


def agent(folder: Path, port: int, name: str) -> subprocess.Popen[bytes]:
    """What one node runs."""
    # PyTorch 2.13: an agent that shares its store tells one that comes later no address, and both wait in vain.
    env = environment() | {"DS_ACCELERATOR": "cpu", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    run = ["torch.distributed.run", *meeting, "--max_restarts=3", "--nproc_per_node=1", "-m", "rlhf_lightning"]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *run, *words("run")], cwd=folder, env=env, stdout=log, stderr=log
        )


def until(condition: Callable[[], bool], agents: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline or any(each.poll() for each in agents):
            pytest.fail("\n".join(log.read_text(errors="replace")[-3000:] for log in folder.glob("*.log")))
        time.sleep(0.1)


def test_a_lost_node_comes_back_and_the_run_ends_as_an_undisturbed_one(tmp_path):
    save_model(tmp_path / "lm")
    save_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "callbacks.yaml").write_text(CALLBACKS)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    agents = [agent(tmp_path, port, "first")]
    waiting = [tmp_path / "waits0", tmp_path / "waits1"]
    try:
        agents.append(agent(tmp_path, port, "second"))
        until(lambda: all(path.exists() for path in waiting), agents, tmp_path)
        parents = {int(parent): int(number) for number, parent in (path.read_text().split() for path in waiting)}
        (tmp_path / "go").touch()
        lost = agents.pop()
        for number in (lost.pid, parents[lost.pid]):
            os.kill(number, signal.SIGKILL)
        lost.wait()
        agents.append(agent(tmp_path, port, "again"))
        until(lambda: all(each.poll() is not None for each in agents), agents, tmp_path)
    finally:
        for each in agents:
            each.kill()
            each.wait()
    assert [each.returncode for each in agents] == [0, 0]
    first, again = ((tmp_path / f"{name}.log").read_text() for name in ("first", "again"))
    assert f"failed: its process {parents[lost.pid]} ended without a word" in first
    assert (first + again).count("Restored all states from the checkpoint") == 1

    whole = run_ranks(words("whole"), tmp_path, nodes=[tmp_path, tmp_path])
    assert [each.returncode for each in whole] == [0, 0], whole
    ended, undisturbed = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("run", "whole")
    )
    for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ended[name], undisturbed[name])
