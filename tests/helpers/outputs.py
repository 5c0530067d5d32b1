"""What a command's streams may be like when it starts; called in its process before it."""

from __future__ import annotations

import os
import sys


def unread() -> None:
    """Output and errors go to a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(writer)


def one_file() -> None:
    """Errors go where the output goes, as on a terminal."""
    os.dup2(1, 2)


def closed() -> None:
    """There are none."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, None)
        os.close(descriptor)
