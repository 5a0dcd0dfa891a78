"""Reliability diagram: accuracy by confidence, beside the diagonal of a calibrated model."""

from __future__ import annotations

from vit_static.report.calibration import Calibration
from vit_static.report.charts import figure


def reliability_chart(calibration: Calibration, title: str, x_label: str) -> str:
    """Return the HTML of a reliability diagram; the id of its data is reliability.

    A bar is as high as the accuracy of its bin, and its tooltip also has the mean confidence and the number of
    predictions. Bins without predictions have none.
    """
    ece = f"ECE {100.0 * calibration.ece:.2f} %"
    data = {
        "title": title,
        "x_label": x_label,
        "ece": calibration.ece,
        "bins": [each.model_dump() for each in calibration.bins],
    }
    return figure("reliability", f"{title} ({ece})", f"{title}, by {x_label}: {ece}", data)
