"""The curves of the report's pages, and the timelines by which they are drawn over epochs or wall time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vit_static.report.charts import NUM_COLOURS, Line, Mark, chart
from vit_static.report.run_log import RunLogData

# The charts: title, kind of entry in metrics.jsonl, key.
CURVES = [
    ("training loss", "train", "loss"),
    ("validation loss", "eval", "loss"),
    ("top-1 (%)", "eval", "top1"),
    ("top-5 (%)", "eval", "top5"),
    ("mAP (%)", "eval", "map"),
    ("macro F1 (%)", "eval", "macro_f1"),
    ("balanced accuracy (%)", "eval", "balanced_accuracy"),
    ("expected calibration error (%)", "eval", "ece"),
    ("learning rate", "train", "lr"),
    ("gradient norm", "train", "grad_norm"),
    ("images per second", "train", "images_per_s"),
    ("MFU (share of the peak rate)", "train", "mfu"),
    ("data wait (share of time)", "train", "data_wait"),
    ("memory, maximum over ranks (MB)", "train", "memory_mb"),
]
NOISY_KEYS = frozenset({"loss", "grad_norm", "images_per_s", "data_wait", "mfu"})  # of training; can be smoothed
LOG_SCALE_KEYS = frozenset({"loss", "lr", "grad_norm"})  # whose axis may be logarithmic
MAX_TIMES = 2000  # of a timeline


@dataclass(frozen=True)
class Toggle:
    """A checkbox that shows and hides the lines of its number in all charts, in their colour."""

    name: str
    number: int
    is_dashed: bool = False

    @property
    def css_classes(self) -> str:
        is_dashed = self.is_dashed or self.number // NUM_COLOURS % 2 == 1
        return f"s{self.number % NUM_COLOURS}{' dashed' if is_dashed else ''}"


def line_chart(
    title: str, kind: str, key: str, lines: Sequence[Line], marks: Sequence[Mark] = (), *, has_toggles: bool = True
) -> str:
    """Return the HTML of the chart of a key of metrics.jsonl; an empty string without points."""
    return chart(
        f"{kind}-{key}",
        title,
        lines,
        dots=kind != "train",
        smooth=kind == "train" and key in NOISY_KEYS,
        may_be_log=key in LOG_SCALE_KEYS,
        marks=marks,
        has_toggles=has_toggles,
    )


def timeline_data(run: RunLogData) -> dict[str, Any]:
    """Return the name of a run and what its charts need for other axes than the step's, as JSON values.

    `timeline` has columns of equal length, None where the log doesn't have them: steps, the wall time of all sessions
    in seconds, and the epochs. It is interpolated between its steps.
    """
    times = run.timeline
    every = -(-len(times) // MAX_TIMES) or 1
    times = [*times[:-1:every], *times[-1:]]
    columns = {
        name: [time[index] for time in times] if times and times[-1][index] is not None else None
        for index, name in enumerate(("steps", "seconds", "epochs"))
    }
    columns["steps"] = columns["steps"] or []
    return {"name": run.name, "total_steps": run.total_steps or run.last_step or None, "timeline": columns}
