"""How much memory DeepSpeed takes besides weights, gradients and optimizer: its buffers, made to fit the model.

Its defaults are for models of many billions of weights. Of one of 60 million, on ZeRO-3, the bucket of gradients had
room for 200 million, all weights that were gathered once stayed so (up to a billion), and a step copied all gradients
at once: each of two processes held more than one does without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

SHARE = 32
"""A buffer holds one of so many parts of the model."""

GATHERED = 8
"""While it computes, a process of ZeRO-3 holds one of so many parts of the weights whole."""

LEAST = 1 << 18
"""Numbers that a buffer has room for at the least."""
_MOST = {
    "reduce_bucket_size": 200_000_000,
    "allgather_bucket_size": 200_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
"""Sizes in elements: the defaults of Lightning or, in the last four, of DeepSpeed."""


def fitted_sizes(given: dict[str, Any], weights: Iterable[Tensor], processes: int) -> dict[str, int]:
    """Sizes of DeepSpeed's buffers for a model, in elements.

    Args:
        given: of `zero_optimization`, what the user has chosen; that is left as it is.
        weights: of all models, frozen or not.
        processes: that share them.

    Returns:
        What is to be set in `zero_optimization`.
    """
    total = sum(int(getattr(weight, "ds_numel", weight.numel())) for weight in weights)
    sizes = {name: max(LEAST, min(most, total // SHARE)) for name, most in _MOST.items()}
    # Room to gather the next layers while these compute: with less, processors wait for each other.
    sizes["stage3_max_live_parameters"] = max(LEAST, min(_MOST["stage3_max_live_parameters"], total // GATHERED))
    sizes["stage3_max_reuse_distance"] = min(_MOST["stage3_max_reuse_distance"], total // SHARE)
    sizes["stage3_model_persistence_threshold"] = max(LEAST, total // SHARE)  # small weights, never cut
    sizes["sub_group_size"] = max(LEAST, min(_MOST["sub_group_size"], total // processes // SHARE))
    return {name: size for name, size in sizes.items() if name not in given}


def share_master_weights(engine: Any) -> None:
    """Let the optimizer of ZeRO-3 step float32 weights themselves, and not a copy of them that has the same type.

    DeepSpeed means to: it compares `torch.device("cpu")` to `"cpu"`, which are not equal.

    Args:
        engine: after its initialisation.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_partitioned_groups_flat") or optimizer.offload_optimizer:
        return
    pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
    for master, weight in pairs:
        if weight is not None and (weight.dtype, weight.device) == (master.dtype, master.device):
            master.data = weight.data
