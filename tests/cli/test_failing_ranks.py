"""One process of several fails, or sees another disk than the others: all end soon, and say why."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.cli_runs import SFT, save_model, save_pairs, short
from helpers.failing import end_soon
from helpers.forked import Finished, environment, run_ranks
from rlhf_lightning.runs.ending import MARK

pytestmark = pytest.mark.launched

DDP = ["--config=trainer/ddp.yaml", "--trainer.devices=2"]
NODES = ["--config=trainer/ddp.yaml", "--trainer.devices=1", "--trainer.num_nodes=2"]
SOON = 60  # seconds, as promised


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing")
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """Where the command is given."""
    for name in ("lm", "pairs.jsonl"):
        (tmp_path / name).symlink_to(root / name)
    return tmp_path


def words(*more: str) -> list[str]:
    return ["fit", *SFT, *short("lm", "pairs.jsonl", "run", steps=4), *more]


def failing(folder: Path, **settings: Any) -> str:
    arguments = ", ".join(f"{name}: {value}" for name, value in settings.items())
    text = f"trainer:\n  callbacks:\n  - class_path: helpers.failing.FailAt\n    init_args: {{{arguments}}}\n"
    (folder / "failing.yaml").write_text(text)
    return "--config=failing.yaml"


def last(text: str) -> str:
    return text.strip().splitlines()[-1]


def seconds_since_failure(folder: Path) -> float:
    return time.time() - (folder / "failed").stat().st_mtime


def assert_nothing_else_is_said(ranks: list[Finished]) -> None:
    for each in ranks:
        assert each.stderr.count("error: ") <= 1, each.stderr
        assert "Traceback" not in each.stderr
        assert "onnection" not in each.stderr


FAILURES = [
    ("user", 1, 2, "mend it"),
    ("user", 0, 2, "mend it"),
    ("memory", 1, 2, "memory ran out ("),
    ("hangs", 1, 2, "mend it"),
    ("hangs", 0, 2, "mend it"),
]


@pytest.mark.parametrize(("how", "rank", "code", "line"), FAILURES)
def test_an_error_of_one_process_ends_all_and_is_the_last_line(folder, how, rank, code, line):
    ranks = run_ranks(words(*DDP, failing(folder, how=how, rank=rank)), folder, patience=60, before=end_soon)
    assert seconds_since_failure(folder) < SOON
    assert [each.returncode for each in ranks] == [code, code]
    assert_nothing_else_is_said(ranks)
    assert last(ranks[rank].stderr).startswith(f"error: rank {rank}: {line}")
    if rank == 1:
        said = last(ranks[0].stderr)
        assert said.startswith(f"error: rank 1 failed: {line}")
        assert said.endswith("; this process ends with it")
    else:
        assert "error: " not in ranks[1].stderr


@pytest.mark.parametrize(("how", "rank", "its_code"), [("killed", 1, -9), ("killed", 0, -9), ("exit", 1, 7)])
def test_a_process_that_says_nothing_is_named_by_another(folder, how, rank, its_code):
    ranks = run_ranks(words(*DDP, failing(folder, how=how, rank=rank)), folder, patience=60)
    assert seconds_since_failure(folder) < SOON
    other = ranks[1 - rank]
    assert (ranks[rank].returncode, other.returncode) == (its_code, 1)
    assert_nothing_else_is_said([other])
    said = last(other.stderr)
    assert said.startswith(f"error: rank {rank} failed: its process "), said
    assert " ended without a word, perhaps killed as memory ran out; this process ends with it" in said


def test_a_reward_function_that_raises_in_one_process_ends_all(folder):
    options = ["--config=rloo.yaml", "--data.max_prompt_length=48", "--model.sampling.max_new_tokens=4"]
    options += ["--model.rollout_batch_size=4", "--model.samples_per_prompt=2", "--model.minibatch_size=4"]
    options += ["--model.micro_batch_size=2", "--model.reward=helpers.failing.reward"]
    ranks = run_ranks(["fit", *options, *short("lm", "pairs.jsonl", "run"), *DDP], folder, patience=60)
    assert seconds_since_failure(folder) < SOON
    assert [each.returncode for each in ranks] == [2, 2]
    assert_nothing_else_is_said(ranks)
    said = last(ranks[0].stderr)
    assert said.startswith("error: rank 1 failed: ")
    assert "KeyError: 'no such key'" in said
    assert "failing.py" in said


def test_one_process_that_is_asked_to_stop_before_training_ends_all_at_once(folder):
    callback = "  - class_path: helpers.stopped.SignalAt\n    init_args: {hook: on_fit_start, rank: 1}\n"
    (folder / "stop.yaml").write_text(f"trainer:\n  callbacks:\n{callback}")
    ranks = run_ranks(words(*DDP, "--config=stop.yaml"), folder, patience=60)
    assert [each.returncode for each in ranks] == [143, 143]
    assert last(ranks[0].stderr) == "rank 1 was stopped by SIGTERM; this process ends with it"
    assert all("error" not in each.stderr for each in ranks)
    assert not (folder / "run").exists()


def started(command: list[str], folder: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, that says all on one terminal."""
    env = environment() | {"DS_ACCELERATOR": "cpu"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=env, timeout=timeout, check=False, **both)  # type: ignore[call-overload,no-any-return]


