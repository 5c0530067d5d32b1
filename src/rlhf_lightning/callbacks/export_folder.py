"""Putting a new folder in the place of an old one, so that whoever looks finds one of the two, whole.

The new one is written into `.<name>.unfinished` beside its place, a name that nobody else gives; nothing but what lies
there, and a folder of this package whose place is taken, is ever removed. A run that was killed between two renames is
put right when the next one begins.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.lineage import is_ours

_OF_A_RUN = "config.yaml", "checkpoints"
_WRITING, _NEW, _OLD = "writing", "new", "old"


def real_place(folder: Path) -> Path:
    """Where a folder lies, links followed, so that a link stays one and what it leads to is replaced.

    Args:
        folder: need not be there.

    Raises:
        UserError: links that lead in a circle.
    """
    try:
        place = folder.expanduser().resolve()
        place.exists()
    except (OSError, RuntimeError) as error:
        raise UserError(f"'{folder}' cannot be a folder to write to ({error}); choose another") from error
    return place


def check_place(folder: Path) -> None:
    """Refuse a place where something lies that is not an export.

    Args:
        folder: need not be there.

    Raises:
        UserError: it is a file, or a folder of somebody else.
    """
    place = real_place(folder)
    if place.exists() and (not place.is_dir() or (any(place.iterdir()) and not _is_export(place))):
        raise UserError(
            f"'{folder}' exists and is not an export of this package; choose another place, or move it away"
        )


def _is_export(place: Path) -> bool:
    """Whether a folder is an export; the folder of a run has a record, too, and all that must not be lost."""
    return is_ours(place) and not any((place / name).exists() for name in _OF_A_RUN)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, or replace an export by it.

    Args:
        folder: its place, or a link to it.
        write: fills an empty folder that is there.

    Raises:
        UserError: what lies in its place is not an export.
    """
    finish_replacing(folder)
    check_place(folder)
    place = real_place(folder)
    workplace = _workplace(place)
    writing = workplace / _WRITING
    try:
        writing.mkdir(parents=True)
        write(writing)
        _see_onto_the_disk(writing)
        writing.rename(workplace / _NEW)
        finish_replacing(folder)
        check_place(folder)  # somebody may have put something there; the new folder waits until that is moved away
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        _leave(workplace)
        raise


def finish_replacing(folder: Path) -> None:
    """Do what is left to do where a run was killed, if anything.

    Args:
        folder: its place, or a link to it.
    """
    place = real_place(folder)
    workplace = _workplace(place)
    new, old = workplace / _NEW, workplace / _OLD
    shutil.rmtree(workplace / _WRITING, ignore_errors=True)  # half of a folder
    if new.is_dir():
        if place.is_dir() and (_is_export(place) or not any(place.iterdir())):
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        if not place.exists():
            new.rename(place)
    elif old.is_dir() and not place.exists():
        old.rename(place)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
    _leave(workplace)


def _workplace(place: Path) -> Path:
    return place.with_name(f".{place.name}.unfinished")


def _leave(workplace: Path) -> None:
    if workplace.is_dir() and not any(workplace.iterdir()):
        workplace.rmdir()


def _see_onto_the_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
