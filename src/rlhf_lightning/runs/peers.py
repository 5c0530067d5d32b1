"""What the processes of one run tell each other beside their collectives: what the first decides, and who failed first.

They meet in the store in which PyTorch's process group meets, so before there is a group, and while it waits for one of
them. Nothing here is a collective: a process that is gone is noticed, not waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from subprocess import Popen
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.callbacks import Callback

from rlhf_lightning.errors import RankError
from rlhf_lightning.lightning_compat import launched_children, leave_children_alone
from rlhf_lightning.runs.failures import Failure, Processes, how_it_ended, write_error_file
from rlhf_lightning.runs.meeting import POLL, answer, comes, meet, open_store
from rlhf_lightning.runs.secrets import without_secrets
from rlhf_lightning.runs.signals import EXIT_CODES, Stopped

_PERIOD = 1.0  # seconds between two looks at the others
_LATE = 5.0  # seconds in which the reason of a broken connection is found, if there is one
_GRACE, _OWN_GRACE = 5.0, 30.0
"""Seconds in which a process may end in its own way after another one has failed, and after it has failed itself."""
_LOST_AFTER = 3  # looks that find no store
_LONGEST_START = 1800.0  # seconds between the first and the last process, as PyTorch's process groups wait
_BROKEN = re.compile(r"gloo|nccl|tcpstore|c10d|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What an error says that another process's end may have caused."""

Describe = Callable[[Exception], tuple[str, int]]

_active: list[Peers] = []


def active() -> Peers | None:
    """The processes of the run that this one belongs to; None if it is alone."""
    return _active[-1] if _active else None


def join(trainer: pl.Trainer, describe: Describe) -> Peers | None:
    """Find the other processes of a run, which are there or will be started.

    Args:
        trainer: built, not yet started.
        describe: one line for an error, and the exit code.

    Returns:
        None where there are none, or where they do not run this command line.

    Raises:
        RankError: the first one did not come.
    """
    children = launched_children(trainer)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or environment is None or children is None:
        return None
    started = trainer.world_size if environment.creates_processes_externally else trainer.num_nodes
    store = open_store(environment, trainer.global_rank, trainer.world_size, _LONGEST_START)
    part = meet(store, trainer.global_rank, _LONGEST_START)
    return Peers(part, trainer.global_rank, trainer.world_size, started, describe, children)


def join_to_fail(describe: Describe) -> Peers | None:
    """The same for a process of torchrun that fails before it has a trainer, while others may wait for it.

    Args:
        describe: as for `join`.

    Returns:
        None where there are none, or where the first one does not come soon.
    """
    environment = TorchElasticEnvironment()
    if not environment.detect() or environment.world_size() == 1:
        return None
    rank, size = environment.global_rank(), environment.world_size()
    try:
        return Peers(meet(open_store(environment, rank, size, _LATE), rank, _LATE), rank, size, size, describe, list)
    except (RankError, RuntimeError):
        return None


class TellPeers(Callback):
    """Tells the other processes of an exception before other callbacks act on it, which may take them long."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell them, unless all have agreed to stop."""
        if (peers := active()) is not None and not _is_agreed(exception):
            peers.fail(exception)


def _is_agreed(error: BaseException | None) -> bool:
    return error is None or (isinstance(error, Stopped) and error.agreed)


