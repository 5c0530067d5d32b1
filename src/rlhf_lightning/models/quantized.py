"""Frozen weights in four bits, by bitsandbytes (NF4: Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import is_adapter


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
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.get_default_dtype(),
    )
    return {"quantization_config": config}
