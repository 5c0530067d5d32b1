"""What memory a run takes, on each GPU, by role and by what it does, before anything is loaded.

The models are built without weights by the code that builds them in training (`skeletons`). Their passes are run on
tensors without memory, and what is alive at the worst moment is counted (`passes`, `live`); for speed two shallow ones
are run, from which the deep one follows, as every block needs the same. What a strategy splits, gathers and sends
stands in `training.sheets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.online.models import TrunkValue
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.forward.output_layer import is_tied
from rlhf_lightning.models.fused_lora import FusedLoraLinear
from rlhf_lightning.models.peft_library import LoraLinear
from rlhf_lightning.planning.live import Moment
from rlhf_lightning.planning.passes import Passed, models_of, passed_through
from rlhf_lightning.planning.request import USUAL_GPU, Request
from rlhf_lightning.planning.skeletons import Skeletons
from rlhf_lightning.training.checkpoint_size import state_per_weight, steps_fused
from rlhf_lightning.training.sharded import blocks_of
from rlhf_lightning.training.sheets import Sizes

GIB = 2**30
FITS_BELOW = 0.95
"""Share of a GPU's memory that may be used; the rest goes to fragments between tensors."""

OUTSIDE = 1.0 * GIB
"""Bytes of a GPU that PyTorch does not count: the CUDA context, libraries' workspaces, NCCL's buffers; an allowance."""

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in four bits, with its share of the scales of 64 and those of 256 such scales."""


@dataclass(frozen=True)
class Role:
    """One of the stage's models; bytes on one GPU.

    Attributes:
        name: what it is for.
        parameters: numbers in it.
        trained: numbers of it that are trained.
        shared: numbers that another role, named before it, holds already.
        weights: bytes.
        gradients: bytes, when all are there.
        optimizer: bytes of the optimizer's state.
        copies: bytes of float32 copies of weights.
    """

    name: str
    parameters: int
    trained: int
    shared: int
    weights: float
    gradients: float
    optimizer: float
    copies: float


@dataclass(frozen=True)
class Part:
    """One part of a step, at its worst moment; bytes on one GPU, beside what lies there all the time.

    Attributes:
        name: what is done.
        gradients: those that are there.
        activations: of hidden states, and all that autograd keeps.
        logits: of the output layer.
        cache: keys and values of prompts and answers, and what a value head is to read of their hidden states.
        buffers: weights that are gathered or merged for the time, and what is about to be sent.
    """

    name: str
    gradients: float = 0
    activations: float = 0
    logits: float = 0
    cache: float = 0
    buffers: float = 0

    @property
    def together(self) -> float:
        """All of it."""
        return self.gradients + self.activations + self.logits + self.cache + self.buffers


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        request: what was asked.
        roles: the models.
        parts: of a step.
        sizes: examples of a step and so on, on one process.
        sent: bytes that each process sends per optimizer step, by what they are.
        sent_by_rollout: the same per rollout.
        on_cpu: bytes that each machine holds in CPU memory for its GPUs.
        assumed: what was not known, one line each.
    """

    request: Request
    roles: list[Role]
    parts: list[Part]
    sizes: dict[str, int]
    sent: dict[str, int] = field(default_factory=dict)
    sent_by_rollout: dict[str, int] = field(default_factory=dict)
    on_cpu: float = 0
    assumed: list[str] = field(default_factory=list)

    @property
    def held(self) -> float:
        """Bytes that lie on a GPU all the time: weights, optimizer state and float32 copies."""
        sheet = self.request.sheet
        weights = 0 if sheet.offloads_weights else sum(role.weights for role in self.roles)
        state = 0 if sheet.offloads_optimizer else sum(role.optimizer + role.copies for role in self.roles)
        return weights + state

    @property
    def outside(self) -> float:
        """Bytes that PyTorch does not count."""
        return OUTSIDE if self.request.on_gpu else 0

    @property
    def worst(self) -> Part:
        """The part that needs most."""
        return max(self.parts, key=lambda part: part.together)

    @property
    def peak(self) -> float:
        """Bytes of a GPU at the worst moment."""
        return self.held + self.worst.together + self.outside

    @property
    def share(self) -> float | None:
        """Of a GPU's memory; None where that is not known."""
        return None if self.request.gpu_memory is None else self.peak / (self.request.gpu_memory * GIB)

    @property
    def fits(self) -> bool:
        """Whether there is room, as far as is known."""
        return self.share is None or self.share <= FITS_BELOW


def plan(request: Request) -> Plan:
    """Plan a run.

    Args:
        request: its settings and machines.

    Raises:
        UserError: settings that training would refuse, or of which nothing is known here.
    """
    return _Planner(request).plan()


