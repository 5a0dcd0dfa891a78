"""`report.html`: one run, or several side by side, as a self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vit_static.common.errors import UserError, escape
from vit_static.common.io import write_bytes
from vit_static.common.text import duration, escape_lines, print_line
from vit_static.report import charts
from vit_static.report.charts import Mark, Series
from vit_static.report.error_section import error_section
from vit_static.report.metric_names import METRIC_TITLES, format_metric, metric_unit
from vit_static.report.reliability_chart import STYLE as RELIABILITY_STYLE
from vit_static.report.run_log import EXTRA_EVAL, RunLogData, read_run
from vit_static.report.tables import MISSING, Table, format_setting

REPORT_FILE = "report.html"
# The charts: title, kind of entry in metrics.jsonl, key.
CURVES = [
    ("training loss", "train", "loss"),
    ("validation loss", "eval", "loss"),
    ("top-1 (%)", "eval", "top1"),
    ("mAP (%)", "eval", "map"),
    ("macro F1 (%)", "eval", "macro_f1"),
    ("balanced accuracy (%)", "eval", "balanced_accuracy"),
    ("expected calibration error (%)", "eval", "ece"),
    ("learning rate", "train", "lr"),
    ("gradient norm", "train", "grad_norm"),
    ("images per second", "train", "images_per_s"),
    ("data wait (share of time)", "train", "data_wait"),
    ("memory, maximum over ranks (MB)", "train", "memory_mb"),
    ("MFU (share of the peak rate)", "train", "mfu"),
]
NOISY_KEYS = frozenset({"loss", "grad_norm", "images_per_s", "data_wait", "mfu"})  # a running mean is drawn over them
LOG_SCALE_KEYS = frozenset({"loss", "lr", "grad_norm"})  # whose axis may be logarithmic
MAX_VISIBLE_EVALUATIONS = 12  # earlier ones are folded away
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write the page of a run to `path` (default: report.html in the run's folder), and return the path.

    Raises UserError if the folder is not a run's, or its log is still empty.
    """
    run = read_run(run_dir)
    return _render("run.html.j2", path or run_dir / REPORT_FILE, run.name, _run_page(run))


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that compares runs to `path`, and return the path. Raises UserError as `write_report` does."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    runs = [
        read_run(run_dir, name if names.count(name) == 1 else str(run_dir))
        for run_dir, name in zip(run_dirs, names, strict=True)
    ]
    return _render("comparison.html.j2", path, f"{len(runs)} runs", _comparison_page(runs))


def write_reports(run_dirs: Sequence[Path], out: Path | None) -> None:
    """Run the verb `report`: write the page of one run or the comparison of several, and print its path."""
    if out is not None and out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, such as {out / REPORT_FILE}")
    if len(run_dirs) == 1:
        print_line(write_report(run_dirs[0], out))
    else:
        print_line(write_comparison(run_dirs, out or Path(REPORT_FILE)))


def _render(template: str, path: Path, title: str, content: dict[str, Any]) -> Path:
    """Write a page from a template, and return its path. Unprintable characters and HTML of every text of `content` are
    escaped, but those of the charts, which are HTML whose texts charts.py has escaped."""
    page = (
        _environment()
        .get_template(template)
        .render(title=title, chart_style=charts.STYLE + RELIABILITY_STYLE, **content)
    )
    write_bytes(page.encode("utf-8", "backslashreplace"), path)
    return path


