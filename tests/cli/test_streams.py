"""Commands whose output nobody reads, or which have none: what is to be done is done, and nothing is said of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli_runs import PPO, SFT, command, environment, save_model, save_pairs, save_rows, short
from helpers.forked import run_forked
from helpers.outputs import closed, one_file, unread


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    save_rows(folder / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    return folder


def fit(folder, callbacks="", steps=4):
    """A run with a bar and a report, with callbacks of YAML."""
    recipe = folder.parent / f"{folder.name}.yaml"
    saving = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 100, save_last: true}}"
    recipe.write_text(f"trainer: {{log_every_n_steps: 1, callbacks: [{saving}{callbacks}]}}\n")
    options = short("lm", "pairs.jsonl", folder, steps=steps, report=True)
    return ["fit", *SFT, f"--config={recipe}", *options, "--trainer.enable_progress_bar=true"]


def at_once(words, stdout, *, cwd, unbuffered=False):
    python = [sys.executable, *(["-u"] if unbuffered else [])]
    return subprocess.run(
        [*python, *command(*words)[1:]], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment()
    )


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", [["env"], ["--help"], ["--version"], ["completion", "bash"], ["report", "--help"]])
def test_what_only_says_something_ends_quietly_when_nobody_reads_it(tmp_path, words, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    ended = at_once(words, writer, cwd=tmp_path, unbuffered=unbuffered)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["env"], ["--help"]])
def test_output_that_cannot_be_written_is_one_line(tmp_path, words):
    with open("/dev/full", "w") as full:
        ended = at_once(words, full, cwd=tmp_path)
    said = "error: No space left on device; make room, or write to another disk\n"
    assert (ended.returncode, ended.stderr) == (2, said)


def test_an_error_that_cannot_be_said_has_its_code_all_the_same(tmp_path):
    ended = run_forked(["fti"], tmp_path, before=unread)
    assert ended.returncode == 2


def test_answers_that_nobody_reads_end_the_command(root):
    ended = run_forked(["generate", "lm", "--file=prompts.jsonl", "--max_new_tokens=2"], root, before=unread)
    assert ended.returncode == 141


def test_a_run_goes_on_when_nobody_reads_what_it_says(root):
    ended = run_forked(fit(root / "unread"), root, before=unread)
    assert ended.returncode == 0
    assert (root / "unread/report.html").exists()
    assert list((root / "unread/checkpoints").glob("*.ckpt"))


def test_a_ppo_run_goes_on_likewise(root):
    options = short("lm", "pairs.jsonl", root / "ppo", report=True)
    reward = "--model.reward=helpers.stages.share_of_letters"
    ended = run_forked(["fit", *PPO, *options, reward], root, before=unread)
    assert ended.returncode == 0
    assert (root / "ppo/report.html").exists()


def test_ctrl_c_that_ends_the_reader_too_saves_and_reports(root):
    stop = "{hook: on_train_batch_start, step: 2, names: [SIGINT]}"
    callbacks = f", {{class_path: helpers.stopped.SignalAt, init_args: {stop}}}"
    ended = run_forked(fit(root / "stopped", callbacks, steps=8), root, before=unread)
    assert ended.returncode == 130
    assert (root / "stopped/checkpoints/last.ckpt").exists()
    assert (root / "stopped/report.html").exists()


def test_a_run_without_streams_is_one_like_others(root):
    ended = run_forked(fit(root / "closed"), root, before=closed)
    assert ended.returncode == 0
    assert (root / "closed/report.html").exists()


def test_a_home_that_cannot_be_written_is_not_spoken_of(tmp_path):
    words = ["evaluate", "--data", "none.jsonl"]
    env = environment() | {"HOME": "/proc", "MPLCONFIGDIR": ""}
    ended = subprocess.run(command(*words), capture_output=True, text=True, cwd=tmp_path, env=env)
    said = "error: there is nothing to measure; name language models with --models, reward models with --rewards\n"
    assert (ended.returncode, ended.stderr) == (2, said)


def test_a_talk_without_input_is_over_at_once(root):
    ended = run_forked(["chat", "lm", "--terminal"], root, before=closed)
    assert ended.returncode == 0


def test_an_error_begins_a_line_though_a_bar_stands_there(root):
    broken = ", {class_path: helpers.stopped.Fails, init_args: {step: 2}}"
    ended = run_forked(fit(root / "failed", broken), root, before=one_file)
    assert ended.returncode == 2
    assert "2/" in ended.stdout  # the bar
    assert "\nerror: no more\n" in ended.stdout
