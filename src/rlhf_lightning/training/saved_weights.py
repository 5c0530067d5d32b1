"""The weights in a checkpoint, whichever strategy wrote it, read one after the other by one process; no code is run.

A checkpoint is a file, or a folder that several processes have written: each knows another form. What is read stays on
the disk until a weight is asked for.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import check_whole, load_plain
from rlhf_lightning.training.dcp_folders import INDEX, PlainReader, read_states
from rlhf_lightning.training.zero_files import WEIGHTS_OF_ALL, ZeroFiles

STATE_DICT = "state_dict"


class SavedWeights(ABC):
    """What a checkpoint holds.

    Attributes:
        states: all that Lightning, the module and the callbacks have saved besides weights.
        tensors: each weight by its name in the module, on the device `meta`: shapes and types.
    """

    states: dict[str, Any]
    tensors: dict[str, Tensor]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A weight as the module held it, on the CPU.

        Args:
            name: one of `tensors`.
        """


class _OfFile(SavedWeights):
    """Those of a file of Lightning's, which one process has written."""

    def __init__(self, path: Path) -> None:
        self.states = load_plain(path)
        self._weights: dict[str, Tensor] = self.states.pop(STATE_DICT)
        self.tensors = {name: _empty(tensor) for name, tensor in self._weights.items()}

    def read(self, name: str) -> Tensor:
        return self._weights[name]


class _OfZero(SavedWeights):
    """Those of a folder of DeepSpeed's."""

    def __init__(self, path: Path) -> None:
        self._files = ZeroFiles(path)
        self.states, self.tensors = self._files.states, self._files.tensors

    def read(self, name: str) -> Tensor:
        return self._files.read(name)


class _OfDcp(SavedWeights):
    """Those of a folder of PyTorch's distributed checkpoints, parts of each by many processes."""

    def __init__(self, path: Path) -> None:
        self.states = read_states(path)
        self.tensors = self.states.pop(STATE_DICT)
        self._reader = _KnowingReader(path)

    def read(self, name: str) -> Tensor:
        whole = torch.empty_like(self.tensors[name], device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
            dcp.load({f"{STATE_DICT}.{name}": whole}, storage_reader=self._reader, no_dist=True)
        return whole


class _KnowingReader(PlainReader):
    """Reads what lies where once."""

    _known: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        self._known = self._known or super().read_metadata(*args, **kwargs)
        return self._known


def open_weights(path: Path) -> SavedWeights:
    """Open a checkpoint, after a look at whether it is whole.

    Args:
        path: of a file or a folder.

    Raises:
        UserError: says in one line what is wrong.
    """
    check_whole(path)
    if path.is_file():
        return _OfFile(path)
    if (path / WEIGHTS_OF_ALL).is_file():
        return _OfZero(path)
    if (path / INDEX).is_file():
        return _OfDcp(path)
    raise UserError(f"'{path}' is the checkpoint of a strategy whose form is not known here")


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
