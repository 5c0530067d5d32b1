"""Attention of one new token per row.

Heads that share a key become positions of one head, so that keys and values are read as they lie and not copied for
each head.

With prompts of different lengths most of a left-padded cache is padding, which a mask hides but the kernel reads. Rows
are sorted by length, so a few rows at a time need the same, shorter range of columns. Exact: only columns that the mask
hides from all of them are left out. For CPUs; elsewhere more calls cost more than shorter ranges save.

Notation: N rows, Q new tokens of each, T columns of the cache, H heads that share K keys, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import UNUSUAL_ARGUMENTS, attention_function, sdpa_attention_forward, sdpa_mask
from rlhf_lightning.generation.cache import RolloutCache

NAME, NAME_FULL = "rlhf_lightning_by_rows", "rlhf_lightning_full_cache"
"""What transformers' configs call them while they are in use."""


@contextmanager
def attention_by_rows(model: PreTrainedModel, cache: RolloutCache | None) -> Iterator[None]:
    """Use it for the length of a `with` block, where the model runs on a CPU and takes attention functions.

    Args:
        model: a language model; elsewhere nothing changes.
        cache: tells which rows need which columns.
    """
    if cache is None or model.device.type != "cpu":
        yield
        return
    with attention_function(model, NAME, partial(_attend, cache), sdpa_mask):
        yield


@contextmanager
def attention_to_full_cache(model: PreTrainedModel) -> Iterator[None]:
    """Let each new token attend to all columns of a cache for the length of a `with` block, on any device.

    Args:
        model: a language model that is given its mask, `[N, 1, 1, T]`, bool.
    """
    with attention_function(model, NAME_FULL, _attend_full, sdpa_mask):
        yield


def _attend_full(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query `[N, H, 1, D]`, key and value `[N, K, T, D]`."""
    if query.shape[2] > 1 or any(kwargs.get(name) is not None for name in UNUSUAL_ARGUMENTS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, size = query.shape
    query = query.reshape(batch, key.shape[1], -1, size)  # [N, K, H / K, D]
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(batch, 1, heads, value.shape[3]), None  # [N, 1, H, D]


def _attend(
    cache: RolloutCache,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query `[N, H, Q, D]`, key and value `[N, K, T, D]`."""
    batch, heads, length, size = query.shape
    full_range = key.shape[2] == cache.visible and attention_mask is not None and attention_mask.shape[1] == 1
    if (
        length > 1
        or not cache.groups
        or not full_range
        or any(kwargs.get(name) is not None for name in UNUSUAL_ARGUMENTS)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    query = query.reshape(batch, key.shape[1], -1, size)  # [N, K, H / K, D]
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            query[rows],
            key[rows, :, start:],
            value[rows, :, start:],
            attn_mask=attention_mask[rows, :, :, start:],
            scale=kwargs.get("scaling"),
        )
        for rows, start in cache.groups
    ]
    return torch.cat(pieces).reshape(batch, 1, heads, value.shape[3]), None  # [N, 1, H, D]
