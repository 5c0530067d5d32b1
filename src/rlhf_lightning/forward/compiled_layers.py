"""Layers of transformers that are compiled where they stand, so that one compilation serves all layers and batches.

Between its matrix products a layer is a row of small operations: norms, rotations, activations, sums. Compiled, they
are a few kernels that read and write each number once, and in mixed precision round it once. The layers of a model do
the same with other weights, so one of them is compiled for all, with the number of rows and tokens left open.

Nothing is wrapped: for the length of a `with` block a layer's call goes to the compiled code, and what is outside of it
(decoding, self tests, checkpoints, copies) sees the model as it is. The attention of rows without padding loops over
sequences, which differ from batch to batch, and so it stands between two compiled halves of a layer.

Notation: N tokens of whatever goes through a layer, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.compat import CALL, call_uncompiled, is_compiler_error, training_compiler_settings
from rlhf_lightning.forward.backbone import unusual_layers
from rlhf_lightning.forward.generated_code import keep_generated_code
from rlhf_lightning.forward.numerics import relative_distance, tolerance
from rlhf_lightning.training.sharded import blocks_of, is_sharded

MOST_GRAPHS = 64
"""Of one piece of code, in a process: with gradients and without, with a mask and without, of each kind of layer."""

MOST_CHARACTERS = 300
"""Of a compiler's complaint."""

_states: WeakKeyDictionary[PreTrainedModel, _State] = WeakKeyDictionary()


class _State:
    """What is known of a model's layers. It holds on to no weight.

    Attributes:
        reason: why they are not compiled; empty if they are.
        compiled: calls a layer.
        trusted: kinds of layers whose results have been compared, with gradients and without.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = type(model).__name__
        self.reason = ""
        keep_generated_code()
        self.compiled: Callable[..., Any] = torch.compile(call_uncompiled, dynamic=True)
        self.trusted: set[tuple[type, bool]] = set()
        if obstacle := _obstacle(model):
            self.give_up(obstacle)

    def give_up(self, reason: str) -> None:
        self.reason = reason
        rank_zero_warn(f"compile: the layers of {self.name} cannot be compiled, and go on as they are: {reason}")


class _Call:
    """A call of a layer."""

    def __init__(self, model: PreTrainedModel, layer: nn.Module, state: _State) -> None:
        self.model, self.layer, self.state = model, layer, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, kind = self.state, (type(self.layer), torch.is_grad_enabled())
        if state.reason:
            return call_uncompiled(self.layer, args, kwargs)
        expected = None if kind in state.trusted else self._plain(args, kwargs)
        try:
            found = state.compiled(self.layer, args, kwargs)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            state.give_up(" ".join(str(error).split())[:MOST_CHARACTERS])
            return call_uncompiled(self.layer, args, kwargs)
        if expected is not None:
            some = expected.norm(dim=-1) > 0  # a pad whose embedding is 0 may stay 0
            distance = relative_distance(_hidden(found).detach()[some], expected[some]) if some.any() else 0.0
            if not distance <= tolerance(self.model):  # nor NaN
                state.give_up(f"it changes the hidden states by {distance:.1%} of their norm")
                return call_uncompiled(self.layer, args, kwargs)
            state.trusted.add(kind)
        return found

    @torch.no_grad()
    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the layer says uncompiled, `[..., D]`; random numbers are drawn as they will be drawn again."""
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return _hidden(call_uncompiled(self.layer, args, kwargs))


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def compiled_layers(*models: nn.Module) -> Iterator[None]:
    """Let the layers of models run compiled for the length of a `with` block, forwards and backwards.

    A model for which that is not possible goes on as it is, with a warning. Each kind of layer is compared once with
    what it says uncompiled.

    Args:
        *models: modules that hold models of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))
        >>> with compiled_layers(model):  # compiles when a layer is first called
        ...     layers_are_compiled(model)
        True
    """
    calls: list[nn.Module] = []
    with ExitStack() as stack:
        stack.enter_context(training_compiler_settings(MOST_GRAPHS))
        stack.callback(lambda: [vars(layer).pop(CALL, None) for layer in calls])
        found = [part for model in models for part in model.modules() if isinstance(part, PreTrainedModel)]
        inner = {part.base_model for part in found if part.base_model is not part}
        for part in dict.fromkeys(part for part in found if part not in inner):
            state = _states.get(part) or _states.setdefault(part, _State(part))
            for layer in [] if state.reason else blocks_of(part):
                vars(layer)[CALL] = _Call(part, layer, state)
                calls.append(layer)
        yield


def layers_are_compiled(model: nn.Module) -> bool:
    """Whether any layer of a model runs compiled now.

    Args:
        model: any.
    """
    return any(CALL in vars(module) for module in model.modules())


def uncompiled_reason(model: PreTrainedModel) -> str:
    """Why the layers of a model that was in `compiled_layers` went uncompiled; empty if they did not.

    Args:
        model: a language model or a scalar model.
    """
    return _states[model].reason if model in _states else ""


def _obstacle(model: PreTrainedModel) -> str:
    """Why a model's layers cannot be compiled, as far as it can be looked up."""
    if is_sharded(model):
        return "its weights are sharded over processes"
    if other := unusual_layers(model):
        return f"it has layers of type '{other[0]}'"
    return "" if blocks_of(model) else "its layers are not found"
