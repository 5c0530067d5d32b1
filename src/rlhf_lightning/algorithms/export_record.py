"""What the export of a model needs to know of its run besides weights and settings: part of each checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.models.rendering import rendering_of

FROZEN = "frozen_dtype"
"""Type of the frozen weights, which no checkpoint holds."""
OTHERS = "other_dtypes"
"""Types of those frozen weights that have another one, by name."""
TEMPLATE, RENDERING = "chat_template", "rendering"


def export_record(module: Any) -> dict[str, Any]:
    """How dialogues were written, and in which precision what is frozen was held; plain values.

    Args:
        module: a stage, its models loaded.
    """
    found = getattr(module.datamodule, "chat", None)
    chat = found if isinstance(found, ChatEncoder) else None
    weights = module.export_model.named_parameters()
    dtypes = {name: str(p.dtype).partition(".")[2] for name, p in weights if not p.requires_grad}
    usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
    return {
        TEMPLATE: (module if chat is None else chat).tokenizer.chat_template,
        RENDERING: None if chat is None else rendering_of(chat),
        FROZEN: usual,
        OTHERS: {name: dtype for name, dtype in dtypes.items() if dtype != usual},
    }
