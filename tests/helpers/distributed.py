"""Run a function in several processes, as torchrun would, and bring the results back.

The function is named `package.module:function`, takes JSON values as keyword arguments and returns JSON values; each
process writes its result to a file. The first process to fail, or the deadline, ends all of them.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


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
        processes = [_start(function, kwargs, rank, world_size, Path(folder), port) for rank in range(world_size)]
        with ThreadPoolExecutor(world_size) as pool:
            futures = [pool.submit(_check_exit, process, Path(folder), rank) for rank, process in enumerate(processes)]
            done, running = wait(futures, timeout=timeout, return_when=FIRST_EXCEPTION)
            for process in processes:
                process.kill()
        for future in done:
            future.result()
        if running:
            raise RuntimeError(f"{function} ran past {timeout} s:\n{_tail(Path(folder), 0)}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def _start(
    function: str, kwargs: dict[str, Any], rank: int, world_size: int, folder: Path, port: int
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
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
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "helpers.distributed", function, json.dumps(kwargs), str(folder / f"{rank}.json")]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def _check_exit(process: subprocess.Popen[bytes], folder: Path, rank: int) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"process {rank} ended with {process.returncode}:\n{_tail(folder, rank)}")


def _tail(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.log").read_text(errors="replace")[-5000:]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _main() -> None:
    function, kwargs, path = sys.argv[1:]
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(kwargs))
    Path(path).write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
