"""Frozen weights in four bits, by bitsandbytes (NF4: Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.numerics import allowed_rounding, relative_distance
from rlhf_lightning.models.adapter_folders import is_adapter

_ROWS = 3  # of the input that a layer is tried on


def nf4_options(name: str) -> dict[str, Any]:
    """What makes `from_pretrained` hold the backbone's linear layers in four bits.

    Products are computed in bfloat16 on a GPU that has it, otherwise in torch's default type.

    Args:
        name: what will be loaded.

    Raises:
        UserError: bitsandbytes is not installed, or an adapter would have to be merged into four bits.
    """
    if is_adapter(name):
        raise UserError(f"'{name}' is a PEFT adapter, which cannot be merged into four bits: merge and save it before")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("frozen_dtype nf4 needs bitsandbytes: pip install 'rlhf-lightning[quantization]'")
    _import_without_notice()
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.get_default_dtype(),
    )
    return {"quantization_config": config}


def _import_without_notice() -> None:
    """Import bitsandbytes without what it says of a kernel that `settle_nf4` leaves alone."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)


def settle_nf4(model: PreTrainedModel) -> None:
    """Let four-bit layers compute the same on every processor, in training as in evaluation; try one of each shape.

    On CPUs with bfloat16 instructions, bitsandbytes would change the layout of the weights at the first forward pass
    in evaluation. In that layout products are rounded to bfloat16 whatever the compute type, inputs get no gradient
    any more, in training neither, and small or odd shapes end in an error.

    Args:
        model: as `from_pretrained` gave it, with `nf4_options` or without; changed in place.

    Raises:
        UserError: a layer does not compute what its weights say.
    """
    tried: set[torch.Size] = set()
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is None:
            continue
        untyped: Any = layer
        untyped.support_avx512bf16_for_cpu = False
        if state.shape not in tried:
            tried.add(state.shape)
            _try_layer(name, untyped)


def _try_layer(name: str, layer: Any) -> None:
    """Compare a layer, and the gradient of its input, with the weights that it stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
    x = torch.linspace(-1, 1, _ROWS * weight.shape[1], device=weight.device, dtype=weight.dtype).view(_ROWS, -1)
    try:
        with torch.no_grad():
            found = layer(x)
        with torch.enable_grad():
            output = layer(x.requires_grad_())
            (gradient,) = torch.autograd.grad(output.sum(), x)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"frozen_dtype nf4 does not work on this processor ({name}: {str(e)[:200]}); leave it out"
        ) from e
    expected = nn.functional.linear(x.detach(), weight, layer.bias)
    pairs = [(found, expected), (output.detach(), expected), (gradient, weight.sum(dim=0).expand_as(x))]
    worst = max(relative_distance(*pair) for pair in pairs)
    if not worst <= allowed_rounding(weight.dtype, max(weight.shape), device_type=weight.device.type):  # nor NaN
        raise UserError(
            f"frozen_dtype nf4 does not work on this processor ({name} is off by {worst:.1%} of its norm); leave it out"
        )
