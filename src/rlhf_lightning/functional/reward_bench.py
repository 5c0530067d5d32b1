"""How RewardBench 2 scores a reward model on several responses to one prompt (Malik et al. 2025, and its code).

Notation: C correct responses, W wrong ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def best_of_credit(correct: Array, wrong: Array) -> float:
    """1 where a correct response is scored above all others; responses that share the first place share the credit.

    Args:
        correct: score of the one correct response, `[1]`.
        wrong: scores of the others, `[W]`.

    Example:
        >>> best_of_credit(np.array([2.0]), np.array([1.0, 2.0, 0.0]))
        0.5
    """
    (score,) = correct.tolist()
    return 0.0 if score < wrong.max() else 1 / (1 + int((wrong == score).sum()))


def ties_credit(correct: Array, wrong: Array) -> tuple[float, float]:
    """How several responses that are equally right are told from wrong ones.

    Args:
        correct: scores of the correct responses, `[C]`.
        wrong: scores of the wrong ones, `[W]`.

    Returns:
        1 where every correct response is scored above every wrong one; and 1 where, besides, that gap is wider than
        the scores of the correct ones are spread.

    Example:
        >>> ties_credit(np.array([3.0, 2.0]), np.array([1.5, 0.0])), ties_credit(np.array([3.0, 2.5]), np.array([1.5]))
        ((1.0, 0.0), (1.0, 1.0))
    """
    gap, spread = correct.min() - wrong.max(), correct.max() - correct.min()
    return float(gap > 0), float(gap > 0 and gap > spread)
