"""A picture of a prepared folder: how long prompts and responses are, and where the rows went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lightning.data.preparing.manifest import Part
from rlhf_lightning.data.preparing.prepared import TokenTable
from rlhf_lightning.data.rows import Need

_TITLES: dict[Need, str] = {
    "finetune": "Demonstrations",
    "preference": "Preferences",
    "prompts": "Prompts",
    "rated": "Rated responses",
}
_COLOURS = {
    "train": "#4269d0",
    "validation": "#e58606",
    "test": "#3ca951",
    "chosen": "#4269d0",
    "rejected": "#d1495b",
}
_INK = "#333333"
_BINS = (12, 60)
_REASONS = 6
_LONGEST_NAME = 40  # characters


def draw_lengths(path: Path, tables: Mapping[tuple[Need, Part], TokenTable], account: Mapping[str, Any]) -> None:
    """Draw histograms of the lengths in tokens, a column for each kind of example, and where the rows went.

    Args:
        path: the PNG.
        tables: those with rows, by kind and part.
        account: `rows in`, `dropped`, `other stages` and `kept` of the training data.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    needs = list(dict.fromkeys(need for need, _ in tables))
    columns = len(needs) + ("prompts" not in needs)  # the last column has room for where the rows went
    figure = Figure(figsize=(max(6.5, 4.4 * columns), 6.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, columns, squeeze=False)
    for axes, need in zip(grid.T, needs, strict=False):
        parts = {part: table for (kind, part), table in tables.items() if kind == need}
        _draw_prompts(axes[0], parts)
        axes[0].set_title(_TITLES[need], loc="left", fontweight="bold", color=_INK, pad=14)
        if need != "prompts":
            _draw_responses(axes[1], parts)
    free = grid[1][-1]
    if "prompts" not in needs:
        free = grid[0][-1]
        grid[1][-1].set_axis_off()
    _draw_account(free, account)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of the rows", color=_INK)
    figure.savefig(path, dpi=120)


def _draw_prompts(axes: Any, parts: Mapping[Part, TokenTable]) -> None:
    lengths: dict[str, np.ndarray] = {part: table.lengths("prompt") for part, table in parts.items()}
    _draw_histograms(axes, lengths, "tokens of the prompt")


def _draw_responses(axes: Any, parts: Mapping[Part, TokenTable]) -> None:
    """Chosen against rejected for the training pairs, else one histogram for each part."""
    lengths: dict[str, np.ndarray]
    if "train" in parts and parts["train"].need == "preference":
        lengths = {name: parts["train"].lengths(name) for name in ("chosen", "rejected")}
    else:
        lengths = {part: table.lengths("response") for part, table in parts.items()}
    _draw_histograms(axes, lengths, "tokens of the response")


def _draw_histograms(axes: Any, lengths: Mapping[str, np.ndarray], label: str) -> None:
    """The first filled, the others as lines over it; the axis ends where all but 1 in 200 rows do."""
    from matplotlib.ticker import MaxNLocator

    end = max(8.0, *(float(np.percentile(values, 99.5)) for values in lengths.values()))
    fewest = min(len(values) for values in lengths.values())
    bins = float(np.clip(2 * fewest**0.5, *_BINS))  # few rows in narrow bins would show nothing but chance
    width = max(1, int(np.ceil(end / bins)))
    edges = np.arange(0, int(end) + 2 * width, width)
    for i, (name, values) in enumerate(lengths.items()):
        shares = np.histogram(values, edges)[0] / len(values)
        colour = _COLOURS[name]
        median = f"{name}, median {np.median(values):,.0f}"
        if i == 0:
            axes.stairs(shares, edges, fill=True, alpha=0.3, color=colour)
        axes.stairs(shares, edges, color=colour, label=median, linewidth=1.5)
        axes.axvline(float(np.median(values)), color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(bottom=0)
    longest = max(int(values.max()) for values in lengths.values())
    axes.set_xlabel(f"{label} (longest {longest:,})", color=_INK)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:.1%}" if axes.get_ylim()[1] < 0.04 else "{x:.0%}")
    axes.legend(frameon=False, fontsize=9)
    _clean(axes)


def _draw_account(axes: Any, account: Mapping[str, Any]) -> None:
    """Rows kept and left out, by reason, as bars of their share."""
    left_out = dict(sorted(account["dropped"].items(), key=lambda item: -item[1]))
    shown = dict(list(left_out.items())[:_REASONS])
    if more := sum(left_out.values()) - sum(shown.values()):
        shown["other reasons"] = more
    bars = {"kept": account["kept"], "of other stages": account["other stages"], **shown}
    bars = {name: count for name, count in bars.items() if count}
    total = account["rows in"]
    names = [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in bars]
    positions = np.arange(len(bars))[::-1]
    colours = ["#3ca951" if name == "kept" else "#b8bcc4" if name == "of other stages" else "#d1495b" for name in bars]
    axes.barh(positions, [count / total for count in bars.values()], height=0.28, color=colours)
    style: dict[str, Any] = {"va": "bottom", "color": _INK, "fontsize": 9}
    for position, name, count in zip(positions, names, bars.values(), strict=True):
        axes.text(0, position + 0.22, name, **style)
        axes.text(1, position + 0.22, f"{count:,}  {count / total:.1%}", ha="right", **style)
    axes.set_title(f"Where {total:,} rows went", loc="left", fontweight="bold", color=_INK, pad=14)
    axes.set(xlim=(0, 1), ylim=(len(bars) - max(5, len(bars)) - 0.3, len(bars) - 0.4))
    axes.set_axis_off()


def _clean(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
