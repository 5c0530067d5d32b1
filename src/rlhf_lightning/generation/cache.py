"""Keys and values of a batch that is being answered, in buffers allocated once, and the attention of its new tokens.

transformers' dynamic cache is copied whole for every token. Here a token writes its own column. Prompts enter in groups
of similar length, and rows whose response has ended can leave.

In the attention of one new token per row, heads that share a key become positions of one head, so that keys and values
are read as they lie and not copied for each head. With prompts of different lengths most of a left-padded cache is
padding, which a mask hides but the kernel reads. Rows are sorted by length, so a few rows at a time need the same,
shorter range of columns. Exact: only columns that the mask hides from all of them are left out. For CPUs; elsewhere
more calls cost more than shorter ranges save.

Notation: N rows of the batch, n of them that are left, P width of the longest prompt, C columns of the buffers, T of
them that a token sees, H heads that share K key heads of D numbers, Q new tokens of each row; column c of the cache is
the token at place c when all prompts are padded on the left to P.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.compat import UNUSUAL_ARGUMENTS, attention_function, sdpa_attention_forward, sdpa_mask

BY_ROWS, FULL_CACHE = "rlhf_lightning_by_rows", "rlhf_lightning_full_cache"
"""What transformers' configs call the attention to the cache while it is in use."""

ROWS_PER_GROUP = 8
"""Rows of similar length that share a range of columns."""


@dataclass
class _Place:
    """Where in the buffers the model is now; one for all layers.

    Attributes:
        rows: the rows that the model sees.
        first: the first column that it sees, for some row needs it; the mask that it gets begins there.
        past: the column that it writes next.
        prefilling: it reads its prompts and sees nothing of the buffers.
        lengths: of the prompts that it reads as one row, without padding; None if they are rows of a batch.
        column: the same as `past`, `[1]`, int64, where all rows and columns are seen; None where only those needed are.
    """

    rows: slice
    first: int
    past: int
    prefilling: bool = True
    lengths: list[int] | None = None
    column: Tensor | None = None


