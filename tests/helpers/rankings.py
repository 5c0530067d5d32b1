"""Rows that rank several responses."""

from __future__ import annotations

from typing import Any

from helpers.stages import words


def ranking_rows(sizes: list[int], ties: bool = False) -> list[dict[str, Any]]:
    """One row for each number of responses, which begin alike and differ in length; margins and weights vary by row.

    Args:
        sizes: how many responses each row has, 2 or more.
        ties: let the second and third response of each rank equal; of every other row they make pairs, too.
    """
    rows = []
    for i, size in enumerate(sizes):
        responses = [f"so {words(1 + (i + k) % 4, 50 * i + k)} {k}" for k in range(size)]
        ranks = [min(k, 1) if ties and k < 3 else k for k in range(size)]
        row = {"prompt": f"{i}: {words(1 + i % 3, i)}", "responses": responses, "ranks": ranks}
        row |= {"margin": 0.3 * (i % 2), "weight": 0.5 + i % 3}
        rows.append(row | ({"tie_margin": 0.2} if ties and i % 2 else {}))
    return rows
