"""Processes that die where it hurts: by SIGKILL, just before a function is called for the nth time."""

from __future__ import annotations

import os
import pydoc
import signal
from collections.abc import Callable
from typing import Any


def die_in(function: str, call: int = 1, after: bool = False) -> None:
    """Let this process kill itself in a function.

    Args:
        function: its whole name, such as `os.replace`.
        call: when it is called so many times.
        after: when it has done its work, not before.
    """
    place, _, name = function.rpartition(".")
    owner: Any = pydoc.locate(place)
    setattr(owner, name, _dying(getattr(owner, name), call, after))


def _dying(function: Callable[..., Any], call: int, after: bool) -> Callable[..., Any]:
    calls = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) < call:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    return called


def killed_in(action: Callable[[], Any], function: str, call: int = 1) -> None:
    """Run something in a forked process that dies in a function; only files tell of it."""
    child = os.fork()
    if child == 0:
        die_in(function, call)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "it did not get there"
