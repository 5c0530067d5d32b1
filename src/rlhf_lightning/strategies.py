"""The one file that knows how Lightning's strategies differ, so that the modules need not.

Every stage uses manual optimisation: `training_step` splits its batch into micro-batches, and `GradientAccumulation`
turns them into one optimizer step whose gradient is that of the *sum* of all losses passed in, over all micro-batches
and ranks. The modules divide by the number of tokens of all ranks, so no strategy may average anything on top: DDP and
DeepSpeed average over ranks, hence each loss is multiplied by the number of ranks; DeepSpeed would also divide by the
number of micro-batches, which is switched off.

Left out: FSDP, and float16 (its loss scaler skips steps, which cannot be told from a loss gone wrong; use bfloat16).
"""

import argparse
import logging
import math
from contextlib import nullcontext
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from rlhf_lightning.errors import NonFiniteError, UserError


class DeepSpeedStrategy(LightningDeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made right for manual optimisation and for Hugging Face models.

    Differences to `pytorch_lightning.strategies.DeepSpeedStrategy`:

    * it also runs on CPU (over gloo), every ZeRO stage, on as many processes as `devices` says;
    * gradients are clipped to the module's attribute `gradient_clip_val`, because DeepSpeed clips by its own
      configuration only;
    * `from_pretrained` inside `configure_model` works under ZeRO-3: each process keeps only its part of the weights;
    * frozen weights are left out of checkpoints, so the module needs `strict_loading = False` to resume.

    Any `torch.optim` optimizer is accepted, also with offload, where DeepSpeed's own `DeepSpeedCPUAdam` is faster. To
    train on the CPU of a machine that has a GPU, set the environment variable `DS_ACCELERATOR=cpu`.

    Args:
        stage: what is split over the processes: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.
        offload_optimizer: keep the optimizer's state in CPU memory.
        offload_parameters: keep the weights in CPU memory; stage 3 only.
        exclude_frozen_parameters: leave frozen weights out of checkpoints.
        logging_level: what DeepSpeed itself may log, as in `logging`; its warnings are about choices made here.
        **kwargs: everything else `pytorch_lightning.strategies.DeepSpeedStrategy` takes.

    Raises:
        UserError: when the run starts, if `config` clips gradients to another value than the module.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        exclude_frozen_parameters: bool = True,
        logging_level: int = logging.ERROR,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            exclude_frozen_parameters=exclude_frozen_parameters,
            logging_level=logging_level,
            **kwargs,
        )
        self._hf_config: Any = None

    def setup_environment(self) -> None:
        """Start the process group; unlike the parent, on any accelerator."""
        super(LightningDeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group; the parent also checks CUDA device numbers, which CPUs lack."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def teardown(self) -> None:
        """Let go of the configuration that makes `from_pretrained` split weights, then tear down."""
        self._hf_config = None
        super().teardown()

    def _init_config_if_needed(self) -> None:
        super()._init_config_if_needed()
        if self.zero_stage_3 and self._hf_config is None:
            from transformers.integrations import HfDeepSpeedConfig

            # transformers keeps a weak reference: from_pretrained splits weights only while this object lives.
            self._hf_config = HfDeepSpeedConfig(self.config)

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        # Only DeepSpeed's throughput log reads it; the parent would ask the loader's batch sampler, which may lack it.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        # With offload DeepSpeed insists on its own CPU optimizers, which need a compiler; let any optimizer through.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        clip = _clip_value(self.lightning_module)
        if clip is not None:
            configured = self.config.setdefault("gradient_clipping", clip)
            if configured != clip:
                raise UserError(
                    f"gradient_clipping is {configured} in the DeepSpeed config but gradient_clip_val is {clip} "
                    "in the module: remove gradient_clipping from the DeepSpeed config."
                )
        super()._format_config()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return self._deepspeed_initialize(
            config=self.config, model=model, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler
        )

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        from pytorch_lightning.strategies.deepspeed import remove_module_hooks

        assert isinstance(self.config, dict)
        kept = ["bf16", "fp16", *(["zero_allow_untested_optimizer", "zero_optimization"] if self.zero_stage_3 else [])]
        config = {key: self.config[key] for key in kept if key in self.config}
        remove_module_hooks(model)  # those of an earlier engine
        self.model, _ = self._deepspeed_initialize(config={"train_micro_batch_size_per_gpu": 1, **config}, model=model)

    def _deepspeed_initialize(self, **kwargs: Any) -> tuple[Any, Any]:
        import deepspeed

        device_index = self.root_device.index  # CPUs have none
        arguments = argparse.Namespace(device_rank=self.local_rank if device_index is None else device_index)
        engine, optimizer, _, _ = deepspeed.initialize(args=arguments, dist_init_required=False, **kwargs)
        return engine, optimizer


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

    Raises:
        UserError: on a strategy or precision that is not supported.
    """

    def __init__(self, module: pl.LightningModule, num_micro_batches: int) -> None:
        _refuse_unsupported(module.trainer)
        self._module = module
        self._left = num_micro_batches
        self._loss = torch.zeros((), device=module.device)
        on_deepspeed = isinstance(module.trainer.strategy, DeepSpeedStrategy)
        self._backend: _Backend = _DeepSpeedBackend(module) if on_deepspeed else _TorchBackend(module)

    @property
    def loss(self) -> Tensor:
        """Sum of the losses passed in so far on this rank, after `step` on all ranks; scalar, detached."""
        return self._loss

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient.

        Args:
            loss: scalar, already divided by the number of tokens of the whole step on all ranks.
        """
        if self._left == 0:
            raise RuntimeError("backward() was called more often than num_micro_batches.")
        self._left -= 1
        self._loss = self._loss + loss.detach().float()
        # Strategies average gradients over ranks; the losses are to be summed.
        self._backend.backward(loss * world_size(self._module), is_last=self._left == 0)

    def step(self, context: str = "") -> Tensor:
        """Clip the gradient, move the weights once, clear the gradient, move the learning-rate schedule once.

        `trainer.global_step` grows by one. Called on every rank.

        Args:
            context: names this rank's examples, such as `rows 3, 7, 9`; goes into the error message.

        Returns:
            Euclidean norm of the whole gradient before clipping, scalar float32, the same on every rank.

        Raises:
            NonFiniteError: on every rank, with the weights untouched, if the loss of any rank or the gradient is NaN
                or infinite.
        """
        if self._left > 0:
            raise RuntimeError(f"step() was called with {self._left} micro-batches still to come.")
        module, steps_before = self._module, self._module.trainer.global_step
        losses = module.all_gather(self.loss).reshape(-1)  # type: ignore[union-attr]  # [world_size]
        norm = self._backend.norm_before_step()
        _refuse_non_finite(module, losses, norm, context)
        self._loss = losses.sum()
        norm = self._backend.clip_and_step(norm)
        if norm is None:
            # DeepSpeed looked at the gradient itself and left the weights alone.
            raise NonFiniteError(_non_finite_message("the gradient is not finite", steps_before, context))
        for config in module.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]
        return norm


