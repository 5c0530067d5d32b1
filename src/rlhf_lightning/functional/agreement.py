"""How far people agree beyond what chance alone would bring about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two who labelled the same things (Cohen 1960, eq. 1), from -1 to 1.

    It is (p - c) / (1 - c) for the share p of things that both gave the same label, and the share c that they would
    have by chance, each keeping to how often he gives which label.

    Args:
        first: labels of one.
        second: labels of the other, of the same things in the same order.

    Returns:
        None where it is not defined: there is nothing in common, or both gave one and the same label to everything.

    Example:
        >>> cohen_kappa(["a", "a", "b", "b"], ["a", "b", "b", "b"])
        0.5
    """
    number = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    of_first, of_second = Counter(first), Counter(second)
    by_chance = sum(count * of_second[label] for label, count in of_first.items())  # times number squared
    if by_chance == number**2:
        return None
    return (same * number - by_chance) / (number**2 - by_chance)
