"""Reliability diagram as SVG: accuracy by confidence, beside the diagonal of a calibrated model."""

from __future__ import annotations

from vit_static.report.calibration import Calibration
from vit_static.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, as_json, linear_axis, tick_labels
from vit_static.report.tables import escape_html

STYLE = """
.chart .bars rect { fill: var(--c0); fill-opacity: .55; }
.chart line.diagonal { stroke: var(--soft); stroke-dasharray: 5 3; }
"""


def reliability_chart(calibration: Calibration, title: str, x_label: str) -> str:
    """Return the HTML of a reliability diagram; the id of its data is reliability.

    A bar is as high as the accuracy of its bin, and its tooltip also has the mean confidence and the number of
    predictions. Bins without predictions have none.
    """
    x = linear_axis(0.0, 1.0, LEFT, RIGHT, 5, is_rounded=True)
    y = linear_axis(0.0, 1.0, BOTTOM, TOP, 5, is_rounded=True)
    num_bins = len(calibration.bins)
    bars = []
    for number, each in enumerate(calibration.bins):
        if not each.num_predictions:
            continue
        left, right = x.to_pixels(number / num_bins), x.to_pixels((number + 1) / num_bins)
        top = y.to_pixels(each.accuracy)
        tooltip = (
            f"confidence {each.confidence:.3f}, accuracy {each.accuracy:.3f}, {each.num_predictions:,} predictions"
        )
        bars.append(
            f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" height="{BOTTOM - top:.1f}">'
            f"<title>{tooltip}</title></rect>"
        )
    grid = []
    for tick, label in zip(y.ticks, tick_labels(y), strict=True):
        top = y.to_pixels(tick)
        grid.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        grid.append(f'<text class="y" x="{LEFT - 6}" y="{top:.1f}" dy="4" text-anchor="end">{label}</text>')
    for tick, label in zip(x.ticks, tick_labels(x), strict=True):
        left = x.to_pixels(tick)
        grid.append(f'<text class="x" x="{left:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{label}</text>')
    ece = f"ECE {100.0 * calibration.ece:.2f} %"
    data = {"title": title, "ece": calibration.ece, "bins": [each.model_dump() for each in calibration.bins]}
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape_html(f"{title}, by {x_label}: {ece}")}">'
        f'<text class="title" x="{LEFT}" y="14">{escape_html(title)}</text>'
        f'<text x="{RIGHT}" y="14" text-anchor="end">{ece}</text>{"".join(grid)}<g class="bars">{"".join(bars)}</g>'
        f'<line class="diagonal" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{TOP}"/></svg>'
        f'<script type="application/json" id="reliability">{as_json(data)}</script></figure>'
    )
