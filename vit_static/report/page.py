"""``report.html``: a run in one self-contained file, from its folder alone; and several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_static.common.errors import UserError
from vit_static.common.io import write_atomically
from vit_static.common.text import duration
from vit_static.report import charts, error_section
from vit_static.report.charts import Mark, Series
from vit_static.report.html import MISSING, STYLE, escaped, folded, said_of, table
from vit_static.report.run_log import RunLogData, Session, read_run

REPORT_FILE = "report.html"
# What is drawn: the title, the kind of line in metrics.jsonl, the key
CURVES = [
    ("training loss", "train", "loss"),
    ("validation loss", "eval", "loss"),
    ("top-1 (%)", "eval", "top1"),
    ("learning rate", "train", "lr"),
    ("gradient norm", "train", "grad_norm"),
    ("images a second", "train", "images_per_s"),
    ("data wait (share of the time)", "train", "data_wait"),
    ("memory of the fullest rank (MB)", "train", "memory_mb"),
    ("MFU (share of the peak rate)", "train", "mfu"),
]
NOISY = frozenset({"loss", "grad_norm", "images_per_s", "data_wait", "mfu"})  # of training: a mean is drawn over them
OF_ANY_SIZE = frozenset({"loss", "lr", "grad_norm"})
_ROWS_IN_SIGHT = 12  # of the evaluations; more are folded away


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Writes a run's page anew, into its folder where no other path is given; the path."""
    run = read_run(run_dir)
    return _write(path or run_dir / REPORT_FILE, run.name, _single_run(run))


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """A page of runs side by side; the path."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    runs = [
        read_run(run_dir, name if names.count(name) == 1 else str(run_dir))
        for run_dir, name in zip(run_dirs, names, strict=True)
    ]
    return _write(path, f"{len(runs)} runs", _several_runs(runs))


def write_reports(run_dirs: Sequence[Path], out: Path | None) -> None:
    """The verb. Raises UserError for what is no run's folder."""
    if out is not None and out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, such as {out / REPORT_FILE}")
    print(
        write_report(run_dirs[0], out) if len(run_dirs) == 1 else write_comparison(run_dirs, out or Path(REPORT_FILE))
    )


