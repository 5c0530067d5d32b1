"""Tensors in a folder of PyTorch's distributed checkpoints (DCP), beside a file of plain values; no pickle is run.

Each process writes its parts of the tensors; whoever reads, takes the parts it needs, whatever the number of processes.
DCP keeps what lies where in a pickled file, `.metadata`, which it loads like any pickle: here only its own classes are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import load_plain

STATES, INDEX = "meta.pt", ".metadata"
"""Names that Lightning and torch give to the plain values and to what lies where."""

_KNOWN: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        ChunkStorageMetadata,
        _MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
}
_DTYPES = {str(dtype).partition(".")[2] for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class _Foreign(Exception):
    """Names what a pickle holds besides descriptions of tensors."""


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch.serialization" and name == "_get_layout":
            return _layout
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return PurePath  # the folder as it was called when it was written
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise _Foreign(f"an object of {module}.{name}")


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise _Foreign(f"a layout {name}")
    return torch.strided


def _member(kind: Any, name: Any) -> Any:
    """In the place of `getattr`, by which Python 3.11.0 to 3.11.3 write a member of an enum, and of nothing else."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise _Foreign("an object of builtins.getattr")
    return _MEM_FORMAT_ENCODING[name]


class PlainReader(FileSystemReader):
    """Reads the tensors of a DCP folder without running code from it.

    Args:
        path: the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What tensors there are, and where.

        Raises:
            UserError: the file holds something else.
        """
        metadata = _read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _read_index(folder: Path) -> Metadata:
    try:
        with (folder / INDEX).open("rb") as file:
            metadata = _Unpickler(file).load()
        _check_index(metadata)
    except _Foreign as e:
        raise UserError(f"'{folder / INDEX}' holds {e}, which could run code, so it is not loaded") from e
    except Exception as e:  # whatever a damaged pickle can do
        raise UserError(
            f"'{folder}' is not a complete checkpoint ('{INDEX}' is damaged); resume from another one"
        ) from e
    return metadata


def _check_index(metadata: Any) -> None:
    if not isinstance(metadata, Metadata):
        raise _Foreign(f"an object of {type(metadata).__name__}")
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise _Foreign(f"'{name}', which is no tensor")
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise _Foreign(f"the path '{info.relative_path}'")


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """What tensors a folder holds: name to a tensor of the same shape and type on the device `meta`, without numbers.

    Args:
        folder: of a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    return {
        name: torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
        for name, stored in _read_index(folder).state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def load_tensors(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors from a folder. Where there are several processes, all must call it.

    Args:
        folder: of a checkpoint.
        targets: name to tensor; of a `DTensor` each process fills its part. Changed in place.

    Raises:
        UserError: the folder cannot be read.
    """
    if targets:
        dcp.load({name: tensor.detach() for name, tensor in targets.items()}, storage_reader=PlainReader(folder))


def write_states(folder: Path, states: dict[str, Any], in_parts: Iterable[str]) -> None:
    """Write nested values: some tensors in parts by all processes, the rest by the first. Every process must call it.

    Args:
        folder: is there and empty.
        states: dicts and lists of plain values and tensors.
        in_parts: keys of `states` below which tensors are written to DCP's files, a `DTensor` in parts.
    """
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> Tensor:
        tensors[name] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    plain = states | {key: _map_tensors(states[key], put, key) for key in in_parts if key in states}
    if torch.distributed.get_rank() == 0:
        torch.save(plain, folder / STATES)
    dcp.save(dict(tensors), checkpoint_id=folder)


def read_states(folder: Path) -> dict[str, Any]:
    """The nested values of `write_states`, with tensors on the device `meta` in the place of those that have numbers.

    Args:
        folder: of a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    states = load_plain(folder / STATES)
    if not isinstance(states, dict):
        raise UserError(f"'{folder}' is no Lightning checkpoint; pass one that a run wrote into its folder checkpoints")
    return states


def load_states(folder: Path, prefix: str, states: Any, make: Callable[[str, Tensor], Tensor]) -> Any:
    """Put numbers into part of what `read_states` gave. Every process must call it.

    Args:
        folder: of the checkpoint.
        prefix: the names of the keys that lead to the part, joined by dots.
        states: the part.
        make: makes the tensor to be filled, from its name without the prefix and its place-holder.

    Returns:
        The part, its tensors those that `make` made.
    """
    targets: dict[str, Tensor] = {}

    def target(name: str, tensor: Tensor) -> Tensor:
        targets[f"{prefix}.{name}"] = made = make(name, tensor)
        return made

    filled = _map_tensors(states, target)
    load_tensors(folder, targets)
    return filled


def _map_tensors(value: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """The nested value, with `change(name, tensor)` in the place of each tensor; names are keys joined by dots."""
    if isinstance(value, Tensor):
        return change(name, value)
    below = f"{name}." if name else ""
    if isinstance(value, dict):
        return {key: _map_tensors(each, change, f"{below}{key}") for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(each, change, f"{below}{number}") for number, each in enumerate(value))
    return value
