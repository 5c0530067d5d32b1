"""What each strategy holds, gathers and sends, in bytes, as far as it can be told before a run.

Sources: `docs/precision.md` (bytes per weight, measured), DeepSpeed's and torch's own code for buffers; Rajbhandari et
al. 2020 (ZeRO), section 7, for what is sent.

Notation: N processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.training.deepspeed_memory import GATHERED, LEAST, SHARE

Kind = Literal["one device", "DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}
"""By precision, what trained weights are held in, and what is computed in."""

SHARDED: dict[str, Any] = {"class_path": "rlhf_lightning.FSDP2Strategy", "init_args": {}}
"""What a run takes whose weights do not fit into one GPU, as a config names it."""
SHARDED_ON_CPU: dict[str, Any] = {**SHARDED, "init_args": {"cpu_offload": True}}
"""The same with weights and optimizer state in CPU memory."""

_ALSO_CALLED = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "None": "32-true"}
_SIZES = {
    "reduce_bucket_size": 200_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}
"""DeepSpeed's buffers at the most, in numbers: Lightning's default, and in the last two DeepSpeed's."""


class Sizes:
    """How many numbers a model holds, and in which pieces they are gathered.

    Args:
        total: in all.
        block: in the largest block.
        outside: in what stands outside of the blocks: embeddings, norms, output layer.
    """

    def __init__(self, total: int, block: int, outside: int) -> None:
        self.total, self.block, self.outside = total, block, outside


