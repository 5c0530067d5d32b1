"""Which weights get an adapter: linear layers by their names, and matrices that are no layers, as fused experts are."""

from __future__ import annotations

import re

from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_lightning.compat import CONVOLUTIONS
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.forward.output_layer import is_tied
from rlhf_lightning.training.sharded import full_shape

_LINEAR = (nn.Linear, Conv1D)
_WORTH_SAYING = 0.01


def layer_targets(model: PreTrainedModel, wanted: str | list[str]) -> tuple[str | list[str], bool]:
    """Targets as peft matches them, and whether their layers hold transposed weights (GPT-2).

    Args:
        model: without adapters.
        wanted: `all-linear`, names of layers, or a regular expression for whole names.

    Raises:
        UserError: a target matches no linear layer, or one that cannot have an adapter.
    """
    backbone = {id(module) for module in model.base_model.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    inside = sorted({name.rpartition(".")[2] for name, module in linear.items() if id(module) in backbone})
    targets = inside if wanted == "all-linear" else wanted
    matched: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        found = {
            name for name, _ in model.named_modules() if _matches(target, name, is_pattern=isinstance(targets, str))
        }
        if not found and not isinstance(targets, str) and (weights := _weights_called(model, target)):
            raise UserError(
                f"finetune.target_modules: '{target}' is not a layer but a weight ({weights[0]}); name it in "
                "finetune.target_parameters"
            )
        if not found:
            hint = "; a string is a regular expression for whole names" if isinstance(targets, str) else ""
            raise UserError(
                f"finetune.target_modules: no layer is called '{target}'{hint}; there are {', '.join(inside)}"
            )
        matched |= found
    output = model.get_output_embeddings()
    for name in sorted(matched):
        module = model.get_submodule(name)
        if name not in linear:
            raise UserError(f"finetune.target_modules: '{name}' is not a linear layer; there are {', '.join(inside)}")
        if module is getattr(model, HEAD, None) or (module is output and is_tied(model, module)):
            reason = "trained as a whole" if module is not output else "tied to the input embeddings"
            raise UserError(f"finetune.target_modules: '{name}' can have no adapter, it is {reason}; leave it out")
    kinds = {isinstance(linear[name], Conv1D) for name in matched}
    return targets, kinds == {True}


def parameter_targets(model: PreTrainedModel, wanted: list[str]) -> list[str]:
    """The same names, once they are known to be weights that can have an adapter.

    Args:
        model: without adapters.
        wanted: ends of names of weights that are no layers.

    Raises:
        UserError: one is not such a weight.
    """
    others = sorted(_without_layer(model))
    hint = f"there are {', '.join(_endings(others))}" if others else f"{type(model).__name__} has none"
    for target in wanted:
        found = _weights_called(model, target)
        if not found:
            raise UserError(f"finetune.target_parameters: no weight is called '{target}'; {hint}")
        if unfit := [name for name in found if name not in others]:
            raise UserError(f"finetune.target_parameters: '{unfit[0]}' belongs to a layer or is a vector; {hint}")
    return wanted


def _weights_called(model: nn.Module, target: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if _matches(target, name)]


def _without_layer(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Matrices, one or several on top of each other, that belong to no layer of their own, such as fused experts."""
    layers = (module for module in model.modules() if isinstance(module, (*_LINEAR, nn.Embedding, CONVOLUTIONS)))
    of_layers = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    backbone = {id(p) for p in model.base_model.parameters()} - of_layers
    shapes = ((name, p, full_shape(p)) for name, p in model.named_parameters() if id(p) in backbone)
    return {name: p for name, p, shape in shapes if len(shape) in (2, 3) and min(shape) > 1}


def _endings(names: list[str]) -> list[str]:
    """The last two parts of names, each once."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def say_what_has_none(model: PreTrainedModel, wanted: list[str]) -> None:
    """Name the matrices that stay frozen without an adapter, where `all-linear` sounds as if there were none.

    Args:
        model: without adapters.
        wanted: as for `parameter_targets`; these have one.
    """
    frozen = {name: p for name, p in _without_layer(model).items() if not any(_matches(t, name) for t in wanted)}
    sizes = {name: full_shape(p).numel() for name, p in model.named_parameters()}
    share = sum(full_shape(p).numel() for p in frozen.values()) / sum(sizes.values())
    if share >= _WORTH_SAYING:
        rank_zero_warn(
            f"finetune.target_modules all-linear leaves {share:.0%} of the weights frozen without an adapter, for they "
            f"are no layers: {', '.join(_endings(list(frozen)))}; name them in finetune.target_parameters to adapt them"
        )


def _matches(target: str, name: str, is_pattern: bool = False) -> bool:
    # As in peft: a string matches whole names, an item of a list the last part of one.
    return bool(re.fullmatch(target, name)) if is_pattern else name == target or name.endswith(f".{target}")
