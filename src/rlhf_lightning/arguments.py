"""Arguments of public classes, checked against their annotations: the one place where a wrong word or number is caught.

The command line parses by the same annotations, but Python does not: without this `loss="last_tokn"` would be whatever
the last branch of an `if` does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class Range:
    """Which numbers an argument may be; never NaN or infinite.

    Args:
        at_least: the smallest number.
        above: a bound below all numbers.
        at_most: the largest number.
        below: a bound above all numbers.

    Example:
        >>> str(Range(above=0, at_most=1)), Range(above=0, at_most=1).holds(0)
        ('above 0 and at most 1', False)
        >>> str(Range())
        'finite'
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        """Whether a number lies inside."""
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None) or "finite"


NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
AT_LEAST_1 = Range(at_least=1)
SHARE = Range(at_least=0, at_most=1)
SHARE_BELOW_1 = Range(at_least=0, below=1)


def check_arguments(
    taker: Callable[..., Any],
    arguments: Mapping[str, Any],
    ranges: Mapping[str, Range] = MappingProxyType({}),
    prefix: str = "",
) -> None:
    """Refuse words that a `Literal` does not have, numbers outside their range, and values of another kind.

    Looked at are arguments annotated with a `Literal`, `int`, `float`, `bool`, a dataclass, or lists, dicts and unions
    of those; whatever else is annotated passes. A number is at least 0 unless `ranges` says otherwise.

    Args:
        taker: the class or function whose annotations count.
        arguments: name to value, such as `locals()` as the first thing in a constructor; what `taker` has no annotation
            for passes.
        ranges: what numbers may be, by the argument's name; names that `taker` does not have are passed over.
        prefix: stands before each name in messages.

    Raises:
        UserError: names the first bad argument, its value, and what is allowed.

    Example:
        >>> def train(loss: Literal["last_token", "average"], steps: int = 1): ...
        >>> check_arguments(train, {"loss": "last_tokn", "steps": 1})
        Traceback (most recent call last):
        rlhf_lightning.errors.UserError: loss 'last_tokn' is unknown; did you mean last_token? use last_token or average
        >>> check_arguments(train, {"loss": "average", "steps": 0}, {"steps": AT_LEAST_1})
        Traceback (most recent call last):
        rlhf_lightning.errors.UserError: steps (0) must be at least 1
    """
    has_init = isinstance(taker, type) and not is_dataclass(taker)
    annotations = get_type_hints(taker.__init__ if has_init else taker)
    for name, annotation in annotations.items():
        if name in arguments and (fault := _fault(arguments[name], annotation, ranges.get(name, NOT_NEGATIVE))):
            raise UserError(f"{prefix}{name} {fault}")


def _fault(value: Any, annotation: Any, allowed: Range) -> str | None:
    """What is wrong with a value, as it reads after the name; None if nothing is."""
    kind, options = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        faults = [_fault(value, option, allowed) for option in sorted(options, key=lambda option: option is NoneType)]
        words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        if None in faults or not (words and isinstance(value, str)):
            return None if None in faults else faults[0]
        return _unknown(value, (*words, *(_OTHERS[option](allowed) for option in options if option in _OTHERS)))
    if kind is Literal:
        return None if value in options else _unknown(value, options)
    if kind in (list, dict):
        if not isinstance(value, (list, tuple) if kind is list else kind):
            return f"({value!r}) must be a {kind.__name__}"
        items = value.values() if isinstance(value, dict) else value
        return next((fault for item in items if (fault := _fault(item, options[-1], allowed))), None)
    if annotation in (int, float):
        return _number_fault(value, Integral if annotation is int else Real, allowed)
    if annotation is bool:
        return None if isinstance(value, bool) else f"({value!r}) must be true or false"
    if annotation is NoneType:
        return None if value is None else f"({value!r}) must be null"
    if is_dataclass(annotation) and not isinstance(value, annotation):  # type: ignore[arg-type]
        return f"({value!r}) must be a {annotation.__name__}"  # type: ignore[union-attr]
    return None


def _number_fault(value: Any, kind: type, allowed: Range) -> str | None:
    if isinstance(value, bool) or not isinstance(value, kind):  # to Python a bool is a whole number
        return f"({value!r}) must be a {'whole number' if kind is Integral else 'number'} {allowed}"
    number: Any = value
    return None if allowed.holds(number) else f"({value}) must be {allowed}"


_OTHERS: dict[Any, Callable[[Range], str]] = {
    int: lambda allowed: f"a whole number {allowed}",
    float: lambda allowed: f"a number {allowed}",
    bool: lambda allowed: "true or false",
}
"""What else than a word an argument may be."""


def _unknown(value: Any, known: tuple[Any, ...]) -> str:
    close = get_close_matches(str(value), map(str, known), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{value!r} is unknown; {hint}use {', '.join(map(str, known[:-1]))} or {known[-1]}"


def constructor_arguments(kind: type) -> list[str]:
    """Names of what a class is made from, also of what its constructor hands on to a base as keywords.

    Args:
        kind: any class.

    Example:
        >>> class Base:
        ...     def __init__(self, size: int = 1): ...
        >>> class Derived(Base):
        ...     def __init__(self, name: str, **options): ...
        >>> constructor_arguments(Derived)
        ['name', 'size']
    """
    names: dict[str, None] = {}
    for owner in (each for each in kind.__mro__ if "__init__" in vars(each)):
        parameters = [*inspect.signature(vars(owner)["__init__"]).parameters.values()][1:]  # without self
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return [*names]


def check_batch_sizes(**sizes: int | None) -> None:
    """Refuse a size that does not divide the one named before it.

    Args:
        **sizes: from the largest to the smallest; None is passed over.

    Raises:
        UserError: names both sizes.

    Example:
        >>> check_batch_sizes(minibatch_size=6, micro_batch_size=4)
        Traceback (most recent call last):
        rlhf_lightning.errors.UserError: minibatch_size (6) must be a multiple of micro_batch_size (4)
    """
    given = [(name, size) for name, size in sizes.items() if size is not None]
    for (name, size), (smaller_name, smaller) in pairwise(given):
        if size % smaller:
            raise UserError(f"{name} ({size}) must be a multiple of {smaller_name} ({smaller})")


def per_process(name: str, size: int, processes: int) -> int:
    """A process's share of a batch.

    Args:
        name: of the setting, for the message.
        size: rows of the batch on all processes together.
        processes: how many there are.

    Raises:
        UserError: it does not divide.

    Example:
        >>> per_process("batch_size", 8, 2)
        4
    """
    if size % processes:
        raise UserError(
            f"{name} ({size}) must be a multiple of the number of processes ({processes}): it counts the rows of all"
        )
    return size // processes