class Peers:
    """The processes of a run; a context manager, within which one that fails ends the others.

    Leaving it waits until all have done their work. Leaving it by an error tells the others, and raises the one line
    that is to be said, of the process that failed first.

    Args:
        store: that they share.
        rank: of this process.
        world_size: of the run.
        started: how many there are before the trainer starts the others, if it does.
        describe: one line for an error, and the exit code.
        children: gives the processes that this one has started.

    Attributes:
        failure: the first one that is known here.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        started: int,
        describe: Describe,
        children: Callable[[], Sequence[Popen[Any]]],
    ) -> None:
        self.store, self.rank, self.world_size, self.children = store, rank, world_size, children
        self.failure: Failure | None = None
        self._store_is_there = True
        self._started, self._describe = started, describe
        self._processes, self._joined = Processes(store), set[int]()
        self._found, self._over = threading.Event(), threading.Event()
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Peers:
        """Look after the others from now on."""
        _active.append(self)
        self._held.callback(_active.remove, self)
        self._held.enter_context(leave_children_alone())
        self._held.callback(self._over.set)
        self._processes.add(self.rank)
        threading.Thread(target=self._watch, name="rlhf-peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the others, or tell them what went wrong here.

        Raises:
            RankError: a process has failed.
        """
        with self._held:
            if _is_agreed(error):
                self._wait_for_all()
                return
            assert error is not None
            failure = self.fail(error)
            write_error_file(failure, self.rank)
            self._let_go(failure)
            if failure.rank != self.rank or isinstance(error, Exception):
                raise self._error(failure) from error

    def decide(self, name: str, choose: Callable[[], Any]) -> Any:
        """What the first process chooses, in every process. Each of them must call it.

        Args:
            name: of the decision.
            choose: called in the first process; gives a JSON value.

        Raises:
            RankError: a process has failed meanwhile.
        """
        key = f"decided/{name}"
        if self.rank == 0:
            self.store.set(key, json.dumps(choose()))
        self._wait(lambda: self.store.check([key]))
        return json.loads(self.store.get(key))

    def fail(self, error: BaseException) -> Failure:
        """Tell the others of an error, unless one of them has failed before.

        Args:
            error: that ends this process.

        Returns:
            The first failure of the run.
        """
        if self.failure is None and _BROKEN.search(f"{type(error).__name__} {error}"):
            self._found.wait(_LATE)  # the connection broke, as another process has failed
        if self.failure is None:
            line, code, is_stop = self._described(error)
            line = without_secrets(" ".join(line.split()))
            self._tell(Failure(self.rank, line, code, time.time(), is_stop=is_stop))
        assert self.failure is not None
        return self.failure

    def _tell(self, failure: Failure) -> None:
        """Note a failure, and tell the others, unless there was one before.

        Args:
            failure: of any process.
        """
        first = self._at_store(lambda: self.store.compare_set("failure", "", failure.written()))
        self.failure = self.failure or (Failure.read(first) if first else failure)
        self._at_store(lambda: self.store.set(f"read/{self.rank}", ""))
        self._found.set()

    def _at_store(self, action: Callable[[], Any]) -> Any:
        """Do something with the store; nothing once it is gone, as each attempt to reach it prints 50 lines."""
        try:
            return action() if self._store_is_there else None
        except RuntimeError:
            self._store_is_there = False
            return None

    def _described(self, error: BaseException) -> tuple[str, int, bool]:
        code = error.code if isinstance(error, SystemExit) else None
        number = 130 if isinstance(error, KeyboardInterrupt) else code
        name = error.name if isinstance(error, Stopped) else next((n for n, c in EXIT_CODES.items() if c == number), "")
        if name:
            return f"stopped by {name}", EXIT_CODES[name], True
        if isinstance(error, SystemExit):
            return f"something called sys.exit({code!r})", code if isinstance(code, int) and code else 1, False
        assert isinstance(error, Exception)
        return *self._describe(error), False

    def _is_done(self) -> bool:
        """Whether all have done their work, so that any may be gone."""
        children = self.children()
        if len(children) + 1 == self.world_size and children and all(child.poll() == 0 for child in children):
            return True
        # A process that starts the others may have had no need to.
        return bool(self.store.add("done", 0) >= (self.world_size if children else self._started))

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.failure is not None:
                raise self._error(self.failure)
            time.sleep(POLL)

    def _wait_for_all(self) -> None:
        """Let no process go before all have done their work: who looks after them would take it for a crash."""
        self.store.add("done", 1)
        self._wait(self._is_done)
        self._over.set()
        self.store.add("left", 1)
        if self.rank == 0:  # the store may be in this process
            comes(lambda: self.store.add("left", 0) >= self.store.add("done", 0), _GRACE)

    def _let_go(self, failure: Failure) -> None:
        """End the processes that this one has started, and let the others read what happened, if that lies here.

        Args:
            failure: of the run.
        """
        if self.rank == 0:
            # Those that something else starts may come late, and would wait for this one.
            late = {*range(1, self.world_size)} if self._started == self.world_size else set()
            keys = [f"read/{rank}" for rank in (late | self._joined) - {failure.rank}]
            seconds = _OWN_GRACE if late - self._joined else _GRACE / 2

            def is_read() -> bool:
                self._answer()
                return not keys or self.store.check(keys)

            self._at_store(lambda: comes(is_read, seconds))
        for child in self.children():
            comes(lambda child=child: child.poll() is not None, _GRACE / 2)  # type: ignore[misc]
            child.kill()
            child.wait()

    def _line_for(self, failure: Failure) -> str:
        """What this process says of a failure; nothing where another one of this host says it.

        Args:
            failure: the first one of the run.
        """
        if failure.rank == self.rank:
            return f"rank {self.rank}: {failure.line}" if self.rank or self._joined else failure.line
        self._at_store(self._processes.refresh)
        here = [rank for rank in self._processes.ranks() if rank != failure.rank or failure.is_told]
        return failure.sentence() if self.rank == min(here, default=self.rank) else ""

    def _error(self, failure: Failure) -> RankError:
        return RankError(self._line_for(failure), failure.code, failure.is_stop)

    # In a thread of its own: where the main one waits in a collective for a process that is gone, nothing raises there.

    def _watch(self) -> None:
        while not self._found.is_set() and not self._over.is_set():
            try:
                self._look()
            except RuntimeError:  # of the store, which went with its process
                self._store_is_there = False
                if not self._over.is_set() and not comes(self._look_at_host, _PERIOD):
                    self._tell_of(0, "its process, or its node, cannot be reached any more", 1)
            all_there = self.rank or len(self._joined) + 1 == self.world_size
            self._found.wait(_PERIOD if all_there else POLL)
        if (failure := self.failure) is None:
            return
        if not self._over.wait(_GRACE if failure.rank != self.rank else _OWN_GRACE):
            self._end_at_once(failure)

    def _look(self) -> None:
        if self.rank == 0:
            self._answer()
        if self.store.check(["failure"]):
            self._tell(Failure.read(self.store.get("failure")))
            return
        for number, child in enumerate(self.children(), start=1):
            if code := child.poll():
                line = f"its process {child.pid} {how_it_ended(code)}"
                self._tell_of(self.rank + number, line, code if code > 0 else 1)
                return
        self._processes.refresh()
        self._look_at_host()

    def _answer(self) -> None:
        """Let processes know that this is the part of the store where they meet."""
        others = {*range(1, self.world_size)} - self._joined
        self._joined |= {rank for rank in others if answer(self.store, rank)}

    def _look_at_host(self) -> bool:
        gone = self._processes.gone()
        if not gone or (self._store_is_there and self._is_done()):
            return False
        (rank, number), *_ = gone
        self._tell_of(rank, f"its process {number} ended without a word, perhaps killed as memory ran out", 1)
        return True

    def _tell_of(self, rank: int, line: str, code: int) -> None:
        self._tell(Failure(rank, line, code, time.time(), is_told=False))

    def _end_at_once(self, failure: Failure) -> None:
        write_error_file(failure, self.rank)
        self._let_go(failure)
        if line := self._line_for(failure):
            os.write(2, f"{'' if failure.is_stop else 'error: '}{line}\n".encode())
        os._exit(failure.code)
