"""The command line in a process of its own that is forked from one that has imported everything already.

A fresh interpreter spends 8 seconds on imports; a child of the fork server, which the first call starts, none. It runs
`rlhf_lightning.cli.main.main` as the console script does: its own streams, working folder, environment, signal handlers
and process group, and what is registered to run at exit runs.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = (
    "rlhf_lightning.cli.main",
    "rlhf_lightning.cli.stages",
    "rlhf_lightning.callbacks",
    "deepspeed.moe.ep_count",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "tensorboard.compat.proto.event_pb2",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "torch._dynamo",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks",
    "helpers.stages",
    "helpers.forked",
    "helpers.fork_server",  # last
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*PRELOADED])
TESTS = str(Path(__file__).resolve().parents[1])


def environment() -> dict[str, str]:
    """One thread, no GPU, no hub."""
    paths = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


class Finished(NamedTuple):
    """What came of a process; `returncode` is minus the number of the signal that killed it, as in `subprocess`."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A running command line.

    Args:
        words: after `rlhf`.
        cwd: its working folder.
        env: changes of the environment.
        before: called in the child before the command line, for instance to break something; importable by name.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        cwd: Path | str,
        env: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        _start_server()
        self.words = [str(word) for word in words]
        self.output = Path(tempfile.mkdtemp(prefix="forked-"))
        arguments = (self.words, str(cwd), environment() | dict(env or {}), str(self.output), before)
        self.process = _CONTEXT.Process(target=_child, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and all that it started."""
        for kill in (os.killpg, os.kill):  # no group in its first moments
            try:
                kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.join()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60) -> bool:
        """Wait until something holds, such as that a file is there; False if the process ended before it did."""
        deadline = time.monotonic() + timeout
        while not condition():
            if connection.wait([self.process.sentinel], timeout=0.005):
                return condition()
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{' '.join(self.words)}: waited {timeout} s\n{self._said('stderr')[-3000:]}")
        return True

    def wait(self, timeout: float = 60) -> Finished:
        """Wait until it has ended."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"{' '.join(self.words)}: ran past {timeout} s\n{self._said('stderr')[-3000:]}")
        assert self.process.exitcode is not None
        finished = Finished(self.process.exitcode, self._said("stdout"), self._said("stderr"))
        shutil.rmtree(self.output)
        return finished

    def _said(self, stream: str) -> str:
        path = self.output / stream
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def run_forked(
    words: Sequence[str | Path],
    cwd: Path | str,
    kill_after: float | None = None,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Finished:
    """Run the command line and wait for its end.

    Args:
        words: after `rlhf`.
        cwd: its working folder.
        kill_after: seconds after which the process and all that it started get SIGKILL, if they still run.
        timeout: seconds after which the same happens, and is an error.
        env: changes of the environment.
        before: called in the child first; importable by name.
    """
    forked = Forked(words, cwd, env, before)
    if kill_after is not None:
        forked.process.join(kill_after)
        forked.kill()
    return forked.wait(timeout)


def run_ranks(
    words: Sequence[str | Path],
    cwd: Path | str,
    *,
    processes: int = 2,
    timeout: float = 300,
    before: Callable[[], None] | None = None,
    nodes: Sequence[Path] = (),
    patience: float = 5,
) -> list[Finished]:
    """Run the command line on several processes, as torchrun would; what came of each, by rank.

    Args:
        words: after `rlhf`.
        cwd: the working folder.
        processes: how many.
        timeout: seconds after which all are killed, and that is an error.
        before: called in each first; importable by name.
        nodes: a working folder for each, as if each ran on a node with a disk of its own.
        patience: seconds after which the others are killed when one has failed, so that they end by themselves or not.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    shared |= {"TORCHELASTIC_RUN_ID": "tests", "DS_ACCELERATOR": "cpu"}
    ranks = []
    for rank in range(processes):
        of_node = {"GROUP_RANK": "0", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        alone = {"GROUP_RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env = {**shared, "RANK": str(rank), **(alone if nodes else of_node)}
        ranks.append(Forked(words, nodes[rank] if nodes else cwd, env, before))
    deadline = time.monotonic() + timeout
    running = list(ranks)
    while running and time.monotonic() < deadline:
        connection.wait([rank.process.sentinel for rank in running], timeout=1)
        running = [rank for rank in running if rank.process.is_alive()]
        if any(rank.process.exitcode for rank in ranks):  # the others would wait for it
            for rank in running:
                rank.process.join(patience)
                rank.kill()
            running = []
    return [rank.wait(max(0.0, deadline - time.monotonic())) for rank in ranks]


def forked_process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that will be forked from the server when it is started.

    Args:
        target: called there; importable by name.
        *arguments: it is called with.
    """
    _start_server()
    return _CONTEXT.Process(target=target, args=arguments)


def _start_server() -> None:
    """Let the server find what this process finds; it looks at the environment only."""
    before = dict(os.environ)
    # A pool of compiling processes would be started by an import, in the server. The last is set by the command line.
    more = {"DS_ACCELERATOR": "cpu", "TORCH_WARM_POOL": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ.update(environment() | more | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _child(words: list[str], cwd: str, env: dict[str, str], output: str, before: Callable[[], None] | None) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output) / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["rlhf", *words]
    from rlhf_lightning.cli.main import main

    try:
        if before is not None:
            before()
        main(words)
    finally:
        atexit._run_exitfuncs()
