"""The content of the page of one run."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from vit_static.common.text import duration, escape_lines
from vit_static.report.charts import Line, Mark, format_number
from vit_static.report.curves import CURVES, Toggle, line_chart
from vit_static.report.error_section import error_section
from vit_static.report.metric_names import METRIC_TITLES, format_metric
from vit_static.report.run_log import EXTRA_EVAL, RunLogData
from vit_static.report.tables import MISSING, Table, format_setting, spaced

WEIGHT_FILES = {
    "model.pdparams": "the weights at the end",
    "model_ema.pdparams": "their moving average",
    "model_best.pdparams": "the weights of the best evaluation",
    "model_best_ema.pdparams": "their moving average",
}
MAX_VISIBLE_EVALUATIONS = 12  # earlier ones are folded away


@dataclass(frozen=True)
class Checkpoint:
    """A link to a checkpoint or a file of weights, with the result of its evaluation."""

    name: str
    url: str
    result: str
    note: str


def run_page(run: RunLogData, run_dir: Path, path: Path, *, is_live: bool) -> dict[str, Any]:
    """Return the content of templates/run.html.j2 for the page at `path`. `is_live`: the run goes on."""
    evaluations, earlier_evaluations = _evaluations(run)
    sessions, num_same_sessions = _sessions(run)
    return {
        "key_figures": _key_figures(run, is_live=is_live),
        "progress": run.total_steps and (run.last_step, run.total_steps),
        "toggles": _toggles(run),
        "charts": _charts(run),
        "speed_note": _speed_note(run),
        "evaluations": evaluations,
        "earlier_evaluations": earlier_evaluations,
        "extra_evaluations": _extra_evaluations(run),
        "extra_chart": _extra_chart(run),
        "checkpoints": _checkpoints(run, run_dir, path),
        "errors": None if run.error_analysis is None else error_section(run.error_analysis),
        "sessions": sessions,
        "num_same_sessions": num_same_sessions,
        "settings": _settings(run),
        "config_text": Markup(html.escape(escape_lines(run.config_text))),
    }


def _key_figures(run: RunLogData, *, is_live: bool) -> dict[str, str]:
    """The figures at the top of the page, by name, as far as they are known."""
    best, rate, memory, parameters = run.best, run.images_per_s, run.peak_memory_mb, run.num_parameters
    metric, title = run.selection_metric, METRIC_TITLES[run.selection_metric]
    figures = {
        f"best {title}": best and f"{format_metric(metric, best[1])} at step {best[0]:,}",
        f"last {title}": run.selection_values and format_metric(metric, run.selection_values[-1][1]),
        "steps": f"{run.last_step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}"),
        "wall time": run.seconds and duration(run.seconds),
        "median images per second": rate and format_number(rate),
        "median MFU": run.mfu and f"{100.0 * run.mfu:.1f} %",
        "peak memory per rank": memory and f"{memory:,.0f} MB",
        "parameters": parameters and f"{parameters:,}",
        "state": "running" if is_live else run.state,
        "lines of the log that can't be read": run.num_unread_lines and f"{run.num_unread_lines:,}",
    }
    return {name: str(figure) for name, figure in figures.items() if figure}


def _toggles(run: RunLogData) -> list[Toggle]:
    names = ["weights", "moving average of the weights"] if run.has_ema else []
    return [Toggle(name, number, is_dashed=number == 1) for number, name in enumerate(names)]


def _charts(run: RunLogData) -> list[str]:
    marks = [Mark(entry["step"], entry["event"], entry["event"] != "resumed") for entry in run.rewinds]
    marks += [Mark(step, f"images of {size}") for step, size in run.image_sizes.items() if step > 0]
    drawings = []
    for title, kind, key in CURVES:
        if key == "top5" and not run.has_top5:
            continue
        lines = [Line("weights", run.points(kind, key))]
        if kind == "eval":
            lines.append(Line("moving average", run.points(kind, f"ema_{key}"), number=1, is_dashed=True))
        drawings.append(line_chart(title, kind, key, lines, marks))
    return drawings


def _speed_note(run: RunLogData) -> str:
    """The rate of arithmetic where it can't be related to the device's peak, which isn't known for every device."""
    if run.mfu or not run.images_per_s or not run.flops_per_image or len(run.image_sizes) > 1:
        return ""
    rate = run.images_per_s * run.flops_per_image
    unit, text = (1e12, "TFLOP/s") if rate >= 1e12 else (1e9, "GFLOP/s")
    return (
        f"The median throughput is {format_number(run.images_per_s)} images per second, or {rate / unit:,.1f} {text}. "
        "There is no MFU (model FLOPs utilization), because the peak rate of this device isn't known."
    )


def _checkpoints(run: RunLogData, run_dir: Path, path: Path) -> list[Checkpoint]:
    """The checkpoints in the folder of the run, the latest first, then the merged weights."""
    folder = run_dir / "checkpoints"
    values = dict(run.selection_values)
    marks = {name: (folder / name).resolve().name for name in ("latest", "best")}
    checkpoints = []
    for each in sorted(folder.glob("step_*"), reverse=True):
        step = int(digits) if (digits := each.name.removeprefix("step_")).isdecimal() else None
        result = format_metric(run.selection_metric, values[step]) if step in values else ""
        notes = ", ".join(name for name, target in marks.items() if target == each.name)
        checkpoints.append(Checkpoint(each.name, relative_url(each, path), result, notes))
    for name, note in WEIGHT_FILES.items():
        if (run_dir / name).is_file():
            checkpoints.append(Checkpoint(name, relative_url(run_dir / name, path), "", note))
    return checkpoints


