"""One optimizer step from several micro-batches and processes, the same on every strategy.

The loss of a step is a sum over tokens divided by the number of tokens on all ranks, so no strategy may average
anything on top: DDP, DeepSpeed and FSDP2 average over ranks, hence each loss is multiplied by the number of ranks;
DeepSpeed would also divide by the number of micro-batches, which is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.training.deepspeed import DeepSpeedStrategy
from rlhf_lightning.training.fsdp2 import FSDP2Strategy
from rlhf_lightning.training.gradients import clip_gradients, gradient_norm
from rlhf_lightning.training.optim import clip_value
from rlhf_lightning.training.supported import refuse_unsupported

PieceT = TypeVar("PieceT")


def world_size(module: pl.LightningModule) -> int:
    """Number of processes that train this module together."""
    return module.trainer.world_size


def is_single_device(trainer: pl.Trainer) -> bool:
    """Whether one process holds all weights and gradients, and may save them without asking others.

    Args:
        trainer: of any strategy.
    """
    return isinstance(trainer.strategy, SingleDeviceStrategy)


def sum_over_ranks(module: pl.LightningModule, tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; every process must call it with the same shape.

    Args:
        module: a module attached to a running trainer.
        tensor: any shape; on one process it is returned as it is.

    Returns:
        The sum, same shape and type, no gradient, the same on every process.
    """
    if module.trainer.world_size == 1:
        return tensor
    return module.all_gather(tensor).sum(dim=0, dtype=tensor.dtype)  # type: ignore[union-attr]


def equally_many(module: pl.LightningModule, cut: Callable[[int], list[PieceT]]) -> list[PieceT]:
    """Cut a batch into as many pieces on this process as on every other; each must go through the model as often.

    Args:
        module: attached to a trainer; every process must call this.
        cut: gives the pieces of this process, at least as many as it is asked for.

    Example:
        In a `training_step`::

            pieces = equally_many(self, lambda n: micro_batches(batch, max_tokens=4096, min_pieces=n))
    """
    pieces = cut(1)
    if module.trainer.world_size == 1:
        return pieces
    most = module.all_gather(torch.tensor(len(pieces), device=module.device)).max()  # type: ignore[union-attr]
    return pieces if len(pieces) == int(most) else cut(int(most))


