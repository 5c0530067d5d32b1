"""How often the host waits for the device: on a GPU as torch says, on a CPU as it would be on a GPU."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward")
"""Operations that do."""

_NOT_THE_CALLER = ("/torch/", "warnings.py", "_gpu_waits.py", "rlhf_lightning/host.py")


class _Host:
    """Which tensors would lie in the host's memory were the others on a GPU."""

    def __init__(self) -> None:
        self._tensors: Any = WeakTensorKeyDictionary()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self._tensors[tensor] = True
        return tensor

    def has(self, arguments: Any) -> bool:
        """Whether some of the tensors among an operation's arguments do, and so all: it mixes none."""
        return any(isinstance(each, torch.Tensor) and each in self._tensors for each in tree_leaves(arguments))


class _Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that Python asks for, and results of which the data say how long."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.host = _Host()

    def count(self) -> None:
        if place := _caller():
            self.places[place] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in chosen)
        on_host = self.host.has((args, kwargs))
        if (by_mask or name in _WAITING) and not on_host:
            self.count()
        result = func(*args, **(kwargs or {}))
        if on_host:
            tree_map_only(torch.Tensor, self.host.add, result)
        return result


class _Copies(TorchFunctionMode):
    """Counts copies to the host's memory, which on a CPU are none."""

    def __init__(self, waits: _Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "numpy") and not self.waits.host.has(args):
            self.waits.count()
            return self.waits.host.add(args[0].clone()) if name == "cpu" else func(*args, **(kwargs or {}))
        if name == "to" and self.waits.host.has(args[:1]) and _names_device(args[1:], kwargs or {}):
            with _disable_current_modes():
                return args[0].clone()
        return func(*args, **(kwargs or {}))


def _names_device(args: Any, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(each, str | torch.device) for each in (*args, *kwargs.values()))


def _caller() -> str:
    """The line that made it wait, outside of torch and of what reads for others; nothing in an optimizer.

    An optimizer's own counters stay on the host.
    """
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _NOT_THE_CALLER):
        if "/torch/optim/" in frame.f_code.co_filename:
            return ""
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"


@contextmanager
def counted_waits(device: str) -> Iterator[Counter[str]]:
    """How often the host waits for the device, by the line that made it, filled when the block has ended.

    Args:
        device: on `cuda` torch itself says when it waits (`set_sync_debug_mode`); on `cpu` what would wait is counted,
            as if all tensors lay on a GPU but those that `Tensor.cpu` has brought. Copies to the device are left out.
    """
    places: Counter[str] = Counter()
    if device == "cpu":
        with _Waits() as seen, _Copies(seen):
            yield places
        places.update(seen.places)
        return

    def hear(message: Any, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[_caller() or "the optimizer"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let decoding look as seldom on a CPU as it does on a GPU whether responses have ended, in a `with` block."""
    from rlhf_lightning.generation import decoding

    with mock.patch.dict(decoding.STEPS_BETWEEN_LOOKS, clear=True):
        yield
