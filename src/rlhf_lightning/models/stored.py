"""Weights as they lie in the files of a model: in which type, and how long they stay there."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from safetensors import safe_open

from rlhf_lightning.models.adapter_folders import adapter_base, is_adapter
from rlhf_lightning.models.folders import read_config
from rlhf_lightning.runs.lineage import folder_of
from rlhf_lightning.training.sharded import widen_later, widen_now, will_be_sharded

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(name: str) -> torch.dtype:
    """Type that holds all weights in the folder of a model, or of the base of an adapter, as they are.

    Args:
        name: folder or hub id.

    Returns:
        float32 where it cannot be told, as of files that are not safetensors.
    """
    folder = folder_of(adapter_base(name) if is_adapter(name) else name)
    found: set[torch.dtype] = set()
    for path in sorted(folder.glob("*.safetensors")) if folder else []:
        with safe_open(path, "pt") as file:
            types = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # no dict
        found |= {_FLOATS[each] for each in types & _FLOATS.keys()}
    return reduce(torch.promote_types, found) if found else torch.float32


def load_pretrained(kind: Any, name: str, **options: Any) -> tuple[Any, set[str]]:
    """`from_pretrained` in torch's default dtype.

    What is stored in half precision, to be float32, and will be sharded, is loaded as it is stored and marked to become
    float32 part by part (`training.sharded.widen_later`). Until then it takes no memory: it stays in its files.

    Args:
        kind: an auto class of transformers.
        name: folder or hub id.
        **options: of `from_pretrained`.

    Returns:
        The model, and which of its weights the files lack; those are random.
    """
    dtype = torch.get_default_dtype()
    stored = _to_load_in(name, dtype, options)
    model, info = kind.from_pretrained(name, dtype=stored, output_loading_info=True, **options)
    missing = set(info["missing_keys"])
    if stored == dtype:
        return model, missing
    if any(buffer.dtype == stored for buffer in model.buffers()):  # computed in that type, and rounded
        del model
        model, info = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
        return model, set(info["missing_keys"])
    model.config.dtype = dtype
    for key, weight in model.named_parameters():
        if weight.dtype == stored:
            widen_later(weight)
            if key in missing:
                widen_now(weight)
    return model, missing


def _to_load_in(name: str, dtype: torch.dtype, options: dict[str, Any]) -> torch.dtype:
    quantized = "quantization_config" in options or "quantization_config" in read_config(name)
    if dtype != torch.float32 or not will_be_sharded() or quantized:
        return dtype
    stored = stored_dtype(name)
    return stored if stored in (torch.bfloat16, torch.float16) else dtype
