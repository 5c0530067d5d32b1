"""Small files of a run, which a process that is killed leaves as they were, or leaves whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, force it to the disk and rename it.

    What a killed process leaves beside it is replaced when the file is written the next time.

    Args:
        path: of the file; its folder is there. What it holds already stays until the new content is whole.
        content: a text is written as UTF-8.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