@cache
def _environment() -> Environment:
    """Return the environment that holds the compiled templates."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_escape_unless_html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )


def _escape_unless_html(value: Any) -> Any:
    return escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _chart(
    title: str, kind: str, key: str, series: Sequence[Series], last_step: int, marks: Sequence[Mark] = ()
) -> str:
    return charts.chart(
        f"{kind}-{key}",
        title,
        series,
        last_step,
        dots=kind == "eval",
        smooth=kind == "train" and key in NOISY_KEYS,
        may_be_log=key in LOG_SCALE_KEYS,
        marks=marks,
    )


# -- one run ---------------------------------------------------------------------------------------------------------


def _run_page(run: RunLogData) -> dict[str, Any]:
    """The content of templates/run.html.j2."""
    evaluations, earlier_evaluations = _evaluations(run)
    sessions, num_same_sessions = _sessions(run)
    return {
        "key_figures": _key_figures(run),
        "legend": _legend(run),
        "charts": _charts(run),
        "evaluations": evaluations,
        "earlier_evaluations": earlier_evaluations,
        "extra_evaluations": _extra_evaluations(run),
        "extra_chart": _extra_chart(run),
        "errors": None if run.error_analysis is None else error_section(run.error_analysis),
        "sessions": sessions,
        "num_same_sessions": num_same_sessions,
        "settings": _settings(run),
        "config_text": Markup(html.escape(escape_lines(run.config_text))),
    }


def _key_figures(run: RunLogData) -> dict[str, str]:
    """The figures at the top of the page, by name, as far as they are known."""
    best, rate, memory, parameters = run.best, run.images_per_s, run.peak_memory_mb, run.num_parameters
    metric, title = run.selection_metric, METRIC_TITLES[run.selection_metric]
    figures = {
        f"best {title}": best and f"{format_metric(metric, best[1])} at step {best[0]:,}",
        f"last {title}": run.selection_values and format_metric(metric, run.selection_values[-1][1]),
        "steps": f"{run.last_step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}"),
        "wall time": run.seconds and duration(run.seconds),
        "median images per second": rate and charts.format_number(rate),
        "peak memory per rank": memory and f"{memory:,.0f} MB",
        "parameters": parameters and f"{parameters:,}",
        "state": run.state,
        "lines of the log that can't be read": run.num_unread_lines and f"{run.num_unread_lines:,}",
    }
    return {name: str(figure) for name, figure in figures.items() if figure}


def _legend(run: RunLogData) -> str:
    if not run.has_ema:
        return ""
    return charts.legend([Series("weights", []), Series("moving average of the weights", [], 1, dashed=True)])


def _charts(run: RunLogData) -> list[str]:
    marks = [Mark(entry["step"], entry["event"], entry["event"] != "resumed") for entry in run.rewinds]
    drawings = []
    for title, kind, key in CURVES:
        series = [Series("weights", run.points(kind, key))]
        if kind == "eval":
            series.append(Series("moving average", run.points(kind, f"ema_{key}"), 1, dashed=True))
        drawings.append(_chart(title, kind, key, series, run.last_step, marks))
    return drawings


def _evaluations(run: RunLogData) -> tuple[Table, Table]:
    """The latest evaluations and the earlier ones, the latest first."""
    metrics = ["top1", "top5", "map", "macro_f1", "micro_f1", "balanced_accuracy", "ece", "loss"]
    columns = ["epoch", *metrics, *(f"ema_{name}" for name in metrics), "num_images"]
    columns = [name for name in columns if any(entry.get(name) is not None for entry in run.evaluations)]
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
    titles = {"top1": "top-1 %", "top5": "top-5 %", "mce": "mCE %", "mean_error": "mean corruption error %"}
    titles |= {"num_classes": "classes", "num_images": "images"}
    rows = [
        [name, f"{entry['step']:,}", *(_figure(key, entry.get(key)) for key in columns)]
        for name, entry in lasts.items()
    ]
    return Table(["set", "step", *(titles[key] for key in columns)], rows, 1)


def _extra_chart(run: RunLogData) -> str:
    series = [
        Series(name, [(entry["step"], float(entry["top1"])) for entry in entries], number)
        for number, (name, entries) in enumerate(run.extra_evaluations.items())
    ]
    if not series:
        return ""
    return charts.legend(series) + _chart("top-1 of the other sets (%)", EXTRA_EVAL, "top1", series, run.last_step)


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
            [_spaced(key), *(format_setting(column.get(key, MISSING)) for column in columns)]
            for key in dict.fromkeys(key for column in columns for key in column)
            if any(column.get(key) not in (None, []) for column in columns)
        ]
        differing_rows = {number for number, row in enumerate(rows) if len(set(row[1:])) > 1}
        if part == "environment":
            rows.append(["started", *(session.time for session in changed)])
        tables[heading] = Table(head, rows, 1 + len(changed), differing_rows)
    return tables, len(sessions) - len(changed)


def _spaced(key: str) -> str:
    return key if key == "vit_static" else key.replace("_", " ")


def _settings(run: RunLogData) -> Table | None:
    """The settings that differ from the defaults; None where the config can't be read."""
    if run.config is None:
        return None
    rows = [[key, format_setting(value), format_setting(default)] for key, value, default in run.changed_settings]
    return Table(["key", "value", "default"], rows, 3)


