"""Locks of torch's extensions: who holds one is named, and one that was left behind goes."""

from __future__ import annotations

import os
import time

import pytest
from torch.utils.file_baton import FileBaton

from rlhf_lightning.training.build_locks import see_to_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam" / "lock"


def test_who_holds_a_lock_is_named(lock):
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    os.utime(lock, (0, 0))
    with pytest.warns(UserWarning, match=f"process {os.getpid()} compiles cpu_adam: who needs it waits for '{lock}'"):
        see_to_locks()
    assert lock.exists()
    baton.release()


def test_an_old_lock_that_nobody_holds_is_removed(lock):
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    with pytest.warns(UserWarning, match=f"removed '{lock}', which a killed build had left"):
        see_to_locks()
    assert not lock.exists()


def test_of_a_new_one_is_said_that_it_may_be_removed(lock):
    lock.touch()
    with pytest.warns(UserWarning, match=f"no process of this machine holds '{lock}', .* remove it, unless another"):
        see_to_locks()
    assert lock.exists()


def test_without_locks_nothing_is_said(lock, recwarn):
    see_to_locks()
    lock.parent.rmdir()
    lock.parent.parent.rmdir()
    see_to_locks()
    assert not recwarn.list
