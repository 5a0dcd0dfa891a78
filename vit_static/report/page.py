"""`report.html`: one run, or several side by side, as a self-contained HTML file with charts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vit_static.common.errors import UserError, escape
from vit_static.common.io import write_bytes
from vit_static.common.text import counted, print_line, say
from vit_static.report.charts import as_json
from vit_static.report.comparison_page import comparison_page
from vit_static.report.curves import timeline_data
from vit_static.report.run_log import METRICS_FILE, RunLogData, read_run
from vit_static.report.run_page import relative_url, run_page

REPORT_FILE = "report.html"
REFRESH_S = 10.0  # between two reloads of the page of a run that goes on
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_LIBRARY_FILES = ("bokeh.min.js", "bokeh-api.min.js")  # of Bokeh's package, in the order of loading


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write the page of a run to `path` (default: report.html in the run's folder), and return the path.

    Raises UserError if the folder is not a run's, or its log is still empty.
    """
    path = path or run_dir / REPORT_FILE
    run = read_run(run_dir)
    _say_unread(run, run_dir)
    return _write_run_page(run, run_dir, path, is_live=False)


def write_live_report(run_dir: Path) -> bool:
    """Write report.html for the run itself, which goes on unless its log has an end, and return whether it does.

    Then the page reloads itself. Raises UserError as `write_report` does.
    """
    run = read_run(run_dir)
    _write_run_page(run, run_dir, run_dir / REPORT_FILE, is_live=not run.has_ended)
    return not run.has_ended


def _write_run_page(run: RunLogData, run_dir: Path, path: Path, *, is_live: bool) -> Path:
    return _render("run.html.j2", path, run.name, [run], run_page(run, run_dir, path, is_live=is_live), is_live)


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that compares runs to `path`, and return the path. Raises UserError as `write_report` does."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    runs = [
        read_run(run_dir, name if names.count(name) == 1 else str(run_dir))
        for run_dir, name in zip(run_dirs, names, strict=True)
    ]
    for run, run_dir in zip(runs, run_dirs, strict=True):
        _say_unread(run, run_dir)
    pages = [run_dir / REPORT_FILE for run_dir in run_dirs]
    urls = [relative_url(page, path) if page.is_file() and page.resolve() != path.resolve() else None for page in pages]
    return _render("comparison.html.j2", path, f"{len(runs)} runs", runs, comparison_page(runs, urls))


def _say_unread(run: RunLogData, run_dir: Path) -> None:
    if run.num_unread_lines:
        say(f"{run_dir / METRICS_FILE}: {counted(run.num_unread_lines, 'unreadable line')} left out")


def write_reports(run_dirs: Sequence[Path], out: Path | None) -> None:
    """Run the verb `report`: write the page of one run or the comparison of several, and print its path."""
    if out is not None and out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, such as {out / REPORT_FILE}")
    if len(run_dirs) == 1:
        print_line(write_report(run_dirs[0], out))
    else:
        print_line(write_comparison(run_dirs, out or Path(REPORT_FILE)))


def _render(
    template: str, path: Path, title: str, runs: Sequence[RunLogData], content: dict[str, Any], is_live: bool = False
) -> Path:
    """Write a page from a template, and return its path. Unprintable characters and HTML of every text of `content` are
    escaped, but those of the charts, which are HTML whose texts charts.py has escaped."""
    page_data = {
        "runs": [timeline_data(run) for run in runs],
        "refresh_s": REFRESH_S if is_live else None,
        "written": round(time.time()) if is_live else None,  # a finished run's page is always the same
    }
    text = (
        _environment()
        .get_template(template)
        .render(title=title, page_data=Markup(as_json(page_data)), library=_library(), is_live=is_live, **content)
    )
    write_bytes(text.encode("utf-8", "backslashreplace"), path)
    return path


@cache
def _library() -> Markup:
    """Return the scripts of BokehJS, which is a part of Bokeh's package. Bokeh itself isn't imported: building and
    encoding the charts in Python takes seconds, which a run would lose at each log step."""
    package = find_spec("bokeh")
    if package is None or package.origin is None:
        raise UserError("the report needs Bokeh's JavaScript, and the package bokeh is missing; run ./run.sh setup")
    folder = Path(package.origin).parent / "server" / "static" / "js"
    scripts = [(folder / name).read_text("utf-8").replace("</script", "<\\/script") for name in _LIBRARY_FILES]
    return Markup("".join(f"<script>{script}</script>\n" for script in scripts))


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
