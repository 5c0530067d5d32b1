"""Pictures as SVG for a page: drawn by hand, small, in the colours of the page, with readings where one points.

A picture holds no script: a reading is text that the page's style sheet shows while the pointer is over its column.
"""

from __future__ import annotations

import math
from html import escape

import numpy as np

from rlhf_lightning.report.charts import Chart, Line
from rlhf_lightning.report.logs import Numbers
from rlhf_lightning.report.thinning import thin

COLORS = 8
"""How many colours the style sheet has."""
_WIDTH, _HEIGHT = 400, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 24, 38
_COLUMNS = _WIDTH - _LEFT - _RIGHT
_READINGS = 44
_MARKS = 60
_LABELLED = 2  # lines that a reading has room to name
_NEARLY = 0.9995  # of a power of ten; what is more is written with a digit more


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two others.

    Args:
        low: the smaller.
        high: the greater.
        count: about how many.

    Example:
        >>> ticks(0.0, 97.0)
        [0.0, 20.0, 40.0, 60.0, 80.0]
        >>> ticks(-0.34, 1.95)
        [0.0, 0.5, 1.0, 1.5]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") + 0.0 for number in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as a picture needs it.

    Example:
        >>> [number(value) for value in (0.0, 0.25, 12345.0, 2e-6, -1.5, 3e6, 999.7, 999_900.0)]
        ['0', '0.25', '12.3k', '2e-6', '-1.5', '3M', '1000', '1M']
    """
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        text = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    elif size >= 1e4:
        powers = ((9, "G"), (6, "M"), (3, "k"))
        factor, unit = next((10.0**power, unit) for power, unit in powers if size >= _NEARLY * 10**power)
        text = f"{_three_digits(value / factor)}{unit}"
    else:
        text = _three_digits(value)
    return text


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 * _NEARLY else f"{value:.0f}"


class _Scale:
    """From the numbers of a chart to places in its picture."""

    def __init__(self, chart: Chart) -> None:
        x = np.concatenate([line.x for line in chart.lines])
        y = np.concatenate([each for line in chart.lines for each in (line.y, line.low, line.high) if each is not None])
        y = y[np.isfinite(y)]
        if chart.has_diagonal:
            x = y = np.concatenate([x, y])
        self.x_low, self.x_high = _range(float(x.min()), float(x.max()), 0.0)
        self.y_low, self.y_high = _range(float(y.min()), float(y.max()), 0.05)

    def x(self, value: Numbers) -> Numbers:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * _COLUMNS

    def y(self, value: Numbers) -> Numbers:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    """Ends of an axis, with room beyond the numbers; a constant is in the middle."""
    width = high - low
    if width <= 1e-9 * max(abs(low), abs(high)):
        margin, width = 1.0, abs(low) * 0.1 or 1.0
    return low - margin * width, high + margin * width


def draw(chart: Chart, name: str) -> str:
    """An `<svg>` with a title and a description for those who do not see it.

    Args:
        chart: with at least one line, each of at least one point.
        name: unlike that of any other picture on the page.
    """
    scale = _Scale(chart)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{name}-t {name}-d">',
        f'<title id="{name}-t">{escape(chart.title)}</title>',
        f'<desc id="{name}-d">{escape(describe(chart))}</desc>',
        _axes(chart, scale),
    ]
    if chart.has_diagonal:
        ends = [_place(scale, at, at) for at in (max(scale.x_low, scale.y_low), min(scale.x_high, scale.y_high))]
        parts.append(f'<path class="diagonal" d="M{ends[0]}L{ends[1]}"/>')
    parts += [_line(line, scale) for line in chart.lines]
    if all(line.style != "points" or line.low is None for line in chart.lines) and _is_ascending(chart):
        parts.append(_readings(chart, scale))
    return "".join([*parts, "</svg>"])


def describe(chart: Chart) -> str:
    """In words: where each line begins and ends, and its extremes."""
    said = [
        f"{line.label or chart.title}: {number(line.y[0])} at {number(line.x[0])}, {number(line.y[-1])} at "
        f"{number(line.x[-1])}, lowest {number(line.y.min())}, highest {number(line.y.max())}"
        for line in chart.lines
        if line.style != "faint"
    ]
    return f"{chart.y_label} over {chart.x_label}. " + "; ".join(said) + "."


def _is_ascending(chart: Chart) -> bool:
    return all((np.diff(line.x) >= 0).all() for line in chart.lines)


def _place(scale: _Scale, x: float, y: float) -> str:
    return f"{scale.x(np.float64(x)):.1f} {scale.y(np.float64(y)):.1f}"


def _axes(chart: Chart, scale: _Scale) -> str:
    parts, bottom = [], _HEIGHT - _BOTTOM
    for value in ticks(scale.y_low, scale.y_high, 4):
        y = float(scale.y(np.float64(value)))
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(scale.x_low, scale.x_high):
        x = float(scale.x(np.float64(value)))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDTH - _RIGHT}"/>')
    middle = _LEFT + _COLUMNS / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    parts.append(f'<text class="label" x="{_LEFT - 42}" y="11">{escape(chart.y_label)}</text>')
    return "".join(parts)


def _line(line: Line, scale: _Scale) -> str:
    color = f"c{line.color % COLORS}"
    x, y = thin(line.x, line.y, _COLUMNS) if (np.diff(line.x) >= 0).all() else (line.x, line.y)
    places = [f"{px:.1f} {py:.1f}" for px, py in zip(scale.x(x).tolist(), scale.y(y).tolist(), strict=True)]
    drawn = f'<path class="line {line.style} {color}" d="M{"L".join(places)}"/>' if len(places) > 1 else ""
    if line.low is not None and line.high is not None:
        ends = zip(line.x, line.low, line.high, strict=True)
        bars = "".join(f"M{_place(scale, at, low)}L{_place(scale, at, high)}" for at, low, high in ends if low <= high)
        drawn += f'<path class="line bar {color}" d="{bars}"/>' if bars else ""
    if len(line.x) == 1 or (line.style == "points" and len(line.x) <= _MARKS):
        px, py = scale.x(line.x).tolist(), scale.y(line.y).tolist()
        drawn += "".join(
            f'<circle class="{color}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in zip(px, py, strict=True)
        )
    return drawn


def _readings(chart: Chart, scale: _Scale) -> str:
    """Columns over the picture, each with the values there."""
    lines = [line for line in chart.lines if line.style != "faint"]
    longest = max(lines, key=lambda line: len(line.x))
    shown = np.unique(np.linspace(0, len(longest.x) - 1, _READINGS).round().astype(int))
    steps = longest.x[shown]
    centres = scale.x(steps)
    edges = np.concatenate([[_LEFT], (centres[1:] + centres[:-1]) / 2, [_WIDTH - _RIGHT]])
    parts, height = [], _HEIGHT - _TOP - _BOTTOM
    word = chart.x_label.partition(" (")[0].rpartition(" ")[2]
    for step, centre, left, right in zip(steps, centres, edges[:-1], edges[1:], strict=True):
        values = []
        for line in lines:
            nearest = int(np.abs(line.x - step).argmin())
            label = f"{line.label} " if line.label and len(lines) <= _LABELLED else ""
            values.append(
                f'<tspan class="c{line.color % COLORS}" dx="7">{escape(label)}{number(line.y[nearest])}</tspan>'
            )
        parts.append(
            f'<g class="reading"><rect x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" height="{height}"/>'
            f'<path d="M{centre:.1f} {_TOP}v{height}"/><text x="{_WIDTH - _RIGHT}" y="11" text-anchor="end">'
            f"{escape(word)} {number(step)}{''.join(values)}</text></g>"
        )
    return f'<g aria-hidden="true">{"".join(parts)}</g>'
