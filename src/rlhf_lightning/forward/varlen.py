"""Attention of many sequences in one row, all in one call, where a GPU has a kernel for it.

A padded batch gives attention a mask of `[B, 1, T, T]`, which the fast kernels do not take. Here the real tokens stand
one after the other, and the kernel is told where each run of them begins. Rows that share a beginning are runs, too:
the beginning is one, and each rest is one whose keys are those of the beginning and its own.

Notation: N real tokens of all rows, S runs, K keys of all runs, H heads of d numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import UNUSUAL_ARGUMENTS, varlen_attention
from rlhf_lightning.forward.numerics import say_once
from rlhf_lightning.host import to_device

_TYPES = (torch.bfloat16, torch.float16)
_FARTHEST = 0.03
"""Of the largest number; bfloat16 has 8 bits, and a wrong key or a wrong border is of order 1."""


class Runs(NamedTuple):
    """Which keys each token of a row of rows attends to: those of its run, up to its own.

    Attributes:
        query_starts: where each run begins among the tokens, N at the end, `[S + 1]`, int32.
        key_starts: where each run's keys begin among all keys, K at the end, `[S + 1]`, int32.
        keys: places of the keys among the tokens, `[K]`, int64; None where they are the tokens, in their order.
        most_queries: of the longest run.
        most_keys: of the run with most.
    """

    query_starts: Tensor
    key_starts: Tensor
    keys: Tensor | None
    most_queries: int
    most_keys: int


def runs_of(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Runs:
    """Runs of rows that stand one after the other.

    Args:
        rows: of each row the tokens of its beginning, then those of each rest that goes on from it; one number where
            nothing is shared.
        device: where they are needed.

    Example:
        >>> runs = runs_of([[2, 1, 2]])  # two tokens, from which one goes on by one and one by two
        >>> runs.query_starts.tolist(), runs.key_starts.tolist(), runs.keys.tolist()
        ([0, 2, 3, 5], [0, 2, 5, 9], [0, 1, 0, 1, 2, 0, 1, 3, 4])
    """
    queries, counts, parts, start = [], [], [], 0
    for first, *rests in rows:
        beginning = torch.arange(start, start + first)
        for place, length in enumerate((first, *rests)):
            if length:
                parts += [beginning, torch.arange(start, start + length)] if place else [beginning]
                queries.append(length)
                counts.append(first + length if place else first)
            start += length
    keys = to_device(torch.cat(parts), device) if any(len(row) > 1 for row in rows) else None
    return Runs(_starts(queries, device), _starts(counts, device), keys, max(queries), max(counts))


def _starts(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)  # [S + 1]


def attend(
    runs: Runs,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        runs: of the row.
        module: not looked at.
        query: `[1, H, N, d]`.
        key: `[1, key heads, N, d]`.
        value: as the key.
        attention_mask: None.
        scaling: of the products; 1 / sqrt(d) if None.
        dropout: of the weights; with it, and in float32, each run is computed by itself.
        **kwargs: what the model's family gives its attention besides.

    Returns:
        `[1, N, H, d]`, and None for the weights.

    Raises:
        NotImplementedError: the family asks for attention of another kind.
    """
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNUSUAL_ARGUMENTS):
        raise NotImplementedError("attention of another kind")
    dtype = computing_type(query.device, query.dtype)
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))  # [N, heads, d] each
    if runs.keys is not None:
        k, v = k.index_select(0, runs.keys), v.index_select(0, runs.keys)  # [K, key heads, d]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Layers may differ, and a family's keys and values too: what the kernel has not been tried with goes run by run.
    tried = dtype in _TYPES and q.shape[2] == v.shape[2] and kernel_is_right(q.device, dtype, *_sizes(q, k))
    if dropout or not tried:
        reason = "attention dropout" if dropout else f"queries of {q.shape[2]} and values of {v.shape[2]} in {dtype}"
        say_once(f"attention goes sequence by sequence, which is slow on a GPU: its kernel does not take {reason}")
        return attend_by_runs(runs, q, k, v, scaling, dropout)[None], None
    return _by_kernel(runs, q.contiguous(), k.contiguous(), v.contiguous(), scaling)[None], None


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int]:
    return query.shape[1], key.shape[1], query.shape[2]


def _by_kernel(runs: Runs, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    borders = runs.query_starts, runs.key_starts, runs.most_queries, runs.most_keys
    return varlen_attention(query, key, value, *borders, scaling)


def attend_by_runs(
    runs: Runs, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """As the kernel, one run after the other: what the kernel is compared with, and for what it does not take.

    Args:
        runs: of the row.
        query: `[N, H, d]`.
        key: `[K, key heads, d]`.
        value: as the key.
        scaling: of the products.
        dropout: of the weights.

    Returns:
        `[N, H, d]`.
    """
    queries, counts = (starts.diff().tolist() for starts in (runs.query_starts, runs.key_starts))
    done = []
    for q, k, v in zip(query.split(queries), key.split(counts), value.split(counts), strict=True):
        sees = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # [1, heads, length, d] each
        one = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=sees,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        done.append(one[0].transpose(0, 1))
    return torch.cat(done)


def computing_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What attention computes in: autocast's type, where it is on.

    Args:
        device: of the tensors.
        dtype: of the tensors.
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def has_kernel(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a model's rows can be attended to in one call; asked without waiting for the device but the first time.

    Args:
        model: a language model or a scalar model. One that has no heads has no attention of this kind.
        device: where its batch lies.
    """
    config = model.config.get_text_config()
    heads, dtype = getattr(config, "num_attention_heads", None), computing_type(device, model.dtype)
    if device.type != "cuda" or dtype not in _TYPES or not isinstance(heads, int):
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    right = kernel_is_right(device, dtype, heads, getattr(config, "num_key_value_heads", None) or heads, width)
    if not right:
        say_once(
            f"{type(model).__name__} computes the padding of its batches, too: torch {torch.__version__} has no "
            f"varlen_attn for heads of {width} in {dtype} on this GPU"
        )
    return right


@lru_cache
@torch.autocast("cuda", enabled=False)
@torch.inference_mode(False)  # Lightning validates in it before it trains
@torch.enable_grad()
def kernel_is_right(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> bool:
    """Whether there is a kernel that computes what `attend_by_runs` does, forwards and backwards; tried once.

    Args:
        device: a GPU.
        dtype: bfloat16 or float16.
        heads: H.
        key_heads: of keys and values.
        width: d.
    """
    runs = runs_of([[3], [5, 2, 4], [70]], device)
    assert runs.keys is not None
    source = torch.Generator(device).manual_seed(0)
    shapes = ((84, heads, width), (len(runs.keys), key_heads, width), (len(runs.keys), key_heads, width))
    made = [torch.randn(shape, device=device, dtype=dtype, generator=source) for shape in shapes]

    def results(rows: list[Tensor], way: Callable[..., Tensor]) -> list[Tensor]:
        rows = [tensor.detach().requires_grad_() for tensor in rows]
        out = way(runs, *rows, width**-0.5)
        return [out, *torch.autograd.grad(out.float().square().sum(), rows)]

    try:
        found = results(made, _by_kernel)
    except (ImportError, NotImplementedError, RuntimeError):
        return False
    expected = results([tensor.float() for tensor in made], attend_by_runs)
    far = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    return max(far) <= _FARTHEST
