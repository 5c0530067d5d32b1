"""PyTorch's FSDP2 as a strategy: weights, gradients and optimizer state split over the processes, by torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.collectives.torch_collective import default_pg_timeout
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import PARTIAL, remove
from rlhf_lightning.training.checkpoint_folders import check_together, finish_together
from rlhf_lightning.training.dcp_folders import load_states, read_states, stored_tensors, write_states
from rlhf_lightning.training.fsdp2_models import Sharding, roots, shard_models
from rlhf_lightning.training.host_memory import free_at_once
from rlhf_lightning.training.memory import has_room
from rlhf_lightning.training.sharded import to_be_sharded

ReduceGradients = Literal["auto", "each", "last"]

WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
_SETTINGS = {"strategy": "FSDP2"}
"""What must be the same to go on from a checkpoint; the number of processes need not."""


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2): each process holds its part of weights, gradients and optimizer state.

    Lightning's `ModelParallelStrategy`, told what to shard: each block, the backbone and the output layer of every
    transformers model of the module, frozen ones too, and what else is trained. The module needs no change.

    * It runs on GPUs (NCCL) and CPUs (gloo), on one process or several.
    * Gradients are summed in float32 in every precision. `bf16-mixed` keeps weights in float32 and gathers the blocks'
      in bfloat16; `bf16-true` holds them in bfloat16, beside float32 copies that the optimizer steps.
    * A checkpoint is a folder of PyTorch's distributed checkpoints (DCP), written beside its place and renamed when it
      is whole. Frozen weights are left out, so the module needs `strict_loading = False` to resume. Any number of
      processes can go on from it, and nothing in it is unpickled but tensors and plain values.

    Args:
        cpu_offload: keep weights, gradients and optimizer state in CPU memory; each layer visits the GPU when it is its
            turn. Saves the most GPU memory, and is slow.
        reshard_after_forward: let go of each layer's whole weights after its forward pass and gather them again for the
            backward pass; without it they stay, which saves a third of the communication.
        reduce_gradients: after `each` micro-batch, so that a process never holds more than its part of the gradient; or
            after the `last` one of a step, which communicates less but holds a whole gradient; `auto` for the last
            where every process has the memory.
        process_group_backend: as in `ModelParallelStrategy`.
        timeout: as in `ModelParallelStrategy`.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        reduce_gradients: ReduceGradients = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        check_arguments(FSDP2Strategy, locals())
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.reduce_gradients: ReduceGradients = reduce_gradients
        self._waits_for_last: bool | None = None
        self._source: Path | None = None

    # Sharding.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for the optimizers' states after it has restored the module, as for other strategies."""
        return True

    @property
    def gathers_bfloat16(self) -> bool:
        """Whether float32 weights of the blocks are gathered in bfloat16."""
        return self.precision_plugin.precision == "bf16-mixed"

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Load models whole, without copies, as they are sharded after that."""
        with to_be_sharded():
            yield

    def setup_environment(self) -> None:
        """Start the process group; all processes share the data."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        free_at_once(True)

    def teardown(self) -> None:
        """Tear down, and manage memory as before."""
        super().teardown()
        free_at_once(False)

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the models, then make the optimizer on what each process holds."""
        # What is gathered first in inference mode could never be trained.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Shard the models; each goes to the device part by part, and the rest as it is."""
        module, offload = self.lightning_module, self.cpu_offload
        assert module is not None
        low = torch.bfloat16 if self.gathers_bfloat16 else None
        pinned = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        sharding = Sharding(
            mesh=self.device_mesh["data_parallel"],
            device=self.root_device,
            blocks=MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False),
            others=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            offload=pinned if offload else OffloadPolicy(),
            reshard_after_forward=self.reshard_after_forward,
        )
        shard_models(module, sharding)
        for part in module.modules():
            if isinstance(part, Metric):
                part.to(self.root_device)
            _move_own_tensors(part, self.root_device)

    def sync_gradients(self, is_last: bool) -> None:
        """Say before a backward pass whether gradients are summed over the processes in it; all must call it.

        Args:
            is_last: whether it belongs to the last micro-batch of the step.
        """
        module = self._module()
        if self._waits_for_last is None and not is_last:
            size = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
            wanted = self.reduce_gradients
            self._waits_for_last = wanted == "last" or (wanted == "auto" and has_room(module, size))
        for part in _parts(module):
            part.set_requires_gradient_sync(is_last or not self._waits_for_last, recurse=False)

    def finish_backward(self) -> None:
        """After the last backward pass of a step, see that each process holds its part of every weight alone."""
        module = self._module()
        for part in _parts(module):
            part.reshard()
        for model in roots(module):
            if not any(p.requires_grad for p in model.parameters()):
                self.finish_forward(model)  # of each forward pass FSDP2 keeps a record, up to a backward pass

    def finish_forward(self, model: nn.Module) -> None:
        """After forward passes without a backward pass, forget in which order they were; also after one that raised.

        Args:
            model: no gradient of which is still to be summed.
        """
        for root in roots(model):
            if hasattr(root, "reset_iter_state"):  # since torch 2.13
                root.reset_iter_state()

    # Checkpoints.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that are trained, each process its parts, and buffers."""
        states = self._module().state_dict(keep_vars=True)
        return {name: x.detach() for name, x in states.items() if x.requires_grad or not isinstance(x, nn.Parameter)}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimizer itself tells, each process its parts.

        Args:
            optimizer: also as Lightning wraps it.
        """
        plain: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = plain.state_dict()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder in the place of the one that is there, which stays until then. Every process must call it."""
        path = Path(self.broadcast(filepath))
        partial = path.with_name(path.name + PARTIAL)
        if self.is_global_zero:
            remove(partial)
            partial.mkdir(parents=True)
        self.barrier()
        partial.mkdir(parents=True, exist_ok=True)  # on a disk of this node alone, too, of which is told below
        write_states(partial, checkpoint, (WEIGHTS, OPTIMIZERS))
        finish_together(partial, path, _SETTINGS)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Look into a folder that is whole, on all processes that of the first one; weights are read by and by.

        Args:
            checkpoint_path: of the folder.
            weights_only: taken for True, whatever it is.

        Raises:
            UserError: the folder is not whole, holds what could run code, or is of another strategy.
        """
        self._source = path = Path(self.broadcast(checkpoint_path))
        check_together(path, _SETTINGS, nullcontext, stored_tensors)
        return read_states(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read the weights, each process its parts.

        Args:
            checkpoint: from `load_checkpoint`.
            strict: refuse a checkpoint that lacks a weight, or has one too many.

        Raises:
            UserError: a weight is missing, unknown or of another shape.
        """
        assert self._source is not None
        saved, own = checkpoint[WEIGHTS], self._module().state_dict(keep_vars=True)
        if strict and (odd := sorted(saved.keys() ^ own.keys())):
            lacks = "no weight" if odd[0] in own else "an unknown weight"
            raise UserError(f"'{self._source}' has {lacks} '{odd[0]}': it was made with another model")
        for name in saved.keys() & own.keys():
            if saved[name].shape != own[name].shape:
                raise UserError(f"'{self._source}' has another shape of '{name}': it was made with another model")
        load_states(
            self._source, WEIGHTS, {name: x for name, x in saved.items() if name in own}, lambda name, _: own[name]
        )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the states of the optimizers, each process its parts.

        Args:
            checkpoint: from `load_checkpoint`.
        """
        assert self._source is not None
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint[OPTIMIZERS], strict=True)):
            make = partial(_like, optimizer)
            optimizer.load_state_dict(load_states(self._source, f"{OPTIMIZERS}.{number}", saved, make))

    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


def _parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _move_own_tensors(module: nn.Module, device: torch.device) -> None:
    """Move what a module itself holds, but for what is sharded."""
    for weight in module.parameters(recurse=False):
        if not isinstance(weight, DTensor):
            weight.data = weight.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)


def _like(optimizer: Optimizer, name: str, saved: Tensor) -> Tensor:
    """Room for a tensor of an optimizer's state, sharded as the weight that it belongs to."""
    kind, _, rest = name.partition(".")
    if kind == "state":
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        place: Any = weights[int(rest.partition(".")[0])]
    else:  # what an optimizer keeps besides, such as master weights, is there already
        place = optimizer.state_dict()
        for key in name.split("."):
            place = place[int(key)] if isinstance(place, list) else place[key]
    if isinstance(place, Tensor) and place.shape == saved.shape:
        return torch.empty_like(place, dtype=saved.dtype)
    return torch.empty(saved.shape, dtype=saved.dtype)
