"""How many tokens go through a model at once, where nobody says.

On a CPU a few hundred tokens keep the matrix products busy, and more only cost memory. A GPU wants thousands, as far as
what autograd keeps of them fits beside the weights. The number follows the device and the model, not what happens to be
free, so that a resumed run cuts its batches as before.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.training.sharded import full_shape, shards_weights

CPU_TOKENS = 512
FEWEST, MOST = 1024, 16384
"""On a GPU."""

_USED = 0.9
_FOR_ACTIVATIONS = 0.5
"""Of what weights and optimizer leave of that: logits, casts, and fragments between tensors come on top."""

_TRAINED_BYTES = 16
"""Of a number that is trained, with its gradient, AdamW's state and, in half precision, its float32 copy."""


def token_budget(
    module: nn.Module,
    device_type: str,
    memory: int,
    *,
    sequences: int = 1,
    share: float = 1.0,
    checkpointing: bool = False,
) -> int:
    """Tokens of a forward and backward pass, a power of two.

    Args:
        module: holds all models.
        device_type: such as `cuda`.
        memory: bytes of the device; 0 where that is not known.
        sequences: of an example; a pair has two.
        share: of all weights that lie on this process.
        checkpointing: of each block only the input is kept for the backward pass.
    """
    if device_type == "cpu":
        return CPU_TOKENS * sequences
    held = share * sum(map(_bytes_held, module.parameters()))
    room = _FOR_ACTIVATIONS * (_USED * memory - held)
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    tokens = int(room / max(_bytes_per_token(model, checkpointing) for model in models)) if models else 0
    return min(max(1 << max(tokens, 1).bit_length() - 1, FEWEST), MOST)


def budget_of(module: pl.LightningModule, **options: Any) -> int:
    """`token_budget` of a run.

    Args:
        module: its models loaded, on their device, attached to a trainer.
        **options: `sequences` and `checkpointing`.
    """
    device = module.device
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    share = 1 / module.trainer.world_size if shards_weights(module.trainer) else 1.0
    return token_budget(module, device.type, memory, share=share, **options)


def _bytes_held(weight: nn.Parameter) -> int:
    return full_shape(weight).numel() * (_TRAINED_BYTES if weight.requires_grad else weight.element_size())


def _bytes_per_token(model: PreTrainedModel, checkpointing: bool) -> float:
    """What autograd keeps of a token, about.

    In half precision some 24 bytes for each number of a hidden state and 8 for each of the feed-forward layer, in each
    block (as in Korthikanti et al. 2022, section 4.1, whose layer has no gate and whose attention keeps its products),
    and a quarter more where the residual stream is in float32: a Llama of 0.5B in bf16-mixed was seen at 1.8 MB.
    """
    config: Any = model.config.get_text_config()
    hidden, depth = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    each = 24 * hidden + 8 * (inner if isinstance(inner, int) else max(inner))
    if checkpointing:
        return float(4 * hidden * depth + 2 * each)
    return (1.25 if model.dtype == torch.float32 else 1.0) * each * depth
