"""Columns of prepared data from numbers and back, by their buffers.

pyarrow's own `array` and `to_numpy` first spend most of a second of every start on importing pandas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def list_array(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of lists of ids, int32, from one array for each row."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows).astype(np.int32, copy=False)
    return pa.ListArray.from_arrays(number_array(offsets), number_array(values))


def float_list_array(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of lists of numbers, float32, from one array for each row."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows).astype(np.float32, copy=False)
    return pa.ListArray.from_arrays(number_array(offsets), number_array(values))


def number_array(numbers: np.ndarray) -> pa.Array:
    """A column without nulls that shares its memory with `numbers`, which must not change from then on."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, pa.py_buffer(numbers)])


def text_array(texts: Sequence[str | None]) -> pa.LargeStringArray:
    """A column of texts, with nulls where there is none."""
    there = np.packbits([text is not None for text in texts], bitorder="little")
    encoded = [(text or "").encode() for text in texts]
    offsets = np.cumsum([0, *(len(text) for text in encoded)], dtype=np.int64)
    buffers = [pa.py_buffer(there), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(texts), buffers)


def list_views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists of ids, without a copy."""
    return view(column.offsets, np.int32), view(column.values, np.int32)


def view(column: pa.Array, kind: Any) -> np.ndarray:
    """Numbers of a column without nulls, without a copy; `kind` is the type that they have."""
    _, numbers = column.buffers()
    if len(column) == 0:
        return np.zeros(0, kind)
    return np.frombuffer(numbers, kind, len(column), column.offset * np.dtype(kind).itemsize)