class _Backend(Protocol):
    def backward(self, loss: Tensor, is_last: bool) -> None: ...

    def norm_before_step(self) -> Tensor | None:
        """Gradient norm where the strategy lets it be known before the step, otherwise None."""

    def clip_and_step(self, norm: Tensor | None) -> Tensor | None:
        """Step and clear the gradient; the norm before clipping, or None if a bad gradient stopped the step."""


class _TorchBackend:
    """Single device and DDP: gradients lie whole in `.grad`; DDP averages them during the last backward only."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.optimizer = _only_optimizer(module)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        strategy = self.module.trainer.strategy
        with nullcontext() if is_last or not isinstance(strategy, DDPStrategy) else strategy.block_backward_sync():
            self.module.manual_backward(loss)

    def norm_before_step(self) -> Tensor:
        return _norm(self._parameters())

    def clip_and_step(self, norm: Tensor | None) -> Tensor | None:
        clip = _clip_value(self.module)
        if clip is not None and norm is not None:
            clip_grads_with_norm_(self._parameters(), clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class _DeepSpeedBackend:
    """DeepSpeed: the engine owns the gradients, and must be told which micro-batch is the last of the step."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.optimizer = _only_optimizer(module)
        self.engine = module.trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]

    def backward(self, loss: Tensor, is_last: bool) -> None:
        # The engine counts micro-batches by its own step() and forward(), which run once per training_step here; left
        # alone, every backward would replace the gradient before it (the flag: on ZeRO-3, the boundary: everywhere).
        if self.engine.zero_optimization():
            self.engine.optimizer.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.module.manual_backward(loss, scale_wrt_gas=False)

    def norm_before_step(self) -> Tensor | None:
        whole = not self.engine.zero_optimization() and not self.engine.bfloat16_enabled()
        return _norm(self.engine.module.parameters()) if whole else None

    def clip_and_step(self, norm: Tensor | None) -> Tensor | None:
        self.optimizer.step()  # the engine clips, steps and clears
        if not self.engine.was_step_applied():
            return None
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.module.device)
        return norm


