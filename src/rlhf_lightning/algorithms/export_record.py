"""What the export of a model needs to know of its run besides weights and settings: part of each checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.models.rendering import rendering_of
from rlhf_lightning.models.rewarding import shared_scalar
from rlhf_lightning.models.scalar_lm import ScalarLM

FROZEN = "frozen_dtype"
"""Type of the frozen weights, which no checkpoint holds."""
OTHERS = "other_dtypes"
"""Types of those frozen weights that have another one, by name."""
VALUE = "value"
"""The same types of a value model, and what it began as."""
BEGAN_AS, BESIDE = "began_as", "beside"
"""Of a value model: the role of a model that the stage begins with; whether that is an adapter on the policy's base."""
TEMPLATE, RENDERING = "chat_template", "rendering"


def export_record(module: Any) -> dict[str, Any]:
    """How dialogues were written, and in which precision what is frozen was held; plain values.

    Args:
        module: a stage, its models loaded.
    """
    found = getattr(module.datamodule, "chat", None)
    chat = found if isinstance(found, ChatEncoder) else None
    value = getattr(module, "value", None)
    return {
        TEMPLATE: (module if chat is None else chat).tokenizer.chat_template,
        RENDERING: None if chat is None else rendering_of(chat),
        **_frozen_dtypes(module.export_model),
        **({VALUE: _value_record(module, value)} if isinstance(value, ScalarLM) else {}),
    }


def _frozen_dtypes(model: nn.Module) -> dict[str, Any]:
    weights = model.named_parameters()
    dtypes = {name: str(p.dtype).partition(".")[2] for name, p in weights if not p.requires_grad}
    usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
    return {FROZEN: usual, OTHERS: {name: dtype for name, dtype in dtypes.items() if dtype != usual}}


def _value_record(module: Any, value: ScalarLM) -> dict[str, Any]:
    beside = "default" in getattr(value.model, "peft_config", {})  # where the reward model's own adapter is trained
    began_as = "value" if "value" in module.parents else "reward" if shared_scalar(module.scorer) or beside else "model"
    return {BEGAN_AS: began_as, BESIDE: beside, **_frozen_dtypes(value.model)}
