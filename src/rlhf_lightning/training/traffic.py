"""What processes send one another: collectives counted where torch starts them, whichever strategy asks for them.

Volumes are counted as in the ZeRO paper (Rajbhandari et al. 2020, section 7): gathering or scattering N bytes sends N
over each link, reducing them for all sends 2 N. A step of one micro-batch then sends twice the gradient's size with
DDP, and three times with ZeRO-3 and FSDP, which gather the weights for the forward and the backward pass. By the paper
ZeRO-1 and ZeRO-2 send twice; DeepSpeed's (0.19.8) send three times, as they reduce the whole gradient for all.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NAMESPACES = ("c10d", "_c10d_functional")
_KINDS = (
    *("all_reduce", "allreduce", "reduce_scatter", "all_gather", "allgather", "alltoall", "all_to_all"),
    *("broadcast", "reduce", "gather", "scatter", "send"),
)
_SPELLED = {"allreduce": "all_reduce", "allgather": "all_gather", "alltoall": "all_to_all"}


class Traffic(TorchDispatchMode):
    """Counts what is sent for the length of a `with` block. It slows torch down: count a step, not a run.

    Attributes:
        calls: collectives started by this process, by kind.
        bytes: size of what they reduced, gathered or scattered, all parts together, by kind.

    Example:
        Around one batch, in a callback::

            with Traffic() as traffic:
                step()
            print(traffic.volume / (4 * number_of_weights))  # 2 or 3 in float32
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @property
    def volume(self) -> int:
        """Bytes sent over a process's link, in the paper's units."""
        return self.bytes.total() + self.bytes["all_reduce"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective and go on.

        Args:
            func: the operation.
            types: of its tensors.
            args: its arguments.
            kwargs: its named arguments.
        """
        if func.namespace in _NAMESPACES:
            self._count(func._schema.name.partition("::")[2].lstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        kind = next((each for each in _KINDS if name.startswith(each)), None)
        if kind is None:  # barriers, and waiting
            return
        size = max(map(_size, args), default=0)
        if name.startswith("all_gather_into"):  # told its own part and the number of them
            size *= next(each for each in args if isinstance(each, int))
        kind = _SPELLED.get(kind, kind)
        self.calls[kind] += 1
        self.bytes[kind] += size


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
