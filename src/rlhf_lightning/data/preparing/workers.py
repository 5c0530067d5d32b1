"""Chunks of rows to ids in order: here, or by worker processes where there is enough text for them to pay."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import TypeVar

from rlhf_lightning.chat.messages import exact_text
from rlhf_lightning.data.encode import EncodedRow, Encoder
from rlhf_lightning.data.rows import Row

WORTH_WORKERS = 15_000_000
"""Characters that must be left for workers to start. One takes 3 seconds of a core for its imports, in which a core
tokenises 5 million characters (measured on one core of a shared machine with a small BPE tokenizer)."""

Chunk = TypeVar("Chunk")
Encoded = list[EncodedRow | str]


def encode_chunks(
    chunks: Iterator[Chunk],
    rows_of: Callable[[Chunk], list[Row]],
    encoder: Encoder,
    num_proc: int,
    total_rows: int | None = None,
) -> Iterator[tuple[Chunk, Callable[[], Encoded]]]:
    """Chunks in order, each with what gives its ids.

    Args:
        chunks: of rows, the first no smaller than the others.
        rows_of: the rows of a chunk that are to be tokenised.
        encoder: turns them into ids; every process has its own copy.
        num_proc: processes that tokenise at the most; the result does not depend on it.
        total_rows: how many rows there are in all chunks; the first chunk says how long they are.
    """
    if num_proc > 1 and total_rows is not None and (first := next(chunks, None)) is not None:
        rows = rows_of(first)
        yield first, partial(encoder.encode, rows)
        left = (total_rows - len(rows)) * sum(map(_characters, rows)) / max(1, len(rows))
        if left >= WORTH_WORKERS:
            yield from _by_workers(chunks, rows_of, encoder, num_proc)
    for chunk in chunks:
        yield chunk, partial(encoder.encode, rows_of(chunk))


def _characters(row: Row) -> int:
    return len(exact_text(row.prompt)) + sum(len(exact_text(response)) for response in row.responses)


def _by_workers(
    chunks: Iterator[Chunk], rows_of: Callable[[Chunk], list[Row]], encoder: Encoder, num_proc: int
) -> Iterator[tuple[Chunk, Callable[[], Encoded]]]:
    # Fresh processes: a forked one would inherit the locks of the tokenizer's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, context, _start_worker, (encoder,))
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            with _script_hidden():
                waiting.append((chunk, pool.submit(_encode_here, rows_of(chunk))))
            if len(waiting) > 2 * num_proc:
                chunk, future = waiting.popleft()
                yield chunk, future.result
        while waiting:
            chunk, future = waiting.popleft()
            yield chunk, future.result
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _script_hidden() -> Iterator[None]:
    """While this lasts new processes do not import the script that runs here, which need not bear being run twice."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_worker: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = encoder
    # A worker whose parent is killed would wait for work for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_here(rows: list[Row]) -> Encoded:
    assert _worker is not None
    return _worker.encode(rows)