class GradientAccumulation:
    """One optimizer step made of several micro-batches, the same on every strategy.

    The weights move as if the sum of all losses, over micro-batches and ranks, had been differentiated at once: divide
    each loss by the number of tokens of the whole step on all ranks (see `sum_over_ranks`) and pass it in. Make a new
    object for every optimizer step.

    Example:
        A `training_step` in manual optimisation::

            num_tokens = sum_over_ranks(self, batch.loss_mask.sum())
            pieces = micro_batches(batch, self.micro_batch_size)
            accumulation = GradientAccumulation(self, len(pieces))
            for micro_batch in pieces:
                accumulation.backward(self.loss_sum(micro_batch) / num_tokens)
            grad_norm = accumulation.step(context=f"rows {batch.row_ids.tolist()}")

    Args:
        module: the LightningModule inside whose `training_step` this runs; it has one optimizer, and its attribute
            `gradient_clip_val` (a number, or None for no clipping) bounds the norm of the whole gradient.
        num_micro_batches: how often `backward` will be called before `step`; the same on every rank.
        parts: parts of the module whose gradients are also measured each by itself.
        resting: names of those that this step leaves alone: their gradients are thrown away, their weights and the
            optimizer's state of them stay as they are.
        clip_vals: by the name of a part the norm that its gradient is clipped to by itself, None for no clipping; empty
            to clip all together.

    Attributes:
        part_norms: after `step`, the norm of each part's gradient before clipping, scalars, the same on every rank;
            empty where the strategy keeps gradients in pieces or to itself (ZeRO, and DeepSpeed in bfloat16).

    Raises:
        UserError: on a strategy or precision that is not supported.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        num_micro_batches: int,
        parts: Mapping[str, nn.Module] | None = None,
        resting: Iterable[str] = (),
        clip_vals: Mapping[str, float | None] = MappingProxyType({}),
    ) -> None:
        refuse_unsupported(module.trainer)
        self._module = module
        self._world_size = module.trainer.world_size
        self._left = num_micro_batches
        self._parts = parts or {}
        self._clip_vals = clip_vals
        self.part_norms: dict[str, Tensor] = {}
        self._loss = torch.zeros((), device=module.device)
        self._backend = _backend(module)
        self._backend.resting = [p for name in resting for p in self._parts[name].parameters() if p.requires_grad]

    @property
    def loss(self) -> Tensor:
        """Sum of the losses passed in so far on this rank, after `step` on all ranks; scalar, detached."""
        return self._loss

    def backward(self, losses: Tensor | Iterable[Tensor]) -> None:
        """Add one micro-batch's gradient.

        Args:
            losses: scalar, already divided by the number of tokens of the whole step on all ranks; or several whose sum
                is the loss. Given as a generator, each is differentiated before the next is asked for, so that one
                graph is alive at a time, unless the strategy needs them all at once.
        """
        if self._left == 0:
            raise RuntimeError("backward() was called more often than num_micro_batches.")
        self._left -= 1
        is_last = self._left == 0
        parts = iter([losses]) if isinstance(losses, Tensor) else iter(losses)
        for loss in parts if self._backend.takes_parts(is_last) else [_total(parts)]:
            self._loss = self._loss + loss.detach().float()
            # Strategies average gradients over ranks; the losses are to be summed.
            self._backend.backward(loss * self._world_size, is_last)

    def step(self, context: str = "") -> Tensor:
        """Clip the gradient, move the weights once, clear the gradient, move the learning-rate schedule once.

        `trainer.global_step` grows by one. Called on every rank.

        Args:
            context: names this rank's examples, such as `rows 3, 7, 9`; goes into the error message.

        Returns:
            Euclidean norm of the whole gradient before clipping, scalar float32 (float64 for
            float64 gradients), the same on every rank.

        Raises:
            NonFiniteError: on every rank, with the weights untouched, if the loss of any rank or the gradient is NaN
                or infinite.
        """
        if self._left > 0:
            raise RuntimeError(f"step() was called with {self._left} micro-batches still to come.")
        module, steps_before = self._module, self._module.trainer.global_step
        losses = module.all_gather(self.loss).reshape(-1)  # type: ignore[union-attr]  # [world_size]
        norm = self._backend.norm_before_step()
        if norm is not None:
            self.part_norms = {
                name: gradient_norm(part.parameters(), module.device) for name, part in self._parts.items()
            }
        _refuse_non_finite(module, losses, norm, context)
        self._loss = losses.sum()
        norm = self._backend.clip_and_step(norm, self._parts_to_clip())
        if norm is None:
            # DeepSpeed looked at the gradient itself and left the weights alone.
            raise NonFiniteError(_non_finite_message("the gradient is not finite", steps_before, context))
        for config in module.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]
        return norm

    def _parts_to_clip(self) -> list[_Clipped] | None:
        """The parts that are clipped each by itself; None where all are clipped together."""
        if not self._clip_vals:
            return None
        chosen = {name: value for name, value in self._clip_vals.items() if value}  # 0 means no clipping
        return [
            _Clipped([*self._parts[name].parameters()], clip, self.part_norms[name]) for name, clip in chosen.items()
        ]


def forget_gradient(module: pl.LightningModule) -> None:
    """Clear the gradient of a step that is not made.

    Args:
        module: attached to a trainer that `check_skipping` has seen.
    """
    _only_optimizer(module).zero_grad()


def _total(losses: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


class _Clipped(NamedTuple):
    """Weights whose gradient is clipped by itself, to what, and its norm."""

    parameters: list[nn.Parameter]
    clip: float
    norm: Tensor


class _Backend(Protocol):
    resting: list[nn.Parameter]

    def takes_parts(self, is_last: bool) -> bool:
        """Whether several backward passes, each of a part of the weights, may make up a micro-batch's gradient."""

    def backward(self, loss: Tensor, is_last: bool) -> None: ...

    def norm_before_step(self) -> Tensor | None:
        """Gradient norm where the strategy lets it be known before the step, otherwise None."""

    def clip_and_step(self, norm: Tensor | None, apart: list[_Clipped] | None) -> Tensor | None:
        """Step and clear the gradient; the norm before clipping, or None if a bad gradient stopped the step."""


def _backend(module: pl.LightningModule) -> _Backend:
    strategy = module.trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        return _DeepSpeedBackend(module)
    return _FSDP2Backend(module, strategy) if isinstance(strategy, FSDP2Strategy) else _TorchBackend(module)