@pytest.mark.launched
def test_the_launcher_of_lightning_ends_with_the_error_of_a_process_that_it_started(folder):
    ended = started(["rlhf_lightning", *words(*DDP, failing(folder, how="user"))], folder)
    assert seconds_since_failure(folder) < SOON
    assert ended.returncode == 2, ended.stdout
    assert ended.stdout.splitlines()[-2:] == [
        "error: rank 1: mend it",
        "error: rank 1 failed: mend it; this process ends with it",
    ]


@pytest.mark.launched
def test_torchrun_names_the_first_error(folder):
    run = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rlhf_lightning"]
    ended = started([*run, *words(*DDP, failing(folder, how="user"))], folder)
    assert seconds_since_failure(folder) < SOON
    assert ended.returncode == 1, ended.stdout
    ours, _, its_own = ended.stdout.partition("Traceback")  # of torchrun's
    assert [line for line in ours.splitlines() if line.startswith("error: ")] == [
        "error: rank 1: mend it",
        "error: rank 1 failed: mend it; this process ends with it",
    ]
    cause = its_own.partition("Root Cause")[2]
    assert "exitcode  : 2" in cause
    assert "rank 1: mend it" in cause


@pytest.fixture
def nodes(root: Path, tmp_path: Path) -> list[Path]:
    """Two nodes whose disks differ."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
        for name in ("lm", "pairs.jsonl"):
            (folder / name).symlink_to(root / name)
    return folders


@pytest.fixture(scope="module")
def saved(root: Path) -> Path:
    """The folder of a run that has saved a checkpoint, and is finished."""
    save = "trainer:\n  callbacks:\n  - class_path: ModelCheckpoint\n    init_args: {save_last: true}\n"
    (root / "save.yaml").write_text(save)
    finished = run_ranks(words("--config=save.yaml"), root, processes=1)
    assert [each.returncode for each in finished] == [0], finished
    return root / "run"


def put(saved: Path, node: Path, *, finished: bool = False) -> None:
    (node / "run/checkpoints").mkdir(parents=True)
    os.link(saved / "checkpoints/last.ckpt", node / "run/checkpoints/last.ckpt")
    if finished:
        os.link(saved / MARK, node / "run" / MARK)


def test_a_node_without_the_data_ends_all_before_they_meet(nodes):
    (nodes[1] / "pairs.jsonl").unlink()
    (nodes[1] / "lm").unlink()
    ranks = run_ranks(words(*NODES), ".", nodes=nodes, patience=60)
    assert [each.returncode for each in ranks] == [2, 2]
    assert last(ranks[1].stderr).startswith("error: rank 1: ")
    assert (
        last(ranks[0].stderr)
        == last(ranks[1].stderr).replace("rank 1:", "rank 1 failed:") + "; this process ends with it"
    )


@pytest.mark.parametrize("word", ["last", "auto"])
def test_a_node_that_does_not_see_the_checkpoint_says_so_and_all_end(nodes, saved, word):
    put(saved, nodes[0])
    ranks = run_ranks(words(*NODES, f"--ckpt_path={word}"), ".", nodes=nodes, patience=60)
    assert [each.returncode for each in ranks] == [2, 2]
    line = f"--ckpt_path {word}: rank 0 goes on from 'run/checkpoints/last.ckpt', and rank 1 on "
    assert last(ranks[1].stderr).startswith(f"error: rank 1: {line}")
    assert "finds none there; use a --trainer.default_root_dir that all nodes share" in last(ranks[1].stderr)
    assert last(ranks[0].stderr).startswith(f"error: rank 1 failed: {line}")
    assert not (nodes[1] / "run").exists()


def test_a_run_is_not_begun_anew_where_another_node_holds_its_checkpoint(nodes, saved):
    put(saved, nodes[1])
    ranks = run_ranks(words(*NODES, "--ckpt_path=auto"), ".", nodes=nodes, patience=60)
    assert [each.returncode for each in ranks] == [2, 2]
    assert "rank 0 finds no checkpoint, and rank 1 on " in last(ranks[0].stderr)
    assert "finds 'run/checkpoints/last.ckpt'; use a " in last(ranks[0].stderr)


def test_a_run_that_is_finished_on_the_first_node_is_on_all(nodes, saved):
    put(saved, nodes[0], finished=True)
    ranks = run_ranks(words(*NODES, "--ckpt_path=auto"), ".", nodes=nodes)
    assert [each.returncode for each in ranks] == [0, 0]
    assert "is finished after 4 optimizer steps" in ranks[0].stdout
    assert not (nodes[1] / "run").exists()


def test_a_run_without_a_disk_that_all_share_is_made_and_said(nodes):
    ranks = run_ranks(words(*NODES, "--ckpt_path=auto"), ".", nodes=nodes)
    assert [each.returncode for each in ranks] == [0, 0]
    assert "does not see the folder 'run' that rank 0 writes to" in ranks[1].stderr
    assert "does not see" not in ranks[0].stderr
    assert (nodes[0] / "run/export").exists()
    assert not (nodes[1] / "run").exists()
