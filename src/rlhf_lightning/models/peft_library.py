"""PEFT, kept from importing bitsandbytes where nothing is held in four bits.

PEFT imports bitsandbytes as soon as it is installed: seconds at every start, and on some processors a line on stderr.
Layers that PEFT has to ask it about exist only once bitsandbytes has been imported by whoever made them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Inside the `with` block PEFT finds bitsandbytes only if it has been imported already."""
    if sys.modules.get("bitsandbytes") is not None:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["bitsandbytes"] = None  # an import of it fails
    _forget()
    try:
        yield
    finally:
        del modules["bitsandbytes"]
        _forget()


def _forget() -> None:
    """What PEFT has found out about bitsandbytes, and remembers."""
    if finders := sys.modules.get("peft.import_utils"):
        finders.is_bnb_available.cache_clear()
        finders.is_bnb_4bit_available.cache_clear()


with without_bitsandbytes():
    import peft
    from peft import LoraConfig, PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

inject_adapter_in_model = without_bitsandbytes()(peft.inject_adapter_in_model)

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "ParamWrapper",
    "PeftConfig",
    "PeftModel",
    "cast_adapter_dtype",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "set_peft_model_state_dict",
    "without_bitsandbytes",
]