# -- several runs ----------------------------------------------------------------------------------------------------


def _comparison_page(runs: Sequence[RunLogData]) -> dict[str, Any]:
    """The content of templates/comparison.html.j2."""
    names = [run.name for run in runs]
    settings = [row for row in _differing_rows([run.config or {} for run in runs]) if row[0] != "name"]
    environment = [[_spaced(key), *values] for key, *values in _differing_rows([run.last_setup for run in runs])]
    return {
        "results": _results(runs),
        "legend": charts.legend([Series(name, [], number) for number, name in enumerate(names)]),
        "charts": _comparison_charts(runs),
        "settings": Table(["", *names], settings, 1 + len(names)),
        "environment": Table(["", *names], environment, 1 + len(names)),
    }


def _comparison_charts(runs: Sequence[RunLogData]) -> list[str]:
    last_step = max(run.last_step for run in runs)
    drawings = []
    for title, kind, key in CURVES:
        series = []
        for number, run in enumerate(runs):
            run_key = f"ema_{key}" if kind == "eval" and run.has_ema else key
            series.append(Series(run.name, run.points(kind, run_key), number))
        drawings.append(_chart(title, kind, key, series, last_step))
    return drawings


def _results(runs: Sequence[RunLogData]) -> Table:
    metrics = {run.selection_metric for run in runs}
    result = "result"
    if len(metrics) == 1:
        (metric,) = metrics
        result = f"{METRIC_TITLES[metric]} {metric_unit(metric)}".rstrip()
    head = [
        "run",
        f"best {result}",
        "at step",
        f"last {result}",
        "steps",
        "median images/s",
        "wall time",
        "peak memory, MB",
        "parameters",
        "state",
    ]
    rows = [
        [
            run.name,
            _result(run, run.best, with_title=len(metrics) > 1),
            f"{run.best[0]:,}" if run.best else "",
            _result(run, run.selection_values[-1] if run.selection_values else None, with_title=len(metrics) > 1),
            f"{run.last_step:,}",
            charts.format_number(run.images_per_s) if run.images_per_s else "",
            duration(run.seconds) if run.seconds else "",
            f"{run.peak_memory_mb:,.0f}" if run.peak_memory_mb else "",
            f"{run.num_parameters:,}" if run.num_parameters else "",
            run.state,
        ]
        for run in runs
    ]
    return Table(head, rows, 1)


def _result(run: RunLogData, point: tuple[int, float] | None, *, with_title: bool) -> str:
    """A value of eval.metric, with its title and unit where the column's head has none."""
    if point is None:
        return ""
    text = format_metric(run.selection_metric, point[1])
    return f"{METRIC_TITLES[run.selection_metric]} {text}" if with_title else text.removesuffix(" %")


def _differing_rows(values_by_run: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per key whose values differ: the key, then each run's value."""
    first = values_by_run[0]
    return [
        [key, *(format_setting(values.get(key, MISSING)) for values in values_by_run)]
        for key in dict.fromkeys(key for values in values_by_run for key in values)
        if any(values.get(key, MISSING) != first.get(key, MISSING) for values in values_by_run)
    ]
