"""The content of the page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vit_static.common.text import duration
from vit_static.report.charts import Line, format_number
from vit_static.report.curves import CURVES, Toggle, line_chart
from vit_static.report.metric_names import METRIC_TITLES, format_metric, metric_unit
from vit_static.report.run_log import RunLogData
from vit_static.report.tables import MISSING, Table, escape_html, format_setting, spaced


def comparison_page(runs: Sequence[RunLogData], urls: Sequence[str | None]) -> dict[str, Any]:
    """Return the content of templates/comparison.html.j2. `urls`: of the runs' own pages, None without one."""
    names = [run.name for run in runs]
    settings = [row for row in _differing_rows([run.config or {} for run in runs]) if row[0] != "name"]
    environment = [[spaced(key), *values] for key, *values in _differing_rows([run.last_setup for run in runs])]
    return {
        "results": _results(runs, urls),
        "toggles": [Toggle(name, number) for number, name in enumerate(names)],
        "charts": _comparison_charts(runs),
        "settings": Table(["", *names], settings, 1 + len(names)),
        "environment": Table(["", *names], environment, 1 + len(names)),
    }


def _comparison_charts(runs: Sequence[RunLogData]) -> list[str]:
    drawings = []
    for title, kind, key in CURVES:
        lines = []
        for number, run in enumerate(runs):
            run_key = f"ema_{key}" if kind == "eval" and run.has_ema else key
            if key != "top5" or run.has_top5:
                lines.append(Line(run.name, run.points(kind, run_key), number, number))
        drawings.append(line_chart(title, kind, key, lines))
    return drawings


def _results(runs: Sequence[RunLogData], urls: Sequence[str | None]) -> Table:
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
        "median MFU, %",
        "wall time",
        "peak memory, MB",
        "parameters",
        "state",
    ]
    rows = [
        [
            run.name if url is None else Markup(f'<a href="{escape_html(url)}">{escape_html(run.name)}</a>'),
            _result(run, run.best, with_title=len(metrics) > 1),
            f"{run.best[0]:,}" if run.best else "",
            _result(run, run.selection_values[-1] if run.selection_values else None, with_title=len(metrics) > 1),
            f"{run.last_step:,}",
            format_number(run.images_per_s) if run.images_per_s else "",
            f"{100.0 * run.mfu:.1f}" if run.mfu else "",
            duration(run.seconds) if run.seconds else "",
            f"{run.peak_memory_mb:,.0f}" if run.peak_memory_mb else "",
            f"{run.num_parameters:,}" if run.num_parameters else "",
            run.state,
        ]
        for run, url in zip(runs, urls, strict=True)
    ]
    columns = [number for number in range(len(head)) if any(row[number] for row in rows)]  # the MFU may be unknown
    return Table([head[number] for number in columns], [[row[number] for number in columns] for row in rows], 1)


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
