"""Where what is made once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of all caches: `$RLHF_LIGHTNING_CACHE`, or `~/.cache/rlhf_lightning`; it need not exist."""
    return Path(os.environ.get("RLHF_LIGHTNING_CACHE") or "~/.cache/rlhf_lightning").expanduser()
