"""The cache of prepared folders: made once, found by a hash of all that went into them, never seen half-written.

An entry is the folder `<root>/<key>`. It is built beside its place, as `<root>/.<key>.<something>`, and renamed when
it is complete; a lock lets one process build while others wait for what it builds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.caches import cache_root
from rlhf_lightning.data.preparing.prepared import PreparedFolder
from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from rlhf_lightning.data.preparing.legacy import LegacyPreparation
    from rlhf_lightning.data.preparing.preparation import Preparation

logger = logging.getLogger(__name__)


def find_or_build(preparation: Preparation | LegacyPreparation, cache_dir: str | Path | None = None) -> PreparedFolder:
    """The cache entry of a preparation, built now if it is not there.

    Args:
        preparation: what is asked for.
        cache_dir: root of the cache; by default `cache_root()`.

    Raises:
        UserError: data that cannot be used, or a cache that cannot be written.
    """
    root = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    key = preparation.key()
    try:
        return _open(root, key)
    except UserError:  # not there, or damaged, unless another process is about to make it anew
        pass
    lock = FileLock(root / f"{key}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"the cache {root} cannot be written ({error}); set another `cache_dir`") from error
    try:
        return _open(root, key)
    except UserError as error:
        if (root / key).exists():
            reason = str(error).partition(";")[0]
            rank_zero_warn(f"the cache entry is made anew, as it cannot be used: {reason}")
        return _build(preparation, root, key)
    finally:
        lock.release()


def _open(root: Path, key: str) -> PreparedFolder:
    folder = PreparedFolder.open(root / key)
    if folder.manifest.get("key") != key:
        raise UserError(f"{folder.path} was made from something else")
    return folder


def _build(preparation: Preparation | LegacyPreparation, root: Path, key: str) -> PreparedFolder:
    # Under the lock nobody else on this host works on this key, so what is here was left by a build that was killed.
    # Some network disks do not show the lock to other hosts; their builds are left alone, and the first to end stands.
    host = platform.node()
    folder = root / f".{key}.{host}.{os.getpid()}"
    try:
        for left in [*root.glob(f".{key}.{host}.*"), root / key]:
            if left.exists():
                logger.info("removing the unfinished %s", left)
                shutil.rmtree(left)
        folder.mkdir()
        preparation.build(folder)
        folder.rename(root / key)
    except OSError as error:
        with contextlib.suppress(UserError):
            return _open(root, key)  # another host was faster
        if error.filename is not None and root not in Path(error.filename).parents:
            raise  # it is not the cache
        raise UserError(f"the cache {root} cannot be written ({error}); set another `cache_dir`") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _open(root, key)