@dataclass(frozen=True)
class Sheet:
    """What a strategy does with the memory of one process.

    Attributes:
        kind: which it is.
        processes: N.
        held: type that trained weights are held in.
        computed: type that products are computed in.
        loaded: type that models are loaded in.
        is_cast: weights are cast for each product (autocast), rather than held or gathered in that type.
        converts: frozen weights and adapters get the type of the trained ones, whatever they were loaded in.
        options: what the strategy was given.
        accumulates: a step may be made of several micro-batches.
    """

    kind: Kind
    processes: int
    held: torch.dtype
    computed: torch.dtype
    loaded: torch.dtype
    is_cast: bool
    converts: bool
    options: Mapping[str, Any]
    accumulates: bool = True

    @property
    def name(self) -> str:
        """As it is shown."""
        offloads = [
            word
            for word, is_on in (("optimizer", self.offloads_optimizer), ("weights", self.offloads_weights))
            if is_on
        ]
        return self.kind + (f" with {' and '.join(offloads)} in CPU memory" if offloads else "")

    @property
    def offloads_optimizer(self) -> bool:
        """Optimizer state, and float32 copies, lie in CPU memory."""
        return bool(self.options.get("offload_optimizer") or self.options.get("cpu_offload"))

    @property
    def offloads_weights(self) -> bool:
        """Weights lie in CPU memory, and come to the device for the time that they are needed."""
        return bool(
            (self.kind == "ZeRO-3" and self.options.get("offload_parameters")) or self.options.get("cpu_offload")
        )

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the weights."""
        return self.kind.startswith("ZeRO")

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds its part of every weight only, and layers are gathered when they run."""
        return self.kind in ("ZeRO-3", "FSDP2")

    @property
    def weight_share(self) -> float:
        """Share of all weights that lie on this process."""
        return 1 / self.processes if self.shards_weights else 1.0

    @property
    def gradient_share(self) -> float:
        """The same of gradients."""
        return 1 / self.processes if self.kind in ("ZeRO-2", "ZeRO-3", "FSDP2") else 1.0

    @property
    def state_share(self) -> float:
        """The same of optimizer state, and of float32 copies."""
        return 1.0 if self.kind in ("one device", "DDP", "ZeRO-0") else 1 / self.processes

    @property
    def takes_losses_one_by_one(self) -> bool:
        """Whether the graph of one loss may be gone before the next is built."""
        return self.kind in ("one device", "FSDP2")

    @property
    def gathers_narrow(self) -> bool:
        """Whether weights of blocks and output layer are gathered in the type of products, and others as they are."""
        return self.kind == "FSDP2" and self.held != self.computed

    @property
    def gradient_bytes(self) -> int:
        """Of one number of a gradient."""
        if not self.is_deepspeed or self.kind == "ZeRO-0":
            return self.held.itemsize
        wide = self.options.get("gradient_dtype", "auto")
        return 4 if wide == "float32" or (wide == "auto" and self.accumulates) else self.computed.itemsize

    @property
    def copy_bytes(self) -> int:
        """Of the float32 copy of one trained number; 0 without copies."""
        if self.kind == "ZeRO-3" and self.held.itemsize == 4:
            return 0
        # DeepSpeed's other stages keep copies whatever the weights are.
        return 4 if self.is_deepspeed or self.held.itemsize < 4 else 0

    def _buffer(self, name: str, total: int) -> int:
        """Numbers in one of DeepSpeed's buffers: as given, or made to fit all models of `total` numbers."""
        config = self.options.get("config")
        given = config.get("zero_optimization") if isinstance(config, Mapping) else None
        size = (given if isinstance(given, Mapping) else self.options).get(name)
        most = _SIZES[name]
        if isinstance(size, int) and size != most:
            return size
        return max(LEAST, min(most, total // (GATHERED if name == "stage3_max_live_parameters" else SHARE)))

    def reduction_buffer(self, gradients: int, total: int) -> int:
        """Bytes held to send gradients.

        Args:
            gradients: numbers that are trained.
            total: numbers of all models.
        """
        if self.processes == 1 and not self.is_deepspeed:
            return 0
        if self.kind == "DDP":
            return 0 if self.options.get("gradient_as_bucket_view") else gradients * self.gradient_bytes
        if self.kind in ("ZeRO-1", "ZeRO-2", "ZeRO-3") and self.options.get("contiguous_gradients", True):
            twice = 2 if self.options.get("overlap_comm", True) and self.kind != "ZeRO-3" else 1
            return twice * self._buffer("reduce_bucket_size", total) * self.gradient_bytes
        return 0

    def gathered(self, sizes: Sizes, total: int, trains: bool) -> int:
        """Bytes of the whole weights that are there at once while a model runs.

        Args:
            sizes: of the model.
            total: numbers of all models.
            trains: its backward pass is run, too, and sends gradients.
        """
        if not self.shards_weights or self.processes == 1:
            return 0
        width = self.computed.itemsize
        if self.kind == "ZeRO-3":
            live = max(self._buffer("stage3_max_live_parameters", total), sizes.block, sizes.outside)
            ahead = self._buffer("stage3_prefetch_bucket_size", total)
            return min(sizes.total, live + ahead) * width
        # A block, the one that is gathered ahead of it, what is outside of blocks; and a block's gradient, to be sent.
        sent = sizes.block * (width + 4) if trains else 0
        if self.options.get("reshard_after_forward") is False and trains:
            return sizes.total * width + sent
        return 2 * sizes.block * width + sizes.outside * max(width, self.held.itemsize) + sent

    def step_buffer(self, trained: int, largest: int, state: float, on_gpu: bool, fuses: bool = False) -> int:
        """Bytes that a step of the optimizer needs for itself, the gradients not counted.

        Args:
            trained: numbers that are trained.
            largest: numbers in the largest weight among them.
            state: numbers that the optimizer keeps for each of them.
            on_gpu: the optimizer works on all weights at once there (`foreach`), and on one after the other elsewhere.
            fuses: it needs nothing where weights are whole (`training.optim.fuse`).
        """
        wide = max(4, self.held.itemsize)
        fuses = fuses and self.kind in ("one device", "DDP")
        roots = 0 if state < 2 or fuses else trained * self.state_share if on_gpu else 2 * largest
        widened = trained * self.state_share * (4 - self.gradient_bytes) if self.held.itemsize < 4 else 0
        if self.is_deepspeed:
            widened = trained * self.state_share * (4 if self.kind != "ZeRO-3" else 4 / SHARE)
        return int(roots * wide + widened) if not self.offloads_optimizer else 0

    def sent(self, trained: int, passed: int, micro_batches: int) -> dict[str, int]:
        """Bytes that a process sends for one step of the optimizer, by what they are.

        Args:
            trained: numbers that are trained.
            passed: numbers of the models that the step passes through, forward and backward.
            micro_batches: of the step.
        """
        if self.processes == 1:
            return {}
        passing = (self.processes - 1) / self.processes  # of a ring
        weight, gradient = self.computed.itemsize, self.gradient_bytes
        if self.kind in ("DDP", "ZeRO-0"):
            return {"gradients": int(2 * trained * gradient * passing)}
        at_last = self.kind == "ZeRO-1" or (self.kind == "FSDP2" and self.options.get("reduce_gradients") == "last")
        reductions = 1 if at_last else micro_batches
        sent = {"gradients": int(trained * (4 if self.kind == "FSDP2" else gradient) * reductions * passing)}
        if not self.shards_weights:
            return sent | {"weights": int(trained * weight * passing)}
        keeps = self.kind == "FSDP2" and self.options.get("reshard_after_forward") is False
        passes = 1 if keeps else 2
        return sent | {"weights": int(passed * weight * passes * micro_batches * passing)}


def sheet_of(strategy: Any, precision: str, processes: int, accumulates: bool = True) -> Sheet:
    """The sheet of a strategy as a config names it.

    Args:
        strategy: a name, or `class_path` and `init_args`.
        precision: as Lightning's Trainer takes it.
        processes: N.
        accumulates: a step may be made of several micro-batches.

    Raises:
        UserError: a strategy or precision that training would refuse, or whose memory is not known.
    """
    precision = _ALSO_CALLED.get(str(precision), str(precision))
    if precision not in _PRECISIONS:
        raise UserError(f"precision {precision} is not supported: set trainer.precision to bf16-mixed")
    held, computed = _PRECISIONS[precision]
    kind, options = _kind(strategy, processes)
    if kind.startswith("ZeRO"):
        loaded, is_cast, converts = torch.float32, False, True
        return Sheet(kind, processes, computed, computed, loaded, is_cast, converts, options, accumulates)
    is_cast = held != computed
    converts = precision in ("bf16-true", "64-true")
    return Sheet(kind, processes, held, computed, held, is_cast, converts, options, accumulates)


def _kind(strategy: Any, processes: int) -> tuple[Any, dict[str, Any]]:
    name, options = strategy, dict[str, Any]()
    if isinstance(strategy, Mapping):
        name, options = strategy.get("class_path"), strategy.get("init_args") or {}
    name = str(name or "auto").rpartition(".")[2]
    if name in ("auto", "SingleDeviceStrategy"):
        return ("one device" if processes == 1 else "DDP"), options
    if name.startswith("ddp") or name == "DDPStrategy":
        return "DDP", options
    if name == "DeepSpeedStrategy":
        return f"ZeRO-{options.get('stage', 2)}", options
    if name in ("FSDP2Strategy", "ModelParallelStrategy"):
        return "FSDP2", options
    raise UserError(
        f"nothing is known of the memory of strategy {name}: set trainer.strategy to auto, ddp, "
        "rlhf_lightning.DeepSpeedStrategy or rlhf_lightning.FSDP2Strategy"
    )