class _Planner:
    def __init__(self, request: Request) -> None:
        self.request, self.sheet = request, request.sheet
        self.skeletons = Skeletons(request.model, bool(request.model.get("trust_remote_code")))
        self.stage = self._stage(None)
        self.state = state_per_weight(self.stage.optimizer)

    @property
    def _assumed(self) -> list[str]:
        by_memory = self.stage.micro_batch_size is None and self.stage.max_tokens_per_batch == "auto"
        lines = []
        if by_memory and self.request.on_gpu and self.request.gpu_memory is None:
            lines.append(f"micro-batches are those of a GPU of {USUAL_GPU:.0f} GiB; --gpu_memory says another")
        if self.request.data.get("whole_rankings"):
            lines.append("rankings are taken to have 2 responses; one of K takes K / 2 times the activations")
        if self.request.model.get("calibration_samples"):
            lines.append("the policy that answers calibration_samples is left out; it is let go before the first step")
        return lines

    def _stage(self, depth: int | None) -> Stage:
        stage = self.skeletons.build(self.request.stage, self.request.model, self.sheet.loaded, depth)
        if self.sheet.converts:
            stage.to(self.sheet.held)
        return stage

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        return models_of(self.stage)

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.stage.parameters() if p.requires_grad]

    @cached_property
    def total(self) -> int:
        return sum(p.numel() for p in self.stage.parameters())

    @cached_property
    def num_trained(self) -> int:
        return sum(p.numel() for p in self.trained)

    def plan(self) -> Plan:
        roles, sizes = [*self._roles()], self.request.sizes(self.stage)
        parts = [self._part(passed, roles, sizes) for passed in self._passed()]
        parts.append(self._step(roles))
        return Plan(
            request=self.request,
            roles=roles,
            parts=parts,
            sizes=sizes,
            sent=self.sheet.sent(self.num_trained, self._passed_numbers(), sizes["micro_batches"]),
            sent_by_rollout=self._sent_by_rollout(roles, sizes),
            on_cpu=self._on_cpu(roles),
            assumed=[*self.skeletons.assumed, *self._assumed],
        )

    # What lies there all the time.

    def _roles(self) -> Iterator[Role]:
        sheet, known = self.sheet, set[int]()
        for name, model in self.models.items():
            own = {id(p): p for p in model.parameters()}
            new = [p for key, p in own.items() if key not in known]
            known |= own.keys()
            trained = sum(p.numel() for p in new if p.requires_grad)
            yield Role(
                name=name,
                parameters=sum(p.numel() for p in own.values()),
                trained=trained,
                shared=sum(p.numel() for p in own.values()) - sum(p.numel() for p in new),
                weights=self._weight_bytes(model, new) * sheet.weight_share,
                gradients=trained * sheet.gradient_bytes * sheet.gradient_share,
                optimizer=trained * self.state * max(4, sheet.held.itemsize) * sheet.state_share,
                copies=trained * sheet.copy_bytes * sheet.state_share,
            )

    def _weight_bytes(self, model: nn.Module, weights: list[nn.Parameter]) -> float:
        if self.request.model.get("frozen_dtype") != "nf4":
            return sum(p.numel() * p.element_size() for p in weights)
        backbone: Any = getattr(model, "base_model", model)
        linear = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad}
        return sum(p.numel() * (_NF4_BYTES if id(p) in linear else p.element_size()) for p in weights)

    def _on_cpu(self, roles: list[Role]) -> float:
        sheet = self.sheet
        gradients = self.num_trained * 4 * sheet.gradient_share  # what the optimizer reads there is float32
        state = sum(role.optimizer + role.copies for role in roles) + gradients if sheet.offloads_optimizer else 0
        weights = sum(role.weights for role in roles) if sheet.offloads_weights else 0
        return (state + weights) * self.request.gpus / self.request.nodes

    # What comes and goes.

    def _passed(self) -> list[Passed]:
        """What each part of a step needs, of models as deep as they are."""
        load, step = self.request.load(self.stage), self.skeletons.period
        shallow = max(2, step)
        depth = next(iter(self.skeletons.depths))
        if len(self.skeletons.depths) > 1 or depth <= shallow + 2 * step:
            return passed_through(self._gathering(None), load)
        few, more = (passed_through(self._gathering(n), load) for n in (shallow, shallow + step))
        ahead = (depth - shallow) / step
        return [_further(a, b, ahead) for a, b in zip(few, more, strict=True)]

    def _gathering(self, depth: int | None) -> Stage:
        """A stage whose weights have the types that they are gathered in, and whose layers are those that gather."""
        stage = self._stage(depth)
        layers: list[Any] = [*stage.modules()] if self.sheet.shards_weights else []
        for layer in layers:
            if type(layer) is FusedLoraLinear:  # which reads weights of layers that it does not call
                layer.__class__ = LoraLinear  # type: ignore[assignment]
        if self.sheet.gathers_narrow:
            for model in models_of(stage).values():
                for part in (*blocks_of(model), *_wide_heads(model)):
                    part.to(self.sheet.computed)
        return stage

    def _part(self, passed: Passed, roles: list[Role], sizes: dict[str, int]) -> Part:
        gradients = sum(role.gradients for role in roles)
        moments = [*passed.first, *(passed.later if sizes["micro_batches"] > 1 else ())]
        whole = max((moment.gradients for moment in (*passed.first, *passed.later)), default=0) or 1
        updates = bool(passed.later)
        reduced = self.sheet.reduction_buffer(self.num_trained, self.total) if updates else 0
        gathered = max(
            (self.sheet.gathered(self._sizes(role), self.total, updates) for role in passed.models), default=0
        )
        if passed.kept and self.gathers_rollouts(roles):
            gathered = self._sizes("policy").total * self.sheet.computed.itemsize
        parts = [
            Part(
                name=passed.name,
                gradients=gradients * moment.gradients / whole,
                activations=moment.working,
                logits=moment.logits,
                cache=passed.kept + (0 if updates else self._hidden_of_rollout(sizes)),
                buffers=gathered + reduced + passed.merged,
            )
            for moment in moments
        ]
        return max(parts, key=lambda part: part.together)

    def _hidden_of_rollout(self, sizes: dict[str, int]) -> float:
        """Of hidden states that the engine keeps for a value head on the policy, bytes."""
        value = self.models.get("value")
        if not isinstance(value, TrunkValue) or not self.request.load(self.stage).takes_sampler_logprobs:
            return 0
        numbers = sizes["responses"] * self.request.response_length * value.score.in_features
        return numbers * (4 if self.sheet.is_cast else self.sheet.computed.itemsize)

    def _step(self, roles: list[Role]) -> Part:
        largest = max(p.numel() for p in self.trained)
        fuses = steps_fused(self.stage.optimizer)
        needed = self.sheet.step_buffer(self.num_trained, largest, self.state, self.request.on_gpu, fuses)
        gradients = 0 if self.sheet.offloads_optimizer else sum(role.gradients for role in roles)
        buffers = self.sheet.reduction_buffer(self.num_trained, self.total)
        return Part("steps the optimizer", gradients=gradients, activations=needed, buffers=buffers)

    def _sizes(self, role: str) -> Sizes:
        model = self.models[role]
        total = sum(p.numel() for p in model.parameters())
        blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
        return Sizes(total, max(blocks, default=total), total - sum(blocks))

    def gathers_rollouts(self, roles: list[Role]) -> bool:
        """Whether the policy is held whole while it answers; if left open, where it takes half of what is free."""
        sheet, how = self.sheet, self.request.model.get("rollout_weights", "auto")
        if not sheet.shards_weights or self.request.gpus == 1 or how == "layered":
            return False
        if how == "gathered" or self.request.gpu_memory is None:
            return how == "gathered"
        held = sum(role.optimizer + role.copies for role in roles) if not sheet.offloads_optimizer else 0
        held += sum(role.weights for role in roles) if not sheet.offloads_weights else 0
        free = self.request.gpu_memory * GIB - held - OUTSIDE
        return self._sizes("policy").total * sheet.computed.itemsize <= free / 2

    # What is sent.

    def _passed_numbers(self) -> int:
        trained = (m for m in self.models.values() if any(p.requires_grad for p in m.parameters()))
        return sum(p.numel() for model in trained for p in model.parameters())

    def _sent_by_rollout(self, roles: list[Role], sizes: dict[str, int]) -> dict[str, int]:
        """Of weights that are gathered: once, or for every token of an answer; and for every pass that measures."""
        if not self.sheet.shards_weights or "answered" not in sizes or self.request.gpus == 1:
            return {}
        width = self.sheet.computed.itemsize * (self.request.gpus - 1) / self.request.gpus
        policy = self._sizes("policy").total * width
        batches, once = -(-sizes["responses"] // sizes["answered"]), self.gathers_rollouts(roles)
        passes = -(-sizes["responses"] // sizes["micro_batch"])
        measured = sum(self._sizes(role).total for role in self.models) * width * passes
        return {
            "weights, to answer": int(policy if once else policy * batches * self.request.response_length),
            "weights, to measure": int(measured),
        }


def _wide_heads(model: Any) -> list[nn.Module]:
    """The output layer over the vocabulary, if it is one of its own."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [] if head is None or is_tied(model, head) else [head]


def _further(few: Passed, more: Passed, steps: float) -> Passed:
    """What a deeper model needs, `steps` times the difference of two beyond the first of them."""

    def line(a: float, b: float) -> float:
        return a + (b - a) * steps

    def moments(a: tuple[Moment, ...], b: tuple[Moment, ...]) -> tuple[Moment, ...]:
        return tuple(Moment(*map(line, x, y)) for x, y in zip(a, b, strict=True))

    return Passed(
        few.name,
        few.models,
        moments(few.first, more.first),
        moments(few.later, more.later),
        line(few.kept, more.kept),
        line(few.merged, more.merged),
    )