def world_size(module: pl.LightningModule) -> int:
    """Number of processes that train this module together."""
    return module.trainer.world_size


def sum_over_ranks(module: pl.LightningModule, tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; every process must call it with the same shape.

    Args:
        module: a module attached to a running trainer.
        tensor: any shape; on one process it is returned as it is.

    Returns:
        The sum, same shape and type, no gradient, the same on every process.
    """
    if world_size(module) == 1:
        return tensor
    return module.all_gather(tensor).sum(dim=0, dtype=tensor.dtype)  # type: ignore[union-attr]


def synced(module: pl.LightningModule) -> bool:
    """Whether all processes must run the same number of forward passes (ZeRO-3 gathers weights in each).

    Pass it to `generate(..., synced_gpus=synced(self))`, and never generate on one process only.
    """
    return _is_zero_3(module) and world_size(module) > 1


def consolidated_state_dict(module: pl.LightningModule, submodule: nn.Module) -> dict[str, Tensor] | None:
    """Copy all weights of a submodule to CPU memory of the first process. Every process must call it.

    Under ZeRO-3 one weight at a time is gathered, so that no GPU needs room for the whole model.

    Args:
        module: the module attached to the trainer; it tells which strategy runs.
        submodule: the part to copy, often `module.policy.model`.

    Returns:
        On the first process a copy of the whole state dict, tied weights still sharing memory; None on the others.
    """
    keep = module.trainer.is_global_zero
    copies: dict[int, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in submodule.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            with _gathered(module, tensor):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if keep else torch.empty(0)
        result[name] = copies[id(tensor)]
    return result if keep else None


def _gathered(module: pl.LightningModule, weight: Tensor) -> Any:
    if not _is_zero_3(module):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def _is_zero_3(module: pl.LightningModule) -> bool:
    strategy = module.trainer.strategy
    return isinstance(strategy, LightningDeepSpeedStrategy) and strategy.zero_stage_3


def _clip_value(module: pl.LightningModule | None) -> float | None:
    return getattr(module, "gradient_clip_val", None) or None  # 0 means no clipping, as in Lightning


def _norm(parameters: Any) -> Tensor:
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms))


def _only_optimizer(module: pl.LightningModule) -> Any:
    optimizer = module.optimizers()
    if isinstance(optimizer, list):
        raise UserError(f"{type(module).__name__} has {len(optimizer)} optimizers: use one with parameter groups.")
    return optimizer


def _refuse_unsupported(trainer: pl.Trainer) -> None:
    strategy, ours = trainer.strategy, "rlhf_lightning.DeepSpeedStrategy"
    if trainer.precision in ("16-mixed", "16-true"):
        raise UserError(f"precision {trainer.precision} is not supported: set trainer.precision to bf16-mixed.")
    if isinstance(strategy, LightningDeepSpeedStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        raise UserError(f"Lightning's DeepSpeed strategy loses gradients here: set trainer.strategy to {ours}.")
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        name = type(strategy).__name__
        raise UserError(f"strategy {name} is not supported: set trainer.strategy to auto, ddp or {ours}.")


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
    if world_size(module) > 1:
        what += f" on rank {', '.join(map(str, bad))}"
    raise NonFiniteError(_non_finite_message(what, step, context if module.global_rank in bad else ""))


def _non_finite_message(what: str, step: int, context: str) -> str:
    where = f"after {step} optimizer steps" + (f", in {context}" if context else "")
    return (
        f"{what} {where}; the weights were not changed: look at these examples, or lower the learning rate and "
        "resume from the last checkpoint."
    )
