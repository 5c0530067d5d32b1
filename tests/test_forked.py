"""The helper that runs the command line in forked processes."""

import os
import signal
import sys
from pathlib import Path

from helpers.forked import Forked, run_forked


def tell_where_it_runs():
    names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{os.getppid()}/task").iterdir()]
    threads = [name for name in names if name != "jemalloc_bg_thd"]  # that of Arrow's memory holds no lock of ours
    print("rlhf_lightning.cli.stages" in sys.modules, len(threads), Path.cwd().name, os.getpgrp() == os.getpid())


def never_end():
    signal.pause()


def test_a_child_has_imported_everything_and_its_parent_has_one_thread(tmp_path):
    finished = run_forked(["--version"], tmp_path, before=tell_where_it_runs)

    assert finished.returncode == 0
    told, version = finished.stdout.splitlines()
    assert told == f"True 1 {tmp_path.name} True"
    assert version.startswith("rlhf-lightning ")


def test_exit_codes_errors_and_signals_are_told(tmp_path):
    refused = run_forked(["unknown"], tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: unknown command 'unknown'")

    assert run_forked(["--version"], tmp_path, kill_after=0.3, before=never_end).returncode == -signal.SIGKILL

    running = Forked(["--version"], tmp_path, before=never_end)
    assert running.wait_for(lambda: (running.output / "stderr").exists())
    running.send(signal.SIGTERM)
    assert running.wait().returncode == -signal.SIGTERM
