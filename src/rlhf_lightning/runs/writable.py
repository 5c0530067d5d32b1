"""Whether a place can be written to, asked before work begins that would be lost there."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_lightning.errors import UserError


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is not there and cannot be made, or that cannot be written to.

    Args:
        name: what asks for it, such as an option.
        folder: need not be there.

    Raises:
        UserError: names what is in its way.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{name} {folder}: '{there}' is a file, and a folder is needed there; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{name} {folder}: nothing may be written to '{there}'; name another place")


def check_file(name: str, file: Path) -> None:
    """Refuse a file whose place a folder takes, or whose folder cannot be written to.

    Args:
        name: what asks for it, such as an option.
        file: need not be there.

    Raises:
        UserError: names what is in its way.
    """
    if file.is_dir():
        raise UserError(f"{name} {file}: there is a folder of that name; name a file")
    check_folder(name, file.parent)
