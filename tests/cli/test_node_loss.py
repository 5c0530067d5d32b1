"""A node is lost under torchrun and comes back: the run goes on by itself, and ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

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
TIMEOUT = 600  # seconds
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


class Agent(NamedTuple):
    """What one node runs."""

    process: subprocess.Popen[bytes]
    ended: int
    """A descriptor that can be read from when the process has ended."""


def agent(folder: Path, port: int, name: str) -> Agent:
    """Start what one node runs."""
    # PyTorch 2.13: an agent that shares its store tells one that comes later no address, and both wait in vain.
    env = environment() | {"DS_ACCELERATOR": "cpu", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    meeting += ["--rdzv_conf=is_host=false"]
    run = ["torch.distributed.run", *meeting, "--max_restarts=3", "--nproc_per_node=1", "-m", "rlhf_lightning"]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *run, *words("run")], cwd=folder, env=env, stdout=log, stderr=log
        )
    return Agent(process, os.pidfd_open(process.pid))


def wait(waited: list[int], deadline: float, folder: Path) -> list[int]:
    """Which of some descriptors can be read from, as soon as one can."""
    ready = connection.wait(waited, max(0.0, deadline - time.monotonic()))
    if not ready:
        fail(folder)
    return [each for each in ready if isinstance(each, int)]


def fail(folder: Path) -> None:
    pytest.fail("\n".join(log.read_text(errors="replace")[-3000:] for log in folder.glob("*.log")))


def waiting(pipe: int, agents: list[Agent], folder: Path) -> dict[int, int]:
    """The processes that wait, by the agent that started each, as soon as there are two."""
    said, deadline = b"", time.monotonic() + TIMEOUT
    while said.count(b"\n") < 2:
        if wait([pipe, *(each.ended for each in agents)], deadline, folder) != [pipe]:
            fail(folder)  # an agent has ended
        said += os.read(pipe, 1000)
    return {int(parent): int(number) for number, parent in (line.split() for line in said.splitlines())}


def end(agents: list[Agent], folder: Path) -> None:
    """Wait until all have ended well."""
    running, deadline = {each.ended: each.process for each in agents}, time.monotonic() + TIMEOUT
    while running:
        for ended in wait([*running], deadline, folder):
            if running.pop(ended).wait():
                fail(folder)


@pytest.mark.launched
def test_a_lost_node_comes_back_and_the_run_ends_as_an_undisturbed_one(tmp_path):
    save_model(tmp_path / "lm")
    save_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "callbacks.yaml").write_text(CALLBACKS)
    # Where the agents meet is apart from both: one that holds the store itself may not be lost.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    os.mkfifo(tmp_path / "waits")
    pipe = os.open(tmp_path / "waits", os.O_RDWR)  # open for writing, too, so that it does not end with a writer
    agents = [agent(tmp_path, port, "first"), agent(tmp_path, port, "second")]
    try:
        processes = waiting(pipe, agents, tmp_path)
        (tmp_path / "go").touch()
        lost = agents[1].process
        for number in (lost.pid, processes[lost.pid]):
            os.kill(number, signal.SIGKILL)
        lost.wait()
        agents.append(agent(tmp_path, port, "again"))
        end([agents[0], agents[2]], tmp_path)
    finally:
        for each in agents:
            each.process.kill()
            each.process.wait()
            os.close(each.ended)
        os.close(pipe)
    first, again = ((tmp_path / f"{name}.log").read_text() for name in ("first", "again"))
    assert f"failed: its process {processes[lost.pid]} ended without a word" in first
    assert (first + again).count("Restored all states from the checkpoint") == 1

    whole = run_ranks(words("whole"), tmp_path, nodes=[tmp_path, tmp_path])
    assert [each.returncode for each in whole] == [0, 0], whole
    ended, undisturbed = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("run", "whole")
    )
    for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ended[name], undisturbed[name])
