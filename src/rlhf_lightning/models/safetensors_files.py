"""Safetensors files that are written tensor by tensor, in whatever order they come: none waits in memory for others.

`safetensors` itself wants all tensors of a file at once. The format is a header (JSON that says type, shape and place
of each tensor) and then their bytes, so that all places are known before the first tensor is there. What is written is,
to the byte, what `safetensors.torch.save_file` writes of the same tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

_METADATA = {"format": "pt"}
"""As transformers and PEFT write it, and older versions demand."""
_ALIGNED = 8
_AT_ONCE = 1 << 24  # bytes


class TensorFile:
    """A file that is whole when every tensor was written; a context manager.

    Args:
        path: of the file, which is replaced.
        tensors: what it will hold, by name; only types and shapes count, so that they may be on the device `meta`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._expected = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        header, self._places = _header(tensors)
        self._file = path.open("wb")
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors; once.

        Args:
            name: of one that was announced.
            tensor: of the type and shape that were; on any device.
        """
        assert self._expected.pop(name) == (tensor.dtype, tensor.shape), name
        self._file.seek(self._places[name])
        numbers: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        content = memoryview(numbers)
        for start in range(0, len(content), _AT_ONCE):
            self._file.write(content[start : start + _AT_ONCE])

    def __enter__(self) -> TensorFile:
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it; nothing may be missing, unless something went wrong anyway."""
        self._file.close()
        assert error is not None or not self._expected, sorted(self._expected)


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file, and where in it each tensor begins."""
    # The library says in which order, and what it calls the types.
    said = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata=_METADATA)
    (length,) = struct.unpack_from("<Q", said)
    header: dict[str, Any] = json.loads(said[8 : 8 + length])
    start, starts = 0, {}
    for name, told in header.items():
        if name in tensors:
            size = tensors[name].numel() * tensors[name].element_size()
            told |= {"shape": list(tensors[name].shape), "data_offsets": [start, start + size]}
            starts[name], start = start, start + size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + place for name, place in starts.items()}
