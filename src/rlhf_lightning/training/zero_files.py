"""A checkpoint folder of DeepSpeed, read without DeepSpeed: of any ZeRO stage, written by any number of processes.

Up to stage 2 one file holds all weights. With stage 3 each process writes its part of them, as float32 numbers in a
row: of each weight in turn, filled up so that all parts are equally long. (DeepSpeed's own `zero_to_fp32.py`, which
lies in the folder, puts the whole model together in memory, and unpickles whatever it finds.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import load_plain

WEIGHTS_OF_ALL = "latest"
"""File that names the folder inside, as DeepSpeed calls it."""

_OTHERS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "builtins.getattr",  # by which Python 3.11.0 to 3.11.3 write a member of an enum
)
"""What DeepSpeed pickles that is neither a tensor nor a plain value; nothing of it is needed here."""


class _Unread:
    """In the place of each of them."""

    def __new__(cls, *args: Any) -> _Unread:
        """Made of whatever it was pickled with."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Its state is left alone."""


class ZeroFiles:
    """The weights in a folder.

    Args:
        path: of the checkpoint, whole.

    Attributes:
        states: what Lightning, the module and the callbacks have saved besides weights.
        tensors: each weight by its name in the module, on the device `meta`.

    Raises:
        UserError: it holds what could run code, or is no folder of DeepSpeed's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        folder = path / (path / WEIGHTS_OF_ALL).read_text(encoding="utf-8").strip()
        whole = folder / "mp_rank_00_model_states.pt"
        parts = _by_rank(folder, "model")
        if not whole.is_file() and not parts:
            raise UserError(f"'{path}' holds no weights that DeepSpeed could have written")
        self.states = _load(whole if whole.is_file() else parts[0])
        self._weights: dict[str, Tensor] = self.states.pop("module")
        self._places: dict[str, tuple[torch.Size, int]] = {}
        if not whole.is_file():
            self._find_parts(folder, len(parts))
        self.tensors = {name: self._empty(name) for name in self._weights}

    def _find_parts(self, folder: Path, world_size: int) -> None:
        """Where in the rows of numbers each weight begins."""
        files = _by_rank(folder, "optim")
        if len(files) != world_size:
            raise UserError(f"'{self._path}' holds the parts of {len(files)} of {world_size} processes")
        self._rows: list[list[Tensor]] = [_load(file)["optimizer_state_dict"]["fp32_flat_groups"] for file in files]
        start = 0
        for shapes in self.states["param_shapes"]:
            for name, shape in shapes.items():
                self._places[name] = shape, start
                start += -(-shape.numel() // world_size)
        for name, other in dict(self.states.get("shared_params") or {}).items():
            if other in self._places:
                self._places[name] = self._places[other]
            else:  # frozen, and left out by one of its names only
                self._weights.pop(name, None)

    def _empty(self, name: str) -> Tensor:
        held = self._weights[name]
        shape = self._places[name][0] if name in self._places else held.shape
        return torch.empty(shape, dtype=held.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """A weight as the module held it, on the CPU.

        Args:
            name: one of `tensors`.
        """
        if name not in self._places:
            return self._weights[name]
        shape, start = self._places[name]
        length = -(-shape.numel() // len(self._rows))
        whole = torch.cat([piece for row in self._rows for piece in _cut(row, start, length)])
        return whole[: shape.numel()].view(shape).to(self._weights[name].dtype)


def _cut(row: list[Tensor], start: int, length: int) -> Iterator[Tensor]:
    """Numbers of a row that is stored in several pieces."""
    for piece in row:
        inside = piece[max(start, 0) : max(start + length, 0)]
        if len(inside):
            yield inside
        start -= len(piece)


def _by_rank(folder: Path, what: str) -> list[Path]:
    """The files that each process has written, in the order of their ranks."""
    found = folder.glob(f"*zero_pp_rank_*_mp_rank_00_{what}_states.pt")
    return sorted(found, key=lambda path: int(path.name.partition("zero_pp_rank_")[2].partition("_")[0]))


def _load(file: Path) -> dict[str, Any]:
    with _plain_loading():
        loaded: dict[str, Any] = load_plain(file)
    return loaded


@contextmanager
def _plain_loading() -> Iterator[None]:
    """Let `torch.load` take, beside tensors and plain values, the names of `_OTHERS`, for what does nothing."""
    unread: list[Any] = [(_Unread, name) for name in _OTHERS]
    with safe_globals(unread):
        yield
