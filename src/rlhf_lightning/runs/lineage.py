"""Where a model comes from, as a record that lies in its run's folder, in its checkpoints and in its export.

A record names versions, the revision of the working folder, data, and the models that a stage began with, each with a
hash of its weights; the records of the stages that made those are kept beside it under their own hash. It holds no
dates, so that two runs of the same thing have the same record.
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
import subprocess
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning
import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from rlhf_lightning import __version__
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.secrets import without_secrets
from rlhf_lightning.runs.whole_files import write_whole

FILE = "lineage.json"
MADE_BY = "rlhf_lightning"
"""What such a file says under `made_by`, which is how a folder of this package is known."""
TRAINED_ON = "trained_on.npy"
"""Beside it in an export: the hashes of all prompts that it and the stages before it were trained on."""

_STAGES = "stages"
_BLOCK = 4096  # bytes
_STRIDE = 16 * 2**20  # bytes
_GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


# Hashes


def hash_of_weights(folder: Path) -> str | None:
    """A hash of the weights in a model folder; of 14 GB it reads some megabytes.

    Read are the size of each file, 4 KiB every 16 MiB, and of a safetensors file its header and the first 4 KiB of each
    tensor. It is blind to a change that leaves all of these alone, such as one row of a matrix, and to `config.json`;
    any training changes every tensor that it trains.

    Args:
        folder: with `*.safetensors` or, where there are none, `*.bin`; those in folders below do not count.

    Returns:
        32 letters, or None where there are no weights.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            header, starts = _header(file) if path.suffix == ".safetensors" else (b"", [])
            digest.update(header)
            for start in sorted({*range(0, size, _STRIDE), *starts}):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest() if files else None


def _header(file: Any) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and where its tensors begin; empty for what is none."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(min(length, 2**27))
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        return header, [8 + length + int(tensor["data_offsets"][0]) for tensor in tensors]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return b"", []  # it will not load either


def hash_of_record(record: Mapping[str, Any]) -> str:
    """A hash of what a record says of its own stage, 32 letters."""
    own = {name: value for name, value in record.items() if name != _STAGES}
    return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=16).hexdigest()


def short(hash_: str | None) -> str:
    """The beginning of a hash, for messages."""
    return str(hash_)[:12]


# Records


def new_record(stage: str, models: Mapping[str, dict[str, Any]], **said: Any) -> dict[str, Any]:
    """The record of a stage.

    Args:
        stage: name of its class.
        models: what it begins with, by role: each as `model_of` gives it.
        **said: more of it, as plain values.
    """
    stages: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for role, model in models.items():
        own[role] = {name: value for name, value in model.items() if name != "lineage"}
        if record := model.get("lineage"):
            own[role]["made_by_stage"] = hash_of_record(record)
            stages |= record.get(_STAGES, {})
            stages[hash_of_record(record)] = {name: value for name, value in record.items() if name != _STAGES}
    record = {
        "made_by": MADE_BY,
        "stage": stage,
        "versions": versions(),
        "git": git_revision(str(Path.cwd())),
        **said,
        "models": own,
        _STAGES: stages,
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))  # as it will be read from a file
    return plain


def versions() -> dict[str, str]:
    """Of what decides the numbers of a run."""
    return {
        "rlhf_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "python": platform.python_version(),
    }


@lru_cache
def git_revision(folder: str) -> str | None:
    """The commit of a working folder, followed by `-dirty` if files that Git knows were changed; None without one.

    Args:
        folder: the working folder.
    """
    try:
        said = subprocess.run(_GIT, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def model_of(name: str) -> dict[str, Any]:
    """What a record says of a model that a stage begins with.

    Args:
        name: folder or hub id.

    Returns:
        `name`, `weights` (None where they are not on this disk), and `lineage`, the record of the stage that made it,
        if there is one.
    """
    folder = folder_of(name)
    weights = None if folder is None else hash_of_weights(folder)
    lineage = None if folder is None else read_record(folder)
    return {"name": str(name), "weights": weights, **({"lineage": lineage} if lineage else {})}


def folder_of(name: str) -> Path | None:
    """Where a model lies on this disk: its folder, or that of the hub's cache; None where it does not.

    Args:
        name: folder or hub id.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


# Files


def is_ours(folder: Path) -> bool:
    """Whether a folder is an export of this package: its record says so."""
    try:
        return read_record(folder) is not None
    except UserError:
        return False


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None where there is none, as in those of others and of earlier versions.

    Args:
        folder: of a run or an export.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({error}); export the model again, or remove the file") from error
    if not isinstance(record, dict) or record.get("made_by") != MADE_BY:
        return None  # others may write files of that name
    if not isinstance(record.get("models"), dict) or not isinstance(record.get(_STAGES), dict):
        raise UserError(f"'{path}' does not say which models it came from; export the model again, or remove the file")
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record into a folder that is there.

    Args:
        folder: of a run or an export.
        record: from `new_record`.
    """
    text = without_secrets(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False))
    write_whole(folder / FILE, text + "\n")


def read_trained_on(folder: Path) -> np.ndarray:
    """Hashes of the prompts that an export and the stages before it were trained on, sorted, uint64.

    Args:
        folder: of a model; there are none where it has no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / TRAINED_ON
    if not path.is_file():
        return np.zeros(0, np.uint64)
    try:
        hashes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"'{path}' is damaged ({error}); export the model again, or remove the file") from error
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise UserError(f"'{path}' holds no hashes of prompts; export the model again, or remove the file")
    return hashes


def all_trained_on(names: Iterator[str], own: np.ndarray) -> np.ndarray:
    """The prompts of a stage and of all stages before it, sorted, each once, uint64.

    Args:
        names: folders or hub ids of the models it begins with.
        own: hashes of its own.
    """
    folders = [folder for name in names if (folder := folder_of(name)) is not None]
    return np.unique(np.concatenate([own.astype(np.uint64), *map(read_trained_on, folders)]))
