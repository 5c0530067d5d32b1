"""What a class takes: its own arguments, and those that it hands on to its bases by `**kwargs`."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any, get_type_hints

SET_BY_ITSELF = {
    "PromptDataModule": {"max_length", "response_room", "minimum_response_length", "batch_size"},
}
"""Arguments of a base that a class does not hand on."""


def parameters(taker: Any) -> dict[str, inspect.Parameter]:
    """Every argument of a class or function, by name."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, inspect.Parameter] = {}
    for owner in _owners(taker):
        given = inspect.signature(owner).parameters
        found = {name: p for name, p in given.items() if p.kind not in kinds} | found
    return {name: p for name, p in found.items() if name not in SET_BY_ITSELF.get(taker.__name__, ())}


def hints(taker: Any) -> dict[str, Any]:
    """The annotations of these arguments."""
    found: dict[str, Any] = {}
    for owner in _owners(taker):
        has_init = isinstance(owner, type) and not is_dataclass(owner)
        found = get_type_hints(owner.__init__ if has_init else owner) | found
    return found


def _owners(taker: Any) -> list[Any]:
    """The function, or the class and those of our bases that take what it hands on."""
    if not isinstance(taker, type):
        return [taker]
    owners = []
    for owner in (cls for cls in taker.__mro__ if "__init__" in vars(cls)):
        if owners and not owner.__module__.startswith("rlhf_lightning"):
            break
        owners.append(owner)
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(owner).parameters.values()):
            break
    return owners
