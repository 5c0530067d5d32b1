"""How much better people said that a response is, in words, and the margins that stand for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.errors import UserError

RatingMargins: TypeAlias = dict[str, float] | Literal["small", "large"]

_WORDS = (
    *("significantly_better", "better", "slightly_better"),
    *("negligibly_better", "unsure", "negligibly_better_unsure"),
)
_TABLES = {
    "small": dict(zip(_WORDS, (1.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0), strict=True)),
    "large": dict(zip(_WORDS, (3.0, 2.0, 1.0, 0.0, 0.0, 0.0), strict=True)),
}
"""Touvron et al. 2023, Llama 2, table 27, whose last rating is "negligibly better / unsure"."""


def margins_of(ratings: Mapping[str, float] | str) -> dict[str, float]:
    """The margin of each rating.

    Args:
        ratings: `small` or `large`, or a margin for each rating, in units of the raw score.

    Returns:
        By the rating as `spelt` writes it.

    Raises:
        UserError: no table of this name, or two ratings that count as the same.

    Example:
        >>> margins_of("large")["slightly_better"], margins_of({"Much better": 2.0})
        (1.0, {'much_better': 2.0})
    """
    if isinstance(ratings, str):
        if ratings not in _TABLES:
            raise UserError(
                f"rating_margins: {ratings!r} is none of {', '.join(_TABLES)}; or give each rating's margin"
            )
        return _TABLES[ratings]
    margins = {spelt(name): float(margin) for name, margin in ratings.items()}
    if not margins or len(margins) < len(ratings):
        raise UserError(f"rating_margins ({', '.join(ratings)}) must name one rating or more, each once")
    return margins


def read_rating(value: Any, name: str, margins: Mapping[str, float], margin: Any = None) -> float:
    """The margin of the rating that stands in a row.

    Args:
        value: what stands there.
        name: the field, as the reason is to say it.
        margins: from `margins_of`.
        margin: that stands in the row, too; None for none.

    Raises:
        BadRowError: no rating that is known, or a margin beside it.
    """
    if margin is not None:
        raise BadRowError(f"{name} stands beside a margin, and both say how much better the chosen response is")
    rating = spelt(value)
    if rating not in margins:
        raise BadRowError(f"{name} {value!r} is none of {', '.join(margins)}")
    return margins[rating]


def spelt(rating: Any) -> str:
    """A rating without regard to case, and to what stands between its words; numbers as they are written shortest.

    Example:
        >>> spelt(" Slightly-better "), spelt(3.0), spelt("-3.0"), spelt("Negligibly better / unsure")
        ('slightly_better', '3', '-3', 'negligibly_better_unsure')
    """
    if not isinstance(rating, bool):
        try:
            return f"{float(rating):g}"
        except (TypeError, ValueError, OverflowError):
            pass
    return "_".join("".join(c if c.isalnum() or c == "." else " " for c in str(rating).lower()).split())
