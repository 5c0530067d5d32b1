"""Files as a bad disk, a broken transfer or an enemy leaves them, drawn by hypothesis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NESTED = 20_000  # brackets
WRONG = st.sampled_from(
    [None, True, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "../../x", [], {}, [[]], {"x": {}}]
)
"""Values in the place of others; Python writes and reads NaN in JSON."""

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
"""Anything that JSON and YAML can say."""


def damage(draw: Callable[[Any], Any], path: Path) -> str:
    """Spoil one file, and say how.

    Args:
        draw: of hypothesis.
        path: is there.
    """
    kinds = ["cut", "flip", "noise", "empty", "longer", "header", "nested", "zeros"]
    kinds += ["wrong", "wrong", "lacking"] if path.suffix == ".json" else []
    kind = draw(st.sampled_from(kinds))
    content = path.read_bytes()
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        content = content[:place]
    elif kind == "flip":
        for bit in draw(st.lists(st.integers(0, max(8 * len(content) - 1, 0)), min_size=1, max_size=8)):
            content = flipped(content, bit)
    elif kind == "noise":
        content = content[:place] + draw(st.binary(min_size=1, max_size=200)) + content[place + 100 :]
    elif kind == "empty":
        content = b""
    elif kind == "longer":
        content += draw(st.binary(min_size=1, max_size=200))
    elif kind == "header":
        content = draw(st.sampled_from([b"\xff" * 8, b"\xff" * 4 + bytes(4), bytes(8)])) + content[8:]
    elif kind == "nested":
        opening = draw(st.sampled_from([b"[", b'{"a":', b'[{"a":']))
        content = opening * NESTED if draw(st.booleans()) else content[:place] + opening * NESTED + content[place:]
    elif kind == "zeros":
        content = content[:place] + bytes(min(len(content) - place, 512)) + content[place + 512 :]
    else:
        content = _other_json(draw, content, lacking=kind == "lacking")
    path.write_bytes(content)
    return kind


def flipped(content: bytes, bit: int) -> bytes:
    """Bytes with one bit the other way around."""
    changed = bytearray(content)
    if changed:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _other_json(draw: Callable[[Any], Any], content: bytes, lacking: bool) -> bytes:
    """JSON in which one value is another, or is not there."""
    value = json.loads(content)
    places = [*_places(value)]
    if not places:
        return content
    holder, key = draw(st.sampled_from(places))
    if lacking:
        del holder[key]
    else:
        holder[key] = draw(WRONG | values)
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place where a value stands in another, with keys as deep as people look."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in [*items][:40]:
        yield value, key
        yield from _places(inner)


@contextmanager
def bounded(seconds: float, gigabytes: float) -> Iterator[None]:
    """End what takes forever, or all memory, by an error that is none of ours.

    Args:
        seconds: at most.
        gigabytes: more than the process has already.
    """
    import resource
    import signal

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(gigabytes * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