class _Layer(DynamicLayer):
    """One layer's buffers, `[N, K, C, D]`."""

    def __init__(self, place: _Place, capacity: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place
        self.num_rows = place.rows.stop
        self.capacity = capacity
        self.window = window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, in the shape of the first states; transformers calls it so."""
        # Zeros, since what a mask hides must still be finite.
        self.keys, self.values = (
            states.new_zeros(self.num_rows, states.shape[1], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens, `[N, heads, t, D]`, and return those of all tokens that are seen."""
        key_states, value_states = as_multiplied(key_states), as_multiplied(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.place.column is not None:
            return self._write_column(key_states, value_states, self.place.column)
        place, width = self.place, key_states.shape[2]
        if place.lengths is not None:
            self._take_apart(key_states, value_states, place.lengths)
            return key_states, value_states
        end = place.past + width
        seen = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            buffer[place.rows, :, place.past : end] = states  # [rows, K, width, D]
            seen.append(states if place.prefilling else buffer[place.rows, :, self._start(width) : end])
        return seen[0], seen[1]

    def _write_column(self, key_states: Tensor, value_states: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        # Compiled, so only tensors may differ from token to token.
        assert self.keys is not None
        assert self.values is not None
        return self.keys.index_copy_(2, column, key_states), self.values.index_copy_(2, column, value_states)

    def _take_apart(self, key_states: Tensor, value_states: Tensor, lengths: list[int]) -> None:
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            for row, prompt in enumerate(states[0].split(lengths, dim=1), self.place.rows.start):  # [K, length, D]
                buffer[row, :, self.place.past - prompt.shape[1] : self.place.past] = prompt

    def _start(self, width: int) -> int:
        oldest = self.place.past + width - self.window if self.window is not None else 0
        return max(self.place.first, oldest)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.place.column is not None:
            return self.capacity, 0
        if self.place.prefilling:
            return query_length, 0
        start = self._start(query_length)
        return self.place.past + query_length - start, start - self.place.first

    def get_seq_length(self) -> Any:
        if self.place.column is not None:
            return self.place.column[0]
        return 0 if self.place.prefilling else self.place.past - self.place.first

    def keep(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        for buffer in (self.keys, self.values):
            assert buffer is not None
            columns = slice(self.place.first, self.place.past)
            buffer[: len(rows), :, columns] = buffer[:, :, columns].index_select(0, rows)  # [n, K, columns, D]


def as_multiplied(states: Tensor) -> Tensor:
    """Keys or values in the type that attention multiplies them in.

    Under autocast rotary positions leave float32 keys beside bfloat16 values, and attention would cast those of all
    tokens anew for each further one; cast when they are written they are the same.

    Args:
        states: any shape.
    """
    kind = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return states.to(torch.get_autocast_dtype(kind))
    return states


class RolloutCache(Cache):
    """A cache for one batch of prompts and their responses.

    First `prefill` (or `prefill_row`) names a group of rows before the model reads their prompts; when all are read,
    `decode` opens the batch. After each further token comes `advance`.

    Attributes:
        groups: rows of similar length, each with the first visible column that one of them needs; none before `decode`.
        windows: for each layer, how far back it sees, None for all the way.

    Args:
        windows: for each layer, how far back it sees, None for all the way.
        num_rows: N.
        width: P.
        capacity: columns in all.
    """

    def __init__(self, windows: list[int | None], num_rows: int, width: int, capacity: int) -> None:
        self.place = _Place(slice(0, num_rows), 0, 0)
        self.width, self.windows = width, windows
        self.groups: list[tuple[slice, int]] = []
        self.buffers = [_Layer(self.place, capacity, window) for window in windows]
        super().__init__(layers=[*self.buffers])

    def restart(self, num_rows: int, width: int) -> None:
        """Another batch, in the same buffers; they keep what is in them.

        Args:
            num_rows: of the batch, not more than there were at first.
            width: P.
        """
        self.place.rows, self.place.first, self.place.past = slice(0, num_rows), 0, 0
        self.place.prefilling, self.place.lengths = True, None
        self.width, self.groups = width, []

    @contextmanager
    def written_at(self, column: Tensor) -> Iterator[None]:
        """Let the model see all rows and columns, and write at a column that is named by a tensor.

        Args:
            column: the column that `past` names too, `[1]`, int64.
        """
        self.place.column = column
        try:
            yield
        finally:
            self.place.column = None

    def prefill(self, rows: slice, width: int) -> None:
        """The model is about to read the prompts of some rows, padded to this width."""
        self.place.rows, self.place.past = rows, self.width - width

    def prefill_row(self, rows: slice, lengths: list[int]) -> None:
        """The model is about to read the prompts of some rows one after the other, as one row without padding."""
        self.place.rows, self.place.past, self.place.lengths = rows, self.width, lengths

    def decode(self, widths: list[int]) -> None:
        """The model is about to continue all rows.

        Args:
            widths: of each row's prompt, descending.
        """
        self.place.rows, self.place.past = slice(0, len(widths)), self.width
        self.place.prefilling, self.place.lengths = False, None
        self._group(widths)

    def advance(self) -> None:
        """The model has read one token of each row."""
        self.place.past += 1

    def keep(self, rows: Tensor, widths: list[int]) -> None:
        """Only some rows go on.

        Args:
            rows: their indices, ascending, `[n]`, int64.
            widths: of each one's prompt, descending.
        """
        for layer in self.buffers:
            layer.keep(rows)
        self.place.rows = slice(0, len(widths))
        self._group(widths)

    def _group(self, widths: list[int]) -> None:
        self.place.first = self.width - widths[0]
        starts = range(0, len(widths), ROWS_PER_GROUP)
        self.groups = [(slice(row, row + ROWS_PER_GROUP), widths[0] - widths[row]) for row in starts]

    @property
    def visible(self) -> int:
        """Columns that the model sees while it reads a token, the token's own included."""
        return self.place.past + 1 - self.place.first


def rollout_cache(config: PretrainedConfig, num_rows: int, width: int, capacity: int) -> RolloutCache | None:
    """A cache that fits a model; None where some layer keeps more than keys and values.

    Args:
        config: the model's.
        num_rows: rows of the batch.
        width: of the longest prompt.
        capacity: columns in all.
    """
    if "chunked_attention" in (getattr(config.get_text_config(decoder=True), "layer_types", None) or []):
        return None
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return None
        windows.append(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
    return RolloutCache(windows, num_rows, width, capacity)


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
    with attention_function(model, BY_ROWS, partial(_attend, cache), sdpa_mask):
        yield


@contextmanager
def attention_to_full_cache(model: PreTrainedModel) -> Iterator[None]:
    """Let each new token attend to all columns of a cache for the length of a `with` block, on any device.

    Args:
        model: a language model that is given its mask, `[N, 1, 1, T]`, bool.
    """
    with attention_function(model, FULL_CACHE, _attend_full, sdpa_mask):
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
