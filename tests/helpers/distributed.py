"""Run a function in several processes, as torchrun would, and bring the results back.

The function is named `package.module:function`, takes JSON values as keyword arguments and returns JSON values; each
process writes its result to a file. The first process to fail, or the deadline, ends all of them. They are forked from
one that has imported everything (`helpers.forked`).
"""

import importlib
import json
import os
import socket
import tempfile
import threading
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

from helpers.forked import forked_process

_STARTING = threading.Lock()
"""The environment is another one while the server is started."""


def run_in_processes(function: str, world_size: int = 2, timeout: float = 1200, **kwargs: Any) -> list[Any]:
    """Call `function(**kwargs)` in `world_size` processes.

    Args:
        function: `package.module:function`, importable from the tests folder.
        world_size: number of processes.
        timeout: seconds after which all processes are killed.
        **kwargs: JSON values.

    Returns:
        What the function returned in each process, by rank.

    Raises:
        RuntimeError: with the end of the failing process's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        with _STARTING:
            processes = [
                forked_process(_run, function, kwargs, _environment(rank, world_size, port), folder, rank)
                for rank in range(world_size)
            ]
        for process in processes:
            process.start()
        running, deadline, failed = (
            {p.sentinel: rank for rank, p in enumerate(processes)},
            time.monotonic() + timeout,
            "",
        )
        while running and not failed:
            ended = connection.wait([*running], max(0.0, deadline - time.monotonic()))
            failed = "" if ended else f"{function} ran past {timeout} s:\n{_tail(Path(folder), 0)}"
            for sentinel in ended:
                rank = running.pop(sentinel)  # type: ignore[arg-type]
                processes[rank].join()
                if code := processes[rank].exitcode:
                    failed = f"process {rank} ended with {code}:\n{_tail(Path(folder), rank)}"
        for process in processes:
            process.kill()
            process.join()
        if failed:
            raise RuntimeError(failed)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _run(function: str, kwargs: dict[str, Any], environment: dict[str, str], folder: str, rank: int) -> None:
    """What each process does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    log = os.open(f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**kwargs)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def _tail(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.log").read_text(errors="replace")[-5000:]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
