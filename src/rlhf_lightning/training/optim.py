"""Parameter groups, gradient clipping and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import UserError
from rlhf_lightning.training.sharded import full_shape

Schedule = Literal["cosine", "linear", "constant"]
_OURS = ("params", "lr", "initial_lr")
_FUSES = ("cpu", "cuda")

# Defaults of the modules, written as in a config: unlike a lambda they can be saved, read again and pickled.
ADAMW: Any = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}}
PPO_ADAMW: Any = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-6, "eps": 1e-5, "weight_decay": 0.0}}


def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Split trainable parameters so that weight decay reaches matrices only, not biases and norms.

    Args:
        model: its parameters with `requires_grad` are taken, each once.
        **options: set on both groups, for instance `lr`.

    Returns:
        Groups for a torch optimizer; the first, matrices, keeps the optimizer's own weight decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    dims = [len(full_shape(p)) for p in parameters]
    matrices = [p for p, d in zip(parameters, dims, strict=True) if d >= 2]
    vectors = [p for p, d in zip(parameters, dims, strict=True) if d < 2]
    groups = [{"params": matrices, **options}, {"params": vectors, "weight_decay": 0.0, **options}]
    return [group for group in groups if group["params"]]


def make_optimizer(make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer, or one line on what it refuses, such as a learning rate below 0.

    Args:
        make: takes the groups.
        groups: of parameters.

    Raises:
        UserError: it refuses what it was given.
    """
    try:
        return make(groups)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: {' '.join(str(error).split())}") from error


def fuse(optimizer: Optimizer, trainer: pl.Trainer) -> Optimizer:
    """Let torch's Adam and AdamW move all of a weight in one kernel, where the weights lie and nothing else is chosen.

    The same step to rounding, in a fifth of the time on a CPU; on a GPU without copies of all weights meanwhile.

    Args:
        optimizer: no step made yet.
        trainer: its strategy may need another way.

    Returns:
        The same optimizer.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    plain = all(not isinstance(w, DTensor) and w.is_floating_point() and w.device.type in _FUSES for w in weights)
    if plain and can_fuse(optimizer) and not isinstance(trainer.strategy, DeepSpeedStrategy):
        for options in (optimizer.defaults, *optimizer.param_groups):
            options["fused"] = True
        # A checkpoint that was written without it holds the count of steps on the CPU.
        optimizer.register_load_state_dict_pre_hook(_as_fused)
    return optimizer


def can_fuse(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a fused step, and was told nothing of the way that it steps.

    Args:
        optimizer: of any kind.
    """
    groups = optimizer.param_groups
    told = any(group.get(way) is not None for group in groups for way in ("fused", "foreach"))
    other = any(group.get(way) for group in groups for way in ("capturable", "differentiable"))
    return type(optimizer) in (Adam, AdamW) and not told and not other


def _as_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def clip_value(module: pl.LightningModule | None) -> float | None:
    """The norm that a module wants its gradient clipped to; None for no clipping."""
    return getattr(module, "gradient_clip_val", None) or None  # 0 means no clipping, as in Lightning


def learning_rate_factor(
    step: int, kind: Schedule, warmup_steps: int, total_steps: float, min_factor: float = 0.0
) -> float:
    """Factor on the learning rate of optimizer step number `step`, counted from 0.

    Linear warm-up reaches 1 at the last of the `warmup_steps` and is never 0, so the first step learns; then the
    factor falls from 1 to `min_factor` (`cosine`, `linear`) or stays (`constant`).

    Example:
        >>> [round(learning_rate_factor(s, "linear", 2, 6), 2) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    if kind not in ("cosine", "linear"):
        raise ValueError(f"kind {kind!r} is none of cosine, linear and constant")
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return min_factor + (1 - min_factor) * fall


class StepSchedule(LambdaLR):
    """A schedule of which a checkpoint holds only the step: a resumed run has the learning rates of its own settings.

    Lightning restores the optimizer, and with it the rates and the other options of the run that was saved, before it
    restores the schedule. Options such as betas and weight decay become those of the settings, too, if these differ
    from the settings that were saved; some optimizers keep state of their own among the options.

    Args:
        optimizer: made with the settings, no step made yet.
        factor: gives what all rates are multiplied by at a step.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.options = [_plain_options(group) for group in optimizer.param_groups]
        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step that was saved.

        Args:
            state_dict: from `state_dict`.
        """
        before = state_dict.get("options", self.options)
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs, "options": self.options})
        for group, saved, options in zip(self.optimizer.param_groups, before, self.options, strict=True):
            group.update((name, value) for name, value in options.items() if saved.get(name) != value)
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [*learning_rates(self.optimizer)]

    def scale(self, factor: float) -> None:
        """Multiply the learning rates of now and of all steps to come; a checkpoint does not remember it.

        Args:
            factor: what they are multiplied by.
        """
        self.base_lrs = [base * factor for base in self.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        self._last_lr = [*learning_rates(self.optimizer)]


def _plain_options(group: dict[str, Any]) -> dict[str, Any]:
    plain = bool, int, float, str, tuple, list, type(None)
    return {name: value for name, value in group.items() if name not in _OURS and isinstance(value, plain)}


def schedule_learning_rate(
    optimizer: Optimizer, kind: Schedule, warmup_steps: int | float, total_steps: float, min_factor: float = 0.0
) -> StepSchedule:
    """Scheduler to be stepped once per optimizer step.

    Args:
        optimizer: its groups keep their ratio to one another.
        kind: `cosine`, `linear` or `constant` after the warm-up.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        total_steps: optimizer steps of the whole run; infinite only for `constant`.
        min_factor: where `cosine` and `linear` end, as a share of the peak.

    Raises:
        UserError: the run has no end to decay towards.
    """
    if not math.isfinite(total_steps) and (kind != "constant" or 0 < warmup_steps < 1):
        raise UserError(f"lr_schedule '{kind}' needs a run with an end; set trainer.max_epochs or trainer.max_steps")
    if 0 < warmup_steps < 1:
        warmup_steps = math.ceil(warmup_steps * total_steps)
    warmup = int(warmup_steps)
    return StepSchedule(optimizer, lambda step: learning_rate_factor(step, kind, warmup, total_steps, min_factor))


def learning_rates(optimizer: Any) -> list[float]:
    """Learning rate of each parameter group.

    Args:
        optimizer: a torch optimizer, or a strategy's own that has `param_groups` too (DeepSpeed's is no subclass).
    """
    return [group["lr"] for group in optimizer.param_groups]
