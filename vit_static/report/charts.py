"""Curves over steps as SVG, without a script: axes with round ticks, thinned lines, values under the pointer.

Beside each drawing stands what it shows, as JSON in a <script type="application/json">, for programs.
"""

from __future__ import annotations

import bisect
import html
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

Points = list[tuple[int, float]]  # (step, value), by step

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 470, 40, 204  # of the part in which the curves are, in pixels
MAX_TARGETS = 100  # places under the pointer that say their values
MAX_DOTS = 150
NUM_COLOURS = 6  # STYLE has as many; further series are dashed

# Okabe and Ito's colours, which are told apart with any eyes; on a dark page lighter ones.
STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b8860b; --c5: #56b4e9; }
@media (prefers-color-scheme: dark) { @media screen {
  :root { --c0: #56b4e9; --c1: #ff8c3b; --c2: #21c795; --c3: #e79ac6; --c4: #f0e442; --c5: #9fb8ff; } } }
.chart { display: inline-block; width: 480px; max-width: 100%; margin: 0 1em 1em 0; vertical-align: top;
  break-inside: avoid; }
.chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.chart text.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.chart line { stroke: var(--line); stroke-width: 1; }
.chart polyline, .legend polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.chart polyline.raw { stroke-opacity: .35; stroke-width: 1; }
.dashed { stroke-dasharray: 5 3; }
.chart .mark line { stroke: var(--soft); stroke-dasharray: 2 3; }
.chart .mark path { fill: var(--soft); }
.chart .back line { stroke: #d55e00; }
.chart .back path { fill: #d55e00; }
.chart .targets rect { fill: var(--ink); fill-opacity: 0; }
.chart .targets rect:hover { fill-opacity: .1; }
.legend { list-style: none; padding: 0; margin: .5em 0 1em; display: flex; flex-wrap: wrap; gap: .2em 1.5em; }
.legend svg { width: 28px; height: 10px; margin-right: .5em; }
""" + "".join(f".s{n} {{ stroke: var(--c{n}); }} .d{n} {{ fill: var(--c{n}); }}\n" for n in range(NUM_COLOURS))


@dataclass(frozen=True)
class Series:
    """A line. The number-th of `NUM_COLOURS` is its colour."""

    name: str
    points: Points
    number: int = 0
    dashed: bool = False

    @property
    def classes(self) -> str:
        """Of its colour and its dashes."""
        is_dashed = self.dashed or self.number // NUM_COLOURS % 2
        return f"s{self.number % NUM_COLOURS}{' dashed' if is_dashed else ''}"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    what: str
    is_back: bool = False  # the run went back to it


@dataclass(frozen=True)
class Axis:
    """From values to pixels; `low` is at `start`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    ticks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        low, high, value = (math.log10(n) if self.is_log else n for n in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_axis(low: float, high: float, start: float, end: float, most_ticks: int, *, is_rounded: bool) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten; rounded, the axis begins and ends with one."""
    if not low < high:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    rough = (high - low) / most_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10, 20) if power * factor >= rough * (1 - 1e-9))
    decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
    bounds = low / step, high / step
    if is_rounded:
        first, last = math.floor(bounds[0] + 1e-9), math.ceil(bounds[1] - 1e-9)
    else:
        first, last = math.ceil(bounds[0] - 1e-9), math.floor(bounds[1] + 1e-9)
    ticks = tuple(round(n * step, decimals) for n in range(first, last + 1))
    low, high = (ticks[0], ticks[-1]) if is_rounded else (low, high)
    return Axis(low, high, start, end, ticks=ticks)


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """Ticks at powers of ten, or where these are few at 1, 2 and 5 times them; it begins and ends with one."""
    factors = (1,) if high / low > 300 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    all_ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max(bisect.bisect_right(all_ticks, low * (1 + 1e-9)) - 1, 0)
    last = bisect.bisect_left(all_ticks, high * (1 - 1e-9))
    ticks = all_ticks[first : last + 1]
    shown = ticks[:: -(-len(ticks) // 8)]
    return Axis(ticks[0], ticks[-1], start, end, True, tuple(shown))


def value_axis(values: Sequence[float], *, may_be_log: bool) -> Axis:
    """Logarithmic where that may be, all is above 0, and a linear axis would press most of it against its end."""
    low, high = min(values), max(values)
    if may_be_log and low > 0.0 and high / low >= 100.0 and statistics.median(values) - low < 0.05 * (high - low):
        return log_axis(low, high, BOTTOM, TOP)
    return linear_axis(low, high, BOTTOM, TOP, 5, is_rounded=True)


def step_axis(last: int) -> Axis:
    return linear_axis(0, max(last, 1), LEFT, RIGHT, 6, is_rounded=False)


def thinned(points: Points, axis: Axis) -> Points:
    """The least and the greatest of each column of pixels (of a linear axis), and both ends: it looks the same."""
    if len(points) <= 2 * (axis.end - axis.start):
        return points
    steps, values = np.array(points).T
    columns = (axis.start + (steps - axis.low) / (axis.high - axis.low) * (axis.end - axis.start)).astype(int)
    firsts = np.flatnonzero(np.diff(columns, prepend=-1))
    lasts = np.append(firsts[1:], len(columns)) - 1
    by_value = np.lexsort((values, columns))  # in each column
    kept = np.unique([0, *by_value[firsts], *by_value[lasts], len(points) - 1])
    return [points[place] for place in kept.tolist()]


def smoothed(points: Points) -> Points | None:
    """The mean about each point, over a fortieth of them; None where the points are few or no noise."""
    if len(points) < 40:
        return None
    values = np.array([value for _, value in points])
    rises = np.diff(values) > 0.0
    if (rises[1:] != rises[:-1]).sum() < len(points) / 4:
        return None
    sums = np.concatenate([[0.0], np.cumsum(values)])
    half = max(len(points) // 80, 2)
    places = np.arange(len(points))
    firsts, ends = np.maximum(places - half, 0), np.minimum(places + half + 1, len(points))
    means = (sums[ends] - sums[firsts]) / (ends - firsts)
    return [(step, mean) for (step, _), mean in zip(points, means.tolist(), strict=True)]


def number(value: float) -> str:
    """For people: four digits, or six before the point."""
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= size < 1e6:
        return f"{value:,.{max(3 - math.floor(math.log10(size)), 0)}f}"
    return _without_zeros(f"{value:.3e}")


def _without_zeros(text: str) -> str:
    """1.500e-04 as 1.5e-4."""
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def tick_labels(axis: Axis) -> list[str]:
    """Of a linear axis all with as many decimals as the one that needs most, or, of small ones, with powers of ten."""
    ticks = axis.ticks
    if axis.is_log:
        return [f"{tick:,g}" if 1e-3 <= tick < 1e5 else _without_zeros(f"{tick:.4e}") for tick in ticks]
    if max(map(abs, ticks)) < 1e-4:
        return [_without_zeros(f"{tick:.4e}") if tick else "0" for tick in ticks]
    decimals = max(0, *(-int(Decimal(repr(tick)).normalize().as_tuple().exponent) for tick in ticks))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def chart(
    name: str,
    title: str,
    series: Sequence[Series],
    last_step: int,
    *,
    dots: bool = False,
    smooth: bool = False,
    may_be_log: bool = False,
    marks: Iterable[Mark] = (),
) -> str:
    """A drawing of all that has points, nothing where none has. `name` becomes a part of the data's id: curve-NAME.

    The axis of the steps ends at `last_step` at least, so that drawings of one run can be compared. `dots` marks the
    points. `smooth` draws a running mean over what is noisy. `may_be_log`: value_axis.
    """
    series = [one for one in series if one.points]
    if not series:
        return ""
    x = step_axis(max(last_step, *(one.points[-1][0] for one in series)))
    y = value_axis([value for one in series for _, value in one.points], may_be_log=may_be_log)
    drawn = [(one, thinned(one.points, x)) for one in series]
    means = {one.name: mean for one in series if smooth and (mean := smoothed(one.points))}
    lines: list[str] = []
    shown: list[dict[str, Any]] = []
    for one, points in drawn:
        has_mean = one.name in means
        lines.append(_line(points, x, y, f"{one.classes}{' raw' if has_mean else ''}"))
        shown.append({"name": one.name, "points": _rounded(points)})
        if has_mean:
            mean = thinned(means[one.name], x)
            lines.append(_line(mean, x, y, f"{one.classes} smoothed"))
            shown[-1]["smoothed"] = _rounded(mean)
        if (dots and len(points) <= MAX_DOTS) or len(points) == 1:
            places = [f'cx="{x.place(step):.1f}" cy="{y.place(value):.1f}"' for step, value in points]
            lines += [f'<circle class="d{one.number % NUM_COLOURS}" {place} r="2.8"/>' for place in places]
    data = {
        "title": title,
        "x": _axis_data(x),
        "y": _axis_data(y),
        "series": shown,
        "marks": [[mark.step, mark.what] for mark in marks],
    }
    words = "; ".join(f"{one.name + ': ' if len(series) > 1 else ''}{_summary(one.points)}" for one in series)
    said = _last(series[0].points) if len(series) == 1 else ""
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(f"{title}, by step: {words}")}">'
        f'<text class="title" x="{LEFT}" y="14">{html.escape(title)}</text>'
        f'<text x="{RIGHT}" y="14" text-anchor="end">{said}</text>'
        f"{_grid(x, y)}{''.join(_mark(mark, x) for mark in marks)}{''.join(lines)}{_targets(series, x)}</svg>"
        f'<script type="application/json" id="curve-{name}">{as_json(data)}</script></figure>'
    )


def legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><polyline class="{one.classes}" points="0,5 28,5"/></svg>'
        f"{html.escape(one.name)}</li>"
        for one in series
    )
    return f'<ul class="legend">{items}</ul>'


def as_json(data: Any) -> str:
    """JSON that may stand in an HTML script, whatever its texts hold."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rounded(points: Points) -> list[list[float]]:
    """To float32's digits."""
    return [[step, float(f"{value:.7g}")] for step, value in points]


def _axis_data(axis: Axis) -> dict[str, Any]:
    return {"low": axis.low, "high": axis.high, "start": axis.start, "end": axis.end, "log": axis.is_log}


def _line(points: Points, x: Axis, y: Axis, classes: str) -> str:
    places = " ".join(f"{x.place(step):.1f},{y.place(value):.1f}" for step, value in points)
    return f'<polyline class="{classes}" points="{places}"/>'


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for tick, label in zip(y.ticks, tick_labels(y), strict=True):
        height = f"{y.place(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{height}" dy="4" text-anchor="end">{label}</text>')
    for tick, label in zip(x.ticks, tick_labels(x), strict=True):
        place = f"{x.place(tick):.1f}"
        parts.append(f'<line x1="{place}" x2="{place}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text class="x" x="{place}" y="{BOTTOM + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{LEFT - 14}" y="{BOTTOM + 17}" text-anchor="end">step</text>')
    return "".join(parts)


def _mark(mark: Mark, x: Axis) -> str:
    place = x.place(mark.step)
    return (
        f'<g class="mark{" back" if mark.is_back else ""}">'
        f"<title>{html.escape(mark.what)} at step {mark.step:,}</title>"
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP - 6}" y2="{BOTTOM}"/>'
        f'<path d="M{place - 5:.1f} {TOP - 14}h10l-5 8z"/></g>'
    )


def _targets(series: Sequence[Series], x: Axis) -> str:
    """Strips that say, under the pointer, the values about their middle."""
    steps = sorted({step for one in series for step, _ in one.points})
    chosen = steps[:: -(-len(steps) // MAX_TARGETS)]
    if chosen[-1] != steps[-1]:
        chosen.append(steps[-1])
    middles = [x.place(step) for step in chosen]
    bounds = [LEFT, *((before + after) / 2 for before, after in itertools.pairwise(middles)), RIGHT]
    by_step = [([step for step, _ in one.points], one) for one in series]
    rects = []
    for step, (left, right) in zip(chosen, itertools.pairwise(bounds), strict=True):
        said = []
        for steps_of_one, one in by_step:
            place = min(bisect.bisect_left(steps_of_one, step), len(steps_of_one) - 1)
            if place and abs(steps_of_one[place - 1] - step) < abs(steps_of_one[place] - step):
                place -= 1
            own_step, value = one.points[place]
            name = f"{one.name}, " if len(series) > 1 else ""
            said.append(f"{name}step {own_step:,}: {number(value)}")
        rects.append(
            f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{BOTTOM - TOP}">'
            f"<title>{html.escape(chr(10).join(said))}</title></rect>"
        )
    return f'<g class="targets">{"".join(rects)}</g>'


def _summary(points: Points) -> str:
    """In words, for those who don't see the drawing."""
    least = min(points, key=lambda point: point[1])
    most = max(points, key=lambda point: point[1])
    return (
        f"{number(points[0][1])} at step {points[0][0]:,}, {_last(points)}; "
        f"least {number(least[1])} at step {least[0]:,}, greatest {number(most[1])} at step {most[0]:,}"
    )


def _last(points: Points) -> str:
    return f"{number(points[-1][1])} at step {points[-1][0]:,}"
