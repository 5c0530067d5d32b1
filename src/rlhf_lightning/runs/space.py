"""Whether a disk has room for what a run will write."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf_lightning.errors import UserError


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free


def check_space(folder: Path, size: int, count: int, free: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where checkpoints are written.
        size: bytes of each.
        count: how many will lie there at a time, those that are there already left out.
        free: bytes that are free.

    Raises:
        UserError: names the sizes.
    """
    needed = size * count
    if needed > free:
        raise UserError(
            f"'{folder}' has {_said(free)} free, and the checkpoints of this run need {_said(needed)}: {count} of "
            f"{_said(size)} (one that is written, beside those that are kept); make room, keep fewer (save_top_k), or "
            "choose another --trainer.default_root_dir"
        )


def _said(size: int) -> str:
    """A size in the unit that suits it.

    Example:
        >>> _said(1_600_000_000), _said(52_000)
        ('1.6 GB', '0.1 MB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
