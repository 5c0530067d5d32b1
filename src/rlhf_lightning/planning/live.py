"""How many bytes of tensors are alive while PyTorch computes, and how many there were at the worst moment.

Counted is what every operation returns, for as long as anybody refers to its memory: autograd, a module, an optimizer.
What an operation takes for itself while it runs, and what an allocator keeps in reserve, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moment(NamedTuple):
    """Bytes that are alive.

    Attributes:
        working: what a computation made, and what autograd keeps of it.
        logits: the part of it that is as wide as the vocabulary.
        gradients: of weights.
    """

    working: float = 0
    logits: float = 0
    gradients: float = 0

    @property
    def made(self) -> float:
        """All but the gradients."""
        return self.working + self.logits


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors while it is entered; also of those that `FakeTensorMode` makes, which have none.

    Args:
        vocabulary: a tensor of several dimensions, one of which is this, counts as logits.

    Attributes:
        now: alive at present.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.now = self._most_made = self._most = Moment()
        self._known: dict[int, tuple[Any, int, str]] = {}
        self._hooks: list[Any] = []
        self._first_block: set[int] = set()
        self._early: list[Moment] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it returns."""
        self._look()  # what is a gradient is known only after the operation that made it
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                wide = leaf.dim() > 1 and self.vocabulary in leaf.shape
                self._see(leaf, "logits" if wide else "working")
        return result

    def begin(self) -> None:
        """Forget the worst moments: what follows has its own."""
        self._early = []
        self._restart()

    def worst(self) -> list[Moment]:
        """The moments since `begin` of which one was the worst, whatever a gradient weighs.

        With most alive that is no gradient, and with most alive; of a backward pass first until it has reached the
        weights of the first block, then after that. So each of them grows evenly with the number of blocks.
        """
        self._look()
        return [*self._early, self._most_made, self._most]

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, which were there before.

        Args:
            tensors: weights, buffers, optimizer state.
        """
        for tensor in tensors:
            self._see(tensor, "")

    def watch(self, weights: Iterable[nn.Parameter], first_block: Iterable[nn.Parameter] = ()) -> None:
        """Know the gradients of these weights as such.

        Args:
            weights: those that are trained.
            first_block: those of the first block of each model.
        """
        self._first_block |= {id(weight) for weight in first_block}
        for weight in weights:
            self._hooks.append(weight.register_hook(_Arrival(self, weight)))
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._accumulated))

    def forget_weights(self) -> None:
        """Remove the hooks of `watch`."""
        for hook in self._hooks:
            hook.remove()

    def arrives(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """A backward pass has come to a weight.

        Args:
            weight: which one.
            gradient: about to be accumulated.
        """
        if weight.grad is None:
            self._relabel(gradient)
        if id(weight) in self._first_block and not self._early:
            self._early = self.worst()
            self._restart()

    def _accumulated(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self._relabel(weight.grad)

    def _relabel(self, gradient: Tensor) -> None:
        key = id(gradient.untyped_storage())
        reference, size, label = self._known.get(key, (None, 0, ""))
        if label in ("working", "logits"):
            self._known[key] = reference, size, "gradients"
            self._add(label, -size)
            self._add("gradients", size)

    def _see(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), size, label
            self._add(label, size)

    def _gone(self, key: int) -> None:
        _, size, label = self._known.pop(key)
        self._look()
        self._add(label, -size)

    def _add(self, label: str, size: int) -> None:
        if label:
            self.now = self.now._replace(**{label: getattr(self.now, label) + size})

    def _restart(self) -> None:
        self._most_made = self._most = self.now

    def _look(self) -> None:
        if self.now.made > self._most_made.made:
            self._most_made = self.now
        if sum(self.now) > sum(self._most):
            self._most = self.now


class _Arrival:
    """A weight's hook."""

    def __init__(self, live: LiveBytes, weight: nn.Parameter) -> None:
        self.live, self.weight = live, weight

    def __call__(self, gradient: Tensor) -> None:
        self.live.arrives(self.weight, gradient)


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Weights and buffers of modules."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, those that share memory once.

    Args:
        tensors: any.
    """
    stored = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in stored.values())
