"""The pictures of a report as PNG, for slides and papers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lightning.report.charts import Chart, Line
from rlhf_lightning.report.thinning import thin

_COLORS = ("#0b62b8", "#b04705", "#0d7d70", "#7c4ddb", "#b3256c", "#7a6200", "#51606f", "#2f7a1f")
_COLUMNS = 900


def save_pictures(folder: Path, charts: Iterable[Chart]) -> list[Path]:
    """Draw each chart into a file of its name.

    Args:
        folder: made where it is missing.
        charts: to be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        figure = Figure(figsize=(6.4, 4.0))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.13, 0.21, 0.84, 0.70))  # a layout that is worked out takes as long as the picture
        handles = [(line.label, _draw(axes, line)) for line in chart.lines]
        if chart.has_diagonal:
            axes.axline((0, 0), slope=1, color="0.5", linestyle="--", linewidth=1)
        # Names of runs and metrics are shown as they are: a dollar sign in one would start a formula.
        axes.set_title(chart.title, parse_math=False)
        axes.set_xlabel(chart.x_label, parse_math=False)
        axes.set_ylabel(chart.y_label, parse_math=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if named := [(handle, label) for label, handle in handles if label]:
            options: dict[str, Any] = {"loc": "lower center", "ncols": min(3, len(named)), "frameon": False}
            for text in figure.legend(*zip(*named, strict=True), **options, fontsize=9).get_texts():
                text.set_parse_math(False)
        paths.append(folder / f"{chart.key}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _draw(axes: Any, line: Line) -> Any:
    """Draw a line, and give what stands for it in the legend."""
    color, is_faint = _COLORS[line.color % len(_COLORS)], line.style == "faint"
    x, y = thin(line.x, line.y, _COLUMNS) if (np.diff(line.x) >= 0).all() else (line.x, line.y)
    marker = "o" if line.style == "points" else ""
    width, alpha = (0.8, 0.3) if is_faint else (1.6, 1.0)
    (drawn,) = axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=width, alpha=alpha)
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.low) & np.isfinite(line.high)
        axes.vlines(line.x[known], line.low[known], line.high[known], color=color, linewidth=1, alpha=0.7)
    return drawn
