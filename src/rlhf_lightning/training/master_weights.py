"""Training weights that are held in bfloat16: an optimizer that steps float32 copies of them.

A bfloat16 number has 8 significant bits: what is added to it is lost unless it is at least about 1/500 of it. An AdamW
step moves each weight by about the learning rate, 1e-6 where weights are about 0.02, so bfloat16 weights would hardly
learn at all. The copies ("master weights") take every step in float32, and the model gets them rounded.

DeepSpeed keeps such copies itself. Left out: stochastic rounding, which needs no copies but an optimizer written for
it, one weight at a time, and random numbers that a resumed run must repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

_KEY = "master_weights"


def with_master_weights(optimizer: Optimizer, trainer: pl.Trainer) -> Optimizer:
    """The optimizer to train with: the given one, on float32 copies where it would train weights of lower precision.

    Args:
        optimizer: built on the model's parameters, no step made yet.
        trainer: tells whether its strategy keeps such copies itself.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return optimizer
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    return MasterWeights(optimizer) if any(map(_is_low_precision, trained)) else optimizer


class MasterWeights(Optimizer):
    """Steps float32 copies of low-precision weights with any optimizer, then writes them back rounded.

    Its parameter groups hold the model's parameters, for gradient clipping, `zero_grad` and learning-rate schedules;
    those of the inner optimizer hold the copies, and so its state is float32. Parameters that are float32 already have
    no copy. `state_dict` holds the copies, hence a resumed run goes on bit for bit; a state dict without copies, of a
    run with float32 weights, leaves them as made from the model's weights.

    Args:
        optimizer: built on the model's parameters, no step made yet; it is changed in place and must not be used by
            itself any more.

    Example:
        >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = MasterWeights(torch.optim.SGD([weight], lr=1.0))
        >>> for _ in range(1000):
        ...     weight.grad = torch.full_like(weight, 1e-3)
        ...     optimizer.step()
        >>> abs(weight.item()) < 1e-3
        True
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.inner = optimizer
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        super().__init__(groups, optimizer.defaults)  # calls add_param_group for each
        for weight, master in self._pairs:
            if weight in optimizer.state:  # some optimizers make their state at once
                optimizer.state[master] = {name: _widened(x) for name, x in optimizer.state.pop(weight).items()}
        self.state = optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters.

        Args:
            param_group: as for any optimizer.
        """
        super().add_param_group(param_group)
        masters = [self._master(weight) for weight in self.param_groups[-1]["params"]]
        self.inner.add_param_group({**self.param_groups[-1], "params": masters})

    def _master(self, weight: nn.Parameter) -> nn.Parameter:
        if not _is_low_precision(weight):
            return weight
        self._pairs.append((weight, nn.Parameter(weight.detach().float())))
        return self._pairs[-1][1]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer on the copies; the gradients of weights with a copy are freed.

        Args:
            closure: called first; it may compute the gradients.

        Returns:
            What the closure returned.
        """
        result = None if closure is None else closure()
        for weight, master in self._pairs:
            if weight.grad is not None:
                # One by one, and the short gradient goes at once: never two whole sets in memory.
                master.grad, weight.grad = weight.grad.float(), None
        _copy_options(self.param_groups, self.inner.param_groups)
        self.inner.step()
        _copy_options(self.inner.param_groups, self.param_groups)
        for _, master in self._pairs:
            master.grad = None
        self._write_back()
        return result

    @torch.no_grad()
    def _write_back(self) -> None:
        for weight, master in self._pairs:
            weight.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, and the copies under `master_weights`."""
        _copy_options(self.param_groups, self.inner.param_groups)
        return {**self.inner.state_dict(), _KEY: [master.detach() for _, master in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state, options and copies; the weights become the rounded copies.

        Args:
            state_dict: from `state_dict`, or from the inner optimizer's class on float32 weights.
        """
        self.inner.load_state_dict({name: value for name, value in state_dict.items() if name != _KEY})
        self.state = self.inner.state
        _copy_options(self.inner.param_groups, self.param_groups)
        if _KEY in state_dict:
            for (_, master), saved in zip(self._pairs, state_dict[_KEY], strict=True):
                master.copy_(saved)
            self._write_back()


def _is_low_precision(weight: Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and _is_low_precision(value) else value


def _copy_options(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    """Learning rates and whatever else groups hold besides parameters: schedules write them, and some optimizers."""
    for given, group in zip(source, target, strict=True):
        group.update((name, value) for name, value in given.items() if name != "params")