def relative_url(target: Path, path: Path) -> str:
    """Return the URL of a file or folder for a link on the page at `path`."""
    return quote(os.path.relpath(target.absolute(), path.absolute().parent).encode("utf-8", "surrogateescape"))


def _evaluations(run: RunLogData) -> tuple[Table, Table]:
    """The latest evaluations and the earlier ones, the latest first."""
    metrics = ["top1", "top5", "map", "macro_f1", "micro_f1", "balanced_accuracy", "ece", "loss"]
    columns = ["epoch", *metrics, *(f"ema_{name}" for name in metrics), "num_images"]
    columns = [name for name in columns if any(entry.get(name) is not None for entry in run.evaluations)]
    columns = [name for name in columns if run.has_top5 or not name.endswith("top5")]
    titles = {"top1": "top-1 %", "top5": "top-5 %", "map": "mAP %", "macro_f1": "macro F1 %", "micro_f1": "micro F1 %"}
    titles |= {"balanced_accuracy": "balanced accuracy %", "ece": "ECE %", "num_images": "images"}
    titles |= {f"ema_{name}": f"EMA {titles.get(name, name)}" for name in metrics}
    head = ["step", *(titles.get(name, name) for name in columns)]
    entries = run.evaluations[::-1]
    rows = [[f"{entry['step']:,}", *(_figure(name, entry.get(name)) for name in columns)] for entry in entries]
    best_rows = {n for n, entry in enumerate(entries) if run.best is not None and entry["step"] == run.best[0]}
    latest = Table(head, rows[:MAX_VISIBLE_EVALUATIONS], 0, best_rows)
    best_earlier_rows = {n - MAX_VISIBLE_EVALUATIONS for n in best_rows}
    return latest, Table(head, rows[MAX_VISIBLE_EVALUATIONS:], 0, best_earlier_rows)


def _extra_evaluations(run: RunLogData) -> Table:
    """The last evaluation on each of the further validation sets."""
    columns = ["top1", "top5", "mce", "mean_error", "num_classes", "num_images"]
    lasts = {name: entries[-1] for name, entries in run.extra_evaluations.items()}
    columns = [key for key in columns if any(entry.get(key) is not None for entry in lasts.values())]
    columns = [key for key in columns if run.has_top5 or key != "top5"]
    titles = {"top1": "top-1 %", "top5": "top-5 %", "mce": "mCE %", "mean_error": "mean corruption error %"}
    titles |= {"num_classes": "classes", "num_images": "images"}
    rows = [
        [name, f"{entry['step']:,}", *(_figure(key, entry.get(key)) for key in columns)]
        for name, entry in lasts.items()
    ]
    return Table(["set", "step", *(titles[key] for key in columns)], rows, 1)


def _extra_chart(run: RunLogData) -> str:
    lines = [
        Line(name, [(entry["step"], float(entry["top1"])) for entry in entries], number=number)
        for number, (name, entries) in enumerate(run.extra_evaluations.items())
    ]
    return line_chart("top-1 of the other sets (%)", EXTRA_EVAL, "top1", lines, has_toggles=False)


def _figure(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    decimals = {"loss": 4, "ema_loss": 4, "num_images": 0, "num_classes": 0}.get(name, 2)
    return f"{value:,.{decimals}f}"


def _sessions(run: RunLogData) -> tuple[dict[str, Table], int]:
    """Tables of the mesh and of the environment, by heading, with one column per session that differs from the session
    before it; and the number of sessions that don't."""
    sessions = run.sessions
    changed = [
        session
        for number, session in enumerate(sessions)
        if session.setup and (number == 0 or session.setup != sessions[number - 1].setup)
    ]
    if not changed:
        return {}, 0
    head = ["", *(f"{session.event}, step {session.step:,}" for session in changed)] if len(changed) > 1 else None
    tables = {}
    for heading, part in (("Mesh", "mesh"), ("Environment", "environment")):
        columns = [session.setup.get(part, {}) for session in changed]
        rows = [
            [spaced(key), *(format_setting(column.get(key, MISSING)) for column in columns)]
            for key in dict.fromkeys(key for column in columns for key in column)
            if any(column.get(key) not in (None, []) for column in columns)
        ]
        differing_rows = {number for number, row in enumerate(rows) if len(set(row[1:])) > 1}
        if part == "environment":
            rows.append(["started", *(session.time for session in changed)])
        tables[heading] = Table(head, rows, 1 + len(changed), differing_rows)
    return tables, len(sessions) - len(changed)


def _settings(run: RunLogData) -> Table | None:
    """The settings that differ from the defaults; None where the config can't be read."""
    if run.config is None:
        return None
    rows = [[key, format_setting(value), format_setting(default)] for key, value, default in run.changed_settings]
    return Table(["key", "value", "default"], rows, 3)