def _write(path: Path, title: str, body: str) -> Path:
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}{charts.STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


def _chart(
    title: str, kind: str, key: str, series: Sequence[Series], last_step: int, marks: Sequence[Mark] = ()
) -> str:
    return charts.chart(
        f"{kind}-{key}",
        title,
        series,
        last_step,
        dots=kind == "eval",
        smooth=kind == "train" and key in NOISY,
        may_be_log=key in OF_ANY_SIZE,
        marks=marks,
    )


# -- one run ---------------------------------------------------------------------------------------------------------


def _single_run(run: RunLogData) -> str:
    parts = [
        f"<h1>{escaped(run.name)}</h1>",
        _facts(run),
        _curves(run),
        _evaluations(run),
        error_section.section(run.mistakes),
        _sessions(run.sessions),
        _config(run),
    ]
    return "\n".join(part for part in parts if part)


def _facts(run: RunLogData) -> str:
    best, rate, memory, parameters = run.best, run.images_per_s, run.peak_memory_mb, run.num_parameters
    facts = {
        "best top-1": best and f"{best[1]:.2f} % at step {best[0]:,}",
        "last top-1": run.judged and f"{run.judged[-1][1]:.2f} %",
        "steps": f"{run.last_step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}"),
        "wall time": run.seconds and duration(run.seconds),
        "images a second, median": rate and charts.number(rate),
        "peak memory of a rank": memory and f"{memory:,.0f} MB",
        "parameters": parameters and f"{parameters:,}",
        "state": run.state,
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{escaped(str(said))}</dd></div>" for name, said in facts.items() if said)
    return f'<dl class="facts">{items}</dl>'


def _curves(run: RunLogData) -> str:
    marks = [Mark(entry["step"], entry["event"], entry["event"] != "resumed") for entry in run.gone_back]
    drawn = []
    for title, kind, key in CURVES:
        series = [Series("weights", run.points(kind, key))]
        if kind == "eval":
            series.append(Series("moving average", run.points(kind, f"ema_{key}"), 1, dashed=True))
        drawn.append(_chart(title, kind, key, series, run.last_step, marks))
    both = [Series("weights", []), Series("their moving average", [], 1, dashed=True)]
    return f"<h2>Curves</h2>{charts.legend(both) if run.is_averaged else ''}<div>{''.join(drawn)}</div>"


def _evaluations(run: RunLogData) -> str:
    columns = ["epoch", "top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "num_images"]
    columns = [name for name in columns if any(entry.get(name) is not None for entry in run.evaluations)]
    heads = {"top1": "top-1 %", "top5": "top-5 %", "num_images": "images"}
    heads |= {f"ema_{name}": f"average's {heads.get(name, name)}" for name in ("top1", "top5", "loss")}
    head = ["step", *(heads.get(name, name) for name in columns)]
    latest_first = run.evaluations[::-1]
    rows = [[f"{entry['step']:,}", *(_figure(name, entry.get(name)) for name in columns)] for entry in latest_first]
    best = {
        number for number, entry in enumerate(latest_first) if run.best is not None and entry["step"] == run.best[0]
    }
    if not rows:
        return ""
    said = '<h2>Evaluations</h2><p class="soft">The latest first; the best in bold.</p>'
    said += table(head, rows[:_ROWS_IN_SIGHT], 0, best)
    if len(rows) > _ROWS_IN_SIGHT:
        of_rest = {number - _ROWS_IN_SIGHT for number in best}
        rest = table(head, rows[_ROWS_IN_SIGHT:], 0, of_rest)
        said += folded(f"{len(rows) - _ROWS_IN_SIGHT} earlier ones", rest)
    return said


def _figure(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    decimals = {"loss": 4, "ema_loss": 4, "num_images": 0}.get(name, 2)
    return f"{value:,.{decimals}f}"


def _sessions(sessions: Sequence[Session]) -> str:
    """A column for each beginning whose mesh or environment is another than that of the one before."""
    changed = [
        session
        for number, session in enumerate(sessions)
        if session.facts and (number == 0 or session.facts != sessions[number - 1].facts)
    ]
    if not changed:
        return "<h2>Mesh and environment</h2><p>Not in the log: the run is of an earlier version.</p>"
    head = ["", *(f"{session.event}, step {session.step:,}" for session in changed)] if len(changed) > 1 else None
    parts = []
    for title, part in (("Mesh", "mesh"), ("Environment", "environment")):
        found = [session.facts.get(part, {}) for session in changed]
        rows = [
            [_words(key), *(said_of(facts.get(key, MISSING)) for facts in found)]
            for key in dict.fromkeys(key for facts in found for key in facts)
            if any(facts.get(key) not in (None, []) for facts in found)
        ]
        differing = {number for number, row in enumerate(rows) if len(set(row[1:])) > 1}
        if part == "environment":
            rows.append(["begun", *(session.time for session in changed)])
        parts.append(f"<div><h2>{title}</h2>{table(head, rows, 1 + len(changed), differing)}</div>")
    others = len(sessions) - len(changed)
    note = f'<p class="soft">Other beginnings, on the same mesh and machines: {others}.</p>' if others else ""
    return f'<div class="beside">{"".join(parts)}</div>{note}'


def _words(key: str) -> str:
    return key if key == "vit_static" else key.replace("_", " ")


def _config(run: RunLogData) -> str:
    whole = f"<pre>{escaped(run.config_text)}</pre>"
    if run.config is None:
        return f"<h2>Config</h2><p>config.yaml isn't there, or is none.</p>{whole if run.config_text else ''}"
    rows = [[key, said_of(value), said_of(default)] for key, value, default in run.differences]
    return (
        '<h2>Config</h2><p class="soft">What differs from the defaults.</p>'
        f"{table(['key', 'value', 'default'], rows, 3)}"
        f"{folded('Everything: config.yaml, to be used again with -c', whole)}"
    )


# -- several runs ----------------------------------------------------------------------------------------------------


def _several_runs(runs: Sequence[RunLogData]) -> str:
    last_step = max(run.last_step for run in runs)
    drawn = []
    for title, kind, key in CURVES:
        series = []
        for number, run in enumerate(runs):
            own_key = f"ema_{key}" if kind == "eval" and run.is_averaged else key
            series.append(Series(run.name, run.points(kind, own_key), number))
        drawn.append(_chart(title, kind, key, series, last_step))
    names = [Series(run.name, [], number) for number, run in enumerate(runs)]
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        _results(runs),
        '<h2>Curves</h2><p class="soft">Evaluations are of the weights\' moving average where a run has one.</p>',
        f"{charts.legend(names)}<div>{''.join(drawn)}</div>",
        _differences(runs),
    ]
    return "\n".join(parts)


def _results(runs: Sequence[RunLogData]) -> str:
    head = [
        "run",
        "best top-1 %",
        "at step",
        "last top-1 %",
        "steps",
        "images/s, median",
        "wall time",
        "peak memory, MB",
    ]
    rows = [
        [
            run.name,
            f"{run.best[1]:.2f}" if run.best else "",
            f"{run.best[0]:,}" if run.best else "",
            f"{run.judged[-1][1]:.2f}" if run.judged else "",
            f"{run.last_step:,}",
            charts.number(run.images_per_s) if run.images_per_s else "",
            duration(run.seconds) if run.seconds else "",
            f"{run.peak_memory_mb:,.0f}" if run.peak_memory_mb else "",
            f"{run.num_parameters:,}" if run.num_parameters else "",
            run.state,
        ]
        for run in runs
    ]
    return f"<h2>Results</h2>{table([*head, 'parameters', 'state'], rows, 1)}"


def _differences(runs: Sequence[RunLogData]) -> str:
    head = ["", *(run.name for run in runs)]
    said = "<h2>Config: where the runs differ</h2>"
    of_configs = [row for row in _rows_that_differ([run.config or {} for run in runs]) if row[0] != "name"]
    said += table(head, of_configs, len(head)) if of_configs else "<p>Nowhere.</p>"
    of_machines = _rows_that_differ([run.last_facts for run in runs])
    if of_machines:
        rows = [[_words(key), *values] for key, *values in of_machines]
        said += f"<h2>Mesh and environment: where the runs differ</h2>{table(head, rows, len(head))}"
    return said


def _rows_that_differ(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row a key: the key, and what each has of it."""
    return [
        [key, *(said_of(of_run.get(key, MISSING)) for of_run in found)]
        for key in dict.fromkeys(key for of_run in found for key in of_run)
        if any(of_run.get(key, MISSING) != found[0].get(key, MISSING) for of_run in found)
    ]
