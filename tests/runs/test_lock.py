"""One run at a time in a folder, and none kept out by a run that is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.lock import LOCK, locked, remove_left_lock


def test_a_second_run_is_refused_in_one_line_and_touches_nothing(tmp_path):
    folder = tmp_path / "runs/sft"
    with locked(folder):
        before = (folder / LOCK).read_text()
        said = rf"^'{folder}' is in use by another run \(process {os.getpid()} on .+\); wait until"
        with pytest.raises(UserError, match=said), locked(folder):
            pass
        assert (folder / LOCK).read_text() == before
    assert not (tmp_path / "runs").exists()  # neither did anything come of the first
    with locked(folder):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def in_child(act):
    """Run a function in a forked process that tells when it is done, and lives on."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            act()
            os.write(write, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 4) == b"done"
    os.close(read)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_killed_run_keeps_nobody_out(tmp_path):
    lock = locked(tmp_path)  # held on to, as what is forgotten is left
    child = in_child(lock.__enter__)
    try:
        with pytest.raises(UserError, match=f"process {child} on"), locked(tmp_path):
            pass
    finally:
        end(child)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_what_a_killed_run_has_left_is_removed_and_what_is_held_is_not(tmp_path):
    remove_left_lock(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with locked(tmp_path):
        remove_left_lock(tmp_path)
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    (tmp_path / LOCK).write_text("process 1 on another\n")
    remove_left_lock(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_worker_that_outlives_its_run_keeps_nobody_out(tmp_path):
    lock = locked(tmp_path)

    def begin():
        os.setpgid(0, 0)
        lock.__enter__()
        in_child(lambda: None)

    child = in_child(begin)
    try:
        end(child)
        with locked(tmp_path):
            pass
    finally:
        os.killpg(child, signal.SIGKILL)


def test_a_lock_that_was_removed_while_it_was_waited_for_is_none(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(descriptor, how):
        if not removed:  # its holder ends between opening and locking
            removed.append((tmp_path / LOCK).unlink())
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
        pass


def test_a_disk_without_locks_is_one_warning(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"lies on a disk without locks \(No locks available\)"), locked(tmp_path):
        (tmp_path / "config.yaml").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    said = r"file/runs' cannot be written \(Not a directory\); choose another folder"
    with pytest.raises(UserError, match=said), locked(tmp_path / "file/runs"):
        pass
