"""What the host knows of tensors on a device, so that it waits for the device as seldom as can be.

Whoever asks a tensor for its numbers (`tolist`, `bool`, `nonzero`, a mask as an index) waits until the device has done
all that was asked of it before, and then the device waits for what comes next. So the masks of a step are read once,
all together, and remembered; what is cut out of them afterwards is cut out of the host's copies, too.

Notation: B batch, T padded length, N entries that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Memory:
    """What is known of tensors, for as long as they live and nobody writes to them."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor) -> Any:
        """What was kept; None if nothing was, or it is no longer true."""
        version, kept = self._known.get(tensor, (None, None))
        return kept if version is not None and version == tensor._version else None

    def keep(self, tensor: Tensor, value: Any) -> None:
        """Keep a value, which must not hold on to the tensor."""
        if not tensor.is_inference():  # of those nobody can tell whether they were written to
            self._known[tensor] = (tensor._version, value)


_copies, _places = _Memory(), _Memory()


def on_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies of tensors in the host's memory; waits for the device once, for all that are not known yet.

    Args:
        tensors: any shapes and types, on one device; without gradients. The copies must not be written to.

    Example:
        >>> ids, mask = on_host(torch.tensor([[5, 6]]), torch.tensor([[True, False]]))
        >>> ids, mask
        (tensor([[5, 6]]), tensor([[ True, False]]))
    """
    copies = [_copies.get(tensor) for tensor in tensors]
    unknown = [place for place, copy in enumerate(copies) if copy is None]
    if unknown:
        read = _read([tensors[place].detach() for place in unknown])
        for place, copy in zip(unknown, read, strict=True):
            copies[place] = copy
            _copies.keep(tensors[place], copy)
    return tuple(copies)


def _read(tensors: list[Tensor]) -> list[Tensor]:
    packed = torch.cat([_flat(tensor).view(torch.uint8) for tensor in tensors]).cpu()
    parts = packed.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    # Numbers of several bytes must begin at a multiple of them.
    pairs = zip(parts, tensors, strict=True)
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in pairs]


def _flat(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    # A single number may lie at any stride, and still be called contiguous.
    return flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Send a tensor from the host's memory, without waiting; the host knows it.

    Args:
        tensor: in the host's memory; must not be written to.
        device: where it is needed.
    """
    if torch.device(device).type == "cuda":
        sent = tensor.pin_memory().to(device, non_blocking=True)
    else:
        sent = tensor.to(device)
    if sent is tensor:
        sent = tensor.view_as(tensor)  # a memory that held on to its own key would never forget it
    _copies.keep(sent, tensor)
    return sent


def alike(compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`compute(*tensors)`; the host computes it, too, where it knows them all.

    Args:
        compute: makes a new tensor of those that it is given, wherever they are.
        tensors: on one device.

    Example:
        >>> mask = torch.tensor([[True, False, False]])
        >>> alike(lambda mask: mask[:, :2], mask)
        tensor([[ True, False]])
    """
    result = compute(*tensors)
    copies = [_copies.get(tensor) for tensor in tensors]
    if all(copy is not None for copy in copies):
        _copies.keep(result, compute(*copies))
    return result


class Places(NamedTuple):
    """Where the entries of a mask are that count, row by row.

    Attributes:
        flat: among B * T, `[N]`, int64.
        rows: `[N]`, int64.
        columns: `[N]`, int64.
        lengths: how many there are in each row.
    """

    flat: Tensor
    rows: Tensor
    columns: Tensor
    lengths: list[int]


def places_of(mask: Tensor) -> Places:
    """Where a mask is True; waits for the device once if the host does not know the mask, never afterwards.

    `values[places.rows, places.columns]` is `values[mask]`, which waits each time.

    Args:
        mask: `[B, T]`, bool.

    Example:
        >>> places = places_of(torch.tensor([[False, True], [True, True]]))
        >>> places.flat.tolist(), places.lengths
        ([1, 2, 3], [1, 2])
    """
    places: Places | None = _places.get(mask)
    if places is None:
        (copy,) = on_host(mask)
        found = torch.cat([copy.flatten().nonzero().T, copy.nonzero().T])  # [3, N]
        flat, rows, columns = to_device(found, mask.device)
        places = Places(flat, rows, columns, copy.sum(dim=1).tolist())
        _places.keep(mask, places)
    return places