class _TorchBackend:
    """Single device and DDP: gradients lie whole in `.grad`; DDP averages them during the last backward only."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.optimizer = _only_optimizer(module)
        self.resting: list[nn.Parameter] = []

    def takes_parts(self, is_last: bool) -> bool:
        # DDP averages nothing until the last backward pass has reached every weight.
        return not (is_last and isinstance(self.module.trainer.strategy, DDPStrategy))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        strategy = self.module.trainer.strategy
        if isinstance(strategy, DDPStrategy) and is_last:
            loss = loss + sum(0 * p.flatten()[0] for p in self.resting)  # it waits for a gradient of every weight
        with nullcontext() if is_last or not isinstance(strategy, DDPStrategy) else strategy.block_backward_sync():
            self.module.manual_backward(loss)

    def norm_before_step(self) -> Tensor:
        for weight in self.resting:
            weight.grad = None  # which optimizers pass over
        return gradient_norm(self._parameters(), self.module.device)

    def clip_and_step(self, norm: Tensor | None, apart: list[_Clipped] | None) -> Tensor | None:
        clip = clip_value(self.module)
        if apart is not None:
            for part in apart:
                clip_gradients(*part)
        elif clip is not None and norm is not None:
            clip_gradients(self._parameters(), clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class _FSDP2Backend(_TorchBackend):
    """FSDP2: each process has its part of every gradient in `.grad`, the sum over micro-batches so far.

    A part is averaged over the processes after each micro-batch, or, where the whole gradients fit in memory until
    then, after the last.
    """

    def __init__(self, module: pl.LightningModule, strategy: FSDP2Strategy) -> None:
        super().__init__(module)
        self.strategy = strategy

    def takes_parts(self, is_last: bool) -> bool:
        return True  # each group of weights is averaged by itself

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.strategy.sync_gradients(is_last)
        self.module.manual_backward(loss)

    def norm_before_step(self) -> Tensor:
        self.strategy.finish_backward()
        return super().norm_before_step()


class _DeepSpeedBackend:
    """DeepSpeed: the engine owns the gradients, and must be told which micro-batch is the last of the step."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.optimizer = _only_optimizer(module)
        self.engine = module.trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
        self.resting: list[nn.Parameter] = []

    def takes_parts(self, is_last: bool) -> bool:
        return False  # ZeRO counts on every backward pass reaching every weight

    def backward(self, loss: Tensor, is_last: bool) -> None:
        # The engine counts micro-batches by its own step() and forward(), which run once per training_step here; left
        # alone, every backward would replace the gradient before it (the flag: on ZeRO-3, the boundary: everywhere).
        if self.engine.zero_optimization():
            self.engine.optimizer.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.module.manual_backward(loss, scale_wrt_gas=False)

    def norm_before_step(self) -> Tensor | None:
        whole = not self.engine.zero_optimization() and not self.engine.bfloat16_enabled()
        return gradient_norm(self.engine.module.parameters(), self.module.device) if whole else None

    def clip_and_step(self, norm: Tensor | None, apart: list[_Clipped] | None) -> Tensor | None:
        self.optimizer.step()  # the engine clips, steps and clears
        if not self.engine.was_step_applied():
            return None
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.module.device)
        return norm


def _only_optimizer(module: pl.LightningModule) -> Any:
    optimizer = module.optimizers()
    if isinstance(optimizer, list):
        raise UserError(f"{type(module).__name__} has {len(optimizer)} optimizers: use one with parameter groups.")
    return optimizer


def _refuse_non_finite(module: pl.LightningModule, losses: Tensor, norm: Tensor | None, context: str) -> None:
    """Raise on every rank alike; waits for the device once."""
    numbers = losses if norm is None else torch.cat([losses, norm.reshape(1)])
    if bool(torch.isfinite(numbers).all()):
        return
    step = module.trainer.global_step
    bad = {rank: loss for rank, loss in enumerate(losses.tolist()) if not math.isfinite(loss)}
    if not bad:
        raise NonFiniteError(_non_finite_message("the gradient is not finite", step, context))
    what = f"the loss is {next(iter(bad.values()))}"
    if module.trainer.world_size > 1:
        what += f" on rank {', '.join(map(str, bad))}"
    raise NonFiniteError(_non_finite_message(what, step, context if module.global_rank in bad else ""))


def _non_finite_message(what: str, step: int, context: str) -> str:
    where = f"after {step} optimizer steps" + (f", in {context}" if context else "")
    return (
        f"{what} {where}; the weights were not changed: look at these examples, or lower the learning rate and "
        "resume from the last checkpoint."
    )
