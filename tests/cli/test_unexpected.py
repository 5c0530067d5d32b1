"""Errors that nothing foresaw: one line, an exit code, and a traceback for those who ask."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch
from torch.utils.data import DataLoader

from rlhf_lightning.cli import main as command_line
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.unexpected import said_of
from rlhf_lightning.errors import RankError, UserError


def outcome(monkeypatch, capsys, error, *words):
    monkeypatch.setenv("RLHF_DEBUG", "")  # restored, whatever the command line sets

    def fail(command, options):
        assert (command, options) == ("fit", ["--x=1"])
        raise error

    monkeypatch.setattr(command_line, "_dispatch", fail)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--x=1", *words])
    return end.value.code, capsys.readouterr().err


def wrapped(error):
    try:
        raise RuntimeError("outer") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("x"), 1, "KeyError: 'x'; this was not foreseen, add --debug to see where it comes from"),
        (
            RuntimeError("one\ntwo"),
            1,
            "RuntimeError: one; this was not foreseen, add --debug to see where it comes from",
        ),
        (AssertionError(), 1, "AssertionError; this was not foreseen, add --debug to see where it comes from"),
        (wrapped(UserError("mend  it")), 2, "mend it"),
        (OSError(errno.ENOSPC, "x", "a/b"), 2, "a/b: No space left on device; make room, or write to another disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "No space left on device; make room"),
        (wrapped(OSError(errno.EIO, "x", "a/b")), 1, "a/b: Input/output error; the disk, or the way to it, failed"),
        (OSError(errno.EROFS, "x", "a/b"), 2, "a/b: Read-only file system; choose a place that you may use"),
        (FileNotFoundError(errno.ENOENT, "x", "a/b"), 2, "a/b: No such file or directory; check the path"),
        (
            FileExistsError(errno.EEXIST, "x", "a/b"),
            2,
            "a/b: File exists; choose another place, or move away what is th",
        ),
        (NotADirectoryError(errno.ENOTDIR, "x", "a/b"), 2, "a/b: Not a directory; check the path"),
        (OSError(errno.ENAMETOOLONG, "x", "a" * 5000), 2, "a" * 300 + " ...: File name too long; check the path"),
        (MemoryError(), 2, "memory ran out (MemoryError); smaller batches, lengths or models need less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            2,
            "memory ran out (CUDA out of memory. Tried);",
        ),
    ],
)
def test_any_error_is_one_line_with_an_exit_code(monkeypatch, capsys, error, code, said):
    found, err = outcome(monkeypatch, capsys, error)
    assert found == code
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), UserError("mend it")])
def test_the_traceback_is_shown_to_those_who_ask(monkeypatch, capsys, error):
    _, err = outcome(monkeypatch, capsys, error, "--debug")
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RankError("rank 1 failed: mend it; this process ends with it", 2), 2, "error: rank 1 failed: mend it; this"),
        (
            RankError("rank 1 was stopped by SIGTERM; this process ends with it", 143, True),
            143,
            "rank 1 was stopped by",
        ),
        (RankError("", 2), 2, ""),
    ],
)
def test_of_several_processes_one_says_what_ended_all(monkeypatch, capsys, error, code, said):
    found, err = outcome(monkeypatch, capsys, error)
    assert found == code
    assert err.startswith(said)
    assert err.count("\n") == bool(said)


@pytest.mark.parametrize(("words", "level"), [([], "ERROR"), (["--debug"], None)])
def test_pytorch_writes_no_frames_of_its_own_unless_they_are_asked_for(monkeypatch, words, level):
    """Where the store of several processes is gone, 50 lines each time."""
    seen = []
    for name in ("TORCH_CPP_LOG_LEVEL", "RLHF_DEBUG"):
        monkeypatch.setenv(name, "")  # restored, whatever the command line sets
        monkeypatch.delenv(name)

    def load(name):
        seen.append(os.environ.get("TORCH_CPP_LOG_LEVEL"))
        raise UserError("mend it")

    monkeypatch.setattr(command_line, "_load", load)
    monkeypatch.setattr(command_line, "check_keys", lambda *_: None)
    with pytest.raises(SystemExit):
        main(["fit", "--config=sft.yaml", *words])
    assert seen == [level]


class Bad:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("row 3 is bad; mend it")


class Died(Bad):
    def __getitem__(self, index):
        os._exit(1)


def test_an_error_of_a_loader_process_is_as_short_as_one_of_this_one():
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Bad(), num_workers=1)))
    assert said_of(caught.value) == ("row 3 is bad; mend it", 2)


def test_a_loader_process_that_dies_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds between looks, 5 by default
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Died(), num_workers=1)))
    line, code = said_of(caught.value)
    assert code == 1
    assert re.fullmatch(r"DataLoader worker .*; a process that loads data died, perhaps as memory ran out, .*", line)
