"""What processes of a run tell each other over a store, here threads of one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from rlhf_lightning.errors import RankError, UserError
from rlhf_lightning.runs import peers as module
from rlhf_lightning.runs.failures import Failure, Processes, _started, write_error_file
from rlhf_lightning.runs.meeting import meet
from rlhf_lightning.runs.peers import Peers, active
from rlhf_lightning.runs.signals import Stopped


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "leave_children_alone", contextlib.nullcontext)  # which is of the whole process
    return TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=20), wait_for_workers=False)


def client(server):
    return TCPStore("127.0.0.1", server.port, 2, False, timedelta(seconds=20), wait_for_workers=False)


def together(server, *actions, left=None):
    """What becomes of an action of each rank, within its `Peers`: a result, or an exception."""
    became = [None] * len(actions)

    def run(rank):
        try:
            store = meet(client(server), rank, 20)
            with Peers(store, rank, 2, 2, lambda error: (str(error), 2), lambda: []) as peers:
                became[rank] = actions[rank](peers)
            (left if left is not None else []).append(rank)
        except BaseException as e:  # of a thread
            became[rank] = e

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return became


def test_the_first_process_decides_for_all(server):
    first, second = lambda: ["a.ckpt", 1.5], lambda: 1 / 0
    came = together(server, *(lambda peers, c=choose: peers.decide("checkpoint", c) for choose in (first, second)))
    assert came == [["a.ckpt", 1.5], ["a.ckpt", 1.5]]
    assert active() is None


def test_no_process_leaves_before_the_last_has_done_its_work(server):
    left = []

    def last(peers):
        peers._wait(lambda: peers.store.add("done", 0) == 1)
        return [*left]

    assert together(server, last, lambda peers: "done", left=left) == [[], "done"]
    assert sorted(left) == [0, 1]


def test_what_is_left_from_before_a_restart_is_not_taken_for_new(server):
    """The store of torchrun's agent outlives its processes."""
    for answer in ("old", "new"):
        came = together(
            server,
            lambda peers, answer=answer: peers.decide("checkpoint", lambda: answer),
            lambda peers: peers.decide("checkpoint", lambda: None),
        )
        assert came == [answer, answer]
    asked = [lambda peers: peers.decide("checkpoint", fail)] * 2
    assert [str(error) for error in together(server, *asked)] == ["rank 0: mend it", ""]
    assert together(server, lambda peers: 1, lambda peers: 2) == [1, 2]


def fail(*_):
    raise UserError("mend it")


def wait(peers):
    """As in a collective."""
    deadline = time.monotonic() + 20
    peers._wait(lambda: time.monotonic() > deadline)


def test_who_waits_ends_with_who_failed_first(server):
    first, second = together(server, wait, fail)
    assert (str(first), first.code) == ("rank 1 failed: mend it; this process ends with it", 2)
    assert (str(second), second.code) == ("rank 1: mend it", 2)


def test_a_connection_that_broke_is_said_to_be_what_broke_it(server):
    def broken(peers):
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")

    first, second = together(server, broken, fail)
    assert str(first) == "rank 1 failed: mend it; this process ends with it"
    assert isinstance(first.__cause__, RuntimeError)
    assert str(second) == "rank 1: mend it"


def test_a_process_that_is_stopped_stops_the_others_unless_all_have_agreed(server):
    def stop(peers):
        raise Stopped("SIGTERM")

    def agreed(peers):
        stopped = Stopped("SIGTERM")
        stopped.agreed = True
        raise stopped

    first, second = together(server, wait, stop)
    assert str(first) == "rank 1 was stopped by SIGTERM; this process ends with it"
    assert (first.code, first.is_stop) == (143, True)
    assert isinstance(second, Stopped)
    for each in together(server, agreed, agreed):
        assert isinstance(each, Stopped)


def test_a_store_that_is_gone_went_with_the_first_process(server, monkeypatch):
    read, write = os.pipe()
    if (first := os.fork()) == 0:
        store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=20), wait_for_workers=False)
        os.write(write, str(store.port).encode())
        signal.pause()
    store = TCPStore("127.0.0.1", int(os.read(read, 10)), 2, False, timedelta(seconds=20), wait_for_workers=False)
    monkeypatch.setattr(module, "_PERIOD", 0.1)
    peers = Peers(store, 1, 2, 2, lambda error: (str(error), 2), lambda: [])
    monkeypatch.setattr(peers, "_processes", Nobody())

    def lose(peers):
        with peers:
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
            wait(peers)

    with pytest.raises(RankError, match="rank 0 failed: its process, or its node, cannot be reached any more"):
        lose(peers)


class Nobody:
    """The processes of a host that shows none."""

    def add(self, rank):
        return None

    refresh = ranks = gone = lambda self: []


def test_a_process_of_this_host_that_is_gone_is_known_by_its_number_and_start(server):
    processes = Processes(server)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    processes.add(0)
    started = _started(child.pid)
    server.append(processes._key, f"1 {child.pid} {started}\n2 {os.getpid()} 1\n")
    processes.refresh()
    assert processes.ranks() == [0, 1, 2]
    assert processes.gone() == [(2, os.getpid())]  # another process has the number now
    child.kill()
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert processes.gone() == [(1, child.pid), (2, os.getpid())]
    child.wait()
    assert processes.gone() == [(1, child.pid), (2, os.getpid())]


def test_torchrun_takes_the_first_failure_for_the_root_cause(tmp_path, monkeypatch):
    """Upstream: it compares whole seconds, and says `py_callstack`."""
    failure = Failure(1, "mend it", 2, 1000.9)
    failures = {}
    for rank in (0, 1):
        path = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        write_error_file(failure, rank)
        failures[rank] = ProcessFailure(rank, 1, 2, str(path))
    error = ChildFailedError("rlhf", failures)
    assert error.get_first_failure()[0] == 1
    assert "rank 1: mend it" in str(error).partition("Root Cause")[2]


def test_a_failure_is_read_as_it_was_written():
    failure = Failure(3, 'say "no"', 1, 5.5, is_told=False)
    assert Failure.read(failure.written()) == failure
    assert json.loads(failure.written())[0] == 3
