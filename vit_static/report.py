"""``report.html``: a run in one self-contained file, from its folder alone; and several runs side by side."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_static import charts, history
from vit_static.charts import Mark, Series
from vit_static.config import UserError
from vit_static.files import write_atomically
from vit_static.history import Run, Session
from vit_static.log import duration
from vit_static.mistakes import Mistakes

FILE = "report.html"
# What is drawn: the title, the kind of line in metrics.jsonl, the key; noise is smoothed, evaluations are dots
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
_LONGEST_NAME = 60  # of a class, a path's end, a value of the config, in characters
_ROWS_IN_SIGHT = 12  # of the evaluations; more are folded away

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --line: #ddd; --panel: #f5f5f5; --page: #fff; }
@media (prefers-color-scheme: dark) { @media screen {
  :root { --ink: #e6e6e6; --soft: #a0a0a0; --line: #3a3a3a; --panel: #222; --page: #161616; } } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 66em; padding: 0 1em; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.5em; margin: 0; } h2 { font-size: 1.15em; margin: 2em 0 .5em; } h3 { font-size: 1em; }
.soft, figcaption, footer { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .5em 2em; margin: 1em 0; padding: 0; }
.facts div { min-width: 7em; } .facts dt { color: var(--soft); font-size: .85em; } .facts dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0 1em; }
td, th { text-align: right; padding: .15em .8em; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } .text td, .text th, td.text, th.text { text-align: left; overflow-wrap: anywhere; }
tr.differs td { font-weight: 600; } tr.best td { font-weight: 600; }
pre { background: var(--panel); padding: 1em; overflow: auto; font-size: 13px; }
summary { cursor: pointer; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3em; align-items: flex-start; }
.matrix td { width: 1.9em; min-width: 1.9em; padding: .1em; text-align: center; font-size: 12px;
  border: 1px solid var(--line); }
.matrix th { border: 0; font-weight: 400; font-size: 12px; padding: .1em .5em; white-space: nowrap; }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .4em 0; }
.gallery { display: flex; flex-wrap: wrap; gap: 1em; }
.gallery figure { margin: 0; width: 144px; break-inside: avoid; }
.gallery img, .gallery .none { width: 144px; height: 144px; object-fit: contain; background: var(--panel);
  display: block; }
.gallery figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.gallery b { color: var(--ink); }
@media print { body { max-width: none; margin: 0; font-size: 11px; } }
"""


def write(run_dir: Path, path: Path | None = None) -> Path:
    """Writes a run's page anew, into its folder where no other path is given; the path."""
    run = history.read(run_dir)
    return _write(path or run_dir / FILE, run.name, _of_one(run))


def write_several(run_dirs: Sequence[Path], path: Path) -> Path:
    """A page of runs side by side; the path."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    runs = [
        history.read(run_dir, name if names.count(name) == 1 else str(run_dir))
        for run_dir, name in zip(run_dirs, names, strict=True)
    ]
    return _write(path, f"{len(runs)} runs", _of_several(runs))


def run(run_dirs: Sequence[Path], out: Path | None) -> None:
    """The verb. Raises UserError for what is no run's folder."""
    if out is not None and out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, such as {out / FILE}")
    for_several = Path(FILE) if out is None else out
    print(write(run_dirs[0], out) if len(run_dirs) == 1 else write_several(run_dirs, for_several))


def _write(path: Path, title: str, body: str) -> Path:
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}{charts.STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


# -- one run ----------------------------------------------------------------------------------------------------------


def _of_one(run: Run) -> str:
    return "\n".join(
        part
        for part in (
            f"<h1>{_text(run.name)}</h1>",
            _facts(run),
            _curves_of_one(run),
            _evaluations(run),
            _mistakes(run.mistakes),
            _sessions(run.sessions),
            _config(run),
        )
        if part
    )


def _facts(run: Run) -> str:
    facts = {
        "best top-1": None if run.best is None else f"{run.best[1]:.2f} % at step {run.best[0]:,}",
        "last top-1": f"{run.judged[-1][1]:.2f} %" if run.judged else None,
        "steps": f"{run.last_step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}"),
        "wall time": None if run.seconds is None else duration(run.seconds),
        "images a second, median": None if run.images_per_s is None else charts.number(run.images_per_s),
        "peak memory of a rank": None if run.peak_memory_mb is None else f"{run.peak_memory_mb:,.0f} MB",
        "parameters": None if run.num_parameters is None else f"{run.num_parameters:,}",
        "state": run.state,
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{_text(said)}</dd></div>" for name, said in facts.items() if said)
    return f'<dl class="facts">{items}</dl>'


def _curves_of_one(run: Run) -> str:
    marks = [Mark(entry["step"], entry["event"], entry["event"] != "resumed") for entry in run.gone_back]
    drawn = []
    for title, kind, key in CURVES:
        series = [Series("weights", run.points(kind, key))]
        if kind == "eval":
            series.append(Series("moving average", run.points(kind, f"ema_{key}"), 1, dashed=True))
        drawn.append(_chart(title, kind, key, series, marks))
    averaged = any("ema_top1" in entry for entry in run.evaluations)
    both = [Series("weights", []), Series("their moving average", [], 1, dashed=True)]
    return f"<h2>Curves</h2>{charts.legend(both) if averaged else ''}<div>{''.join(drawn)}</div>"


def _chart(title: str, kind: str, key: str, series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    is_eval = kind == "eval"
    return charts.chart(f"{kind}-{key}", title, series, dots=is_eval, smooth=not is_eval and key != "lr", marks=marks)


def _evaluations(run: Run) -> str:
    columns = ["epoch", "top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "num_images"]
    columns = [name for name in columns if any(entry.get(name) is not None for entry in run.evaluations)]
    heads = {"top1": "top-1 %", "top5": "top-5 %", "num_images": "images"}
    heads |= {f"ema_{name}": f"average's {heads.get(name, name)}" for name in ("top1", "top5", "loss")}
    best = None if run.best is None else run.best[0]
    rows = [
        (
            f"<tr{' class=best' if entry['step'] == best else ''}>",
            [f"{entry['step']:,}", *(_figure(name, entry.get(name)) for name in columns)],
        )
        for entry in reversed(run.evaluations)
    ]
    if not rows:
        return ""
    head = ["step", *(heads.get(name, name) for name in columns)]
    said = '<h2>Evaluations</h2><p class="soft">The latest first; the best in bold.</p>'
    said += _table(head, rows[:_ROWS_IN_SIGHT])
    if len(rows) > _ROWS_IN_SIGHT:
        said += _folded(f"{len(rows) - _ROWS_IN_SIGHT} earlier ones", _table(head, rows[_ROWS_IN_SIGHT:]))
    return said


def _figure(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    decimals = {"loss": 4, "ema_loss": 4, "num_images": 0}.get(name, 2)
    return f"{value:,.{decimals}f}"


def _sessions(sessions: Sequence[Session]) -> str:
    """A column for each beginning whose mesh or environment is another than the one before."""
    changed = [
        session
        for before, session in zip([None, *sessions], sessions, strict=False)
        if session.facts and (before is None or session.facts != before.facts)
    ]
    if not changed:
        return "<h2>Mesh and environment</h2><p>Not in the log: the run is of an earlier version.</p>"
    head = ["", *(f"{session.event}, step {session.step:,}" for session in changed)]
    parts = []
    for title, part in (("Mesh", "mesh"), ("Environment", "environment")):
        found = [session.facts.get(part, {}) for session in changed]
        rows = [
            [key.replace("_", " "), *(_said(facts.get(key)) for facts in found)]
            for key in dict.fromkeys(key for facts in found for key in facts)
            if any(facts.get(key) not in (None, []) for facts in found)
        ]
        if part == "environment":
            rows.append(["begun", *(session.time for session in changed)])
        parts.append(f"<div><h2>{title}</h2>{_table(head if len(changed) > 1 else None, _marked(rows), 'text')}</div>")
    others = len(sessions) - len(changed)
    note = f"<p class=soft>{others} other beginnings were on the same mesh and machines.</p>" if others else ""
    return f'<div class="beside">{"".join(parts)}</div>{note}'


def _config(run: Run) -> str:
    if run.config is None:
        whole = _folded("config.yaml", f"<pre>{_text(run.config_text)}</pre>") if run.config_text else ""
        return f"<h2>Config</h2><p>config.yaml can't be read.</p>{whole}"
    rows = [("<tr>", [key, _said(value), _said(default)]) for key, value, default in run.differences]
    return (
        f'<h2>Config</h2><p class="soft">What differs from the defaults.</p>'
        f"{_table(['key', 'value', 'default'], rows, 'text')}"
        f"{_folded('Everything: config.yaml, to be used again with -c', f'<pre>{_text(run.config_text)}</pre>')}"
    )


# -- what the model has wrong -----------------------------------------------------------------------------------------


def _mistakes(found: Mistakes | None) -> str:
    if found is None:
        return ""
    whose = "the weights' moving average" if found.of_average else "the weights"
    said = (
        f"<h2>Mistakes</h2><p>Of the last evaluation, at step {found.step:,}, of {whose}: "
        f"{found.num_images - found.num_hits:,} of {found.num_images:,} images.</p>"
    )
    if found.confusions is None or found.classes is None:
        said += (
            "<p>Images may have several labels here, and a hit is one whose likeliest class is among them. Which label "
            "was taken for which can't be told, so there are no confusions.</p>"
        )
    else:
        said += _matrix(found) if found.matrix else ""
        confused = [
            ("<tr>", [_named(found, one.label), _named(found, one.predicted), f"{one.num_images:,}"])
            for one in found.confusions
        ]
        classes = [
            (
                "<tr>",
                [_named(found, one.label), f"{100 * one.num_hits / one.num_images:.1f}", f"{one.num_images:,}"],
            )
            for one in found.classes
        ]
        of_classes = _table(["class", "top-1 %", "images"], classes, "named")
        said += f'<div class="beside"><div><h3>The worst classes</h3>{of_classes}</div>'
        if confused:
            pairs = _table(["class", "taken for", "images"], confused, "named")
            said += f"<div><h3>The most frequent confusions</h3>{pairs}</div>"
        said += "</div>"
    return said + _gallery(found)


def _matrix(found: Mistakes) -> str:
    assert found.matrix is not None
    names = [_named(found, number) for number in range(len(found.matrix))]
    rows = []
    for label, counts in enumerate(found.matrix):
        total = sum(counts)
        cells = []
        for predicted, count in enumerate(counts):
            if not count:
                cells.append("<td></td>")
                continue
            rgb = "0 114 178" if label == predicted else "213 94 0"
            title = f"{names[label]} taken for {names[predicted]}: {count:,} of {total:,}"
            share = 0.15 + 0.75 * count / total
            cells.append(f'<td style="background:rgb({rgb}/{share:.2f})" title="{_text(title)}">{count}</td>')
        rows.append(f"<tr><th>{_text(names[label])}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    return (
        '<h3>Images by class (rows) and by what they were taken for (columns)</h3><div class="wide">'
        f'<table class="matrix"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _gallery(found: Mistakes) -> str:
    if not found.images:
        return ""
    figures = []
    for image in found.images:
        labels = ", ".join(_named(found, label) for label in image.labels) or "?"
        predicted = _named(found, image.predicted)
        probability = "" if image.probability is None else f" ({100 * image.probability:.1f} %)"
        loss = "no number" if image.loss is None else charts.number(image.loss)
        alt = f"{labels}, taken for {predicted}"
        picture = (
            f'<img alt="{_text(alt)}" src="data:image/jpeg;base64,{image.thumbnail}">'
            if image.thumbnail
            else '<span class="none"></span>'
        )
        figures.append(
            f"<figure>{picture}<figcaption><b>{_text(labels)}</b> taken for <b>{_text(predicted)}</b>"
            f"{probability}<br>loss {loss}<br>{_text(image.path)}</figcaption></figure>"
        )
    return f'<h3>The wrong images of the greatest loss</h3><div class="gallery">{"".join(figures)}</div>'


def _named(found: Mistakes, number: int) -> str:
    name = found.class_names.get(number, str(number))
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"


# -- several runs -----------------------------------------------------------------------------------------------------


def _of_several(runs: Sequence[Run]) -> str:
    names = [Series(run.name, [], number) for number, run in enumerate(runs)]
    drawn = []
    for title, kind, key in CURVES:
        series = [
            Series(run.name, run.points(kind, f"ema_{key}" if _is_averaged(run, kind) else key), number)
            for number, run in enumerate(runs)
        ]
        drawn.append(_chart(title, kind, key, series))
    return "\n".join(
        [
            f"<h1>{len(runs)} runs</h1>",
            charts.legend(names),
            _results(runs),
            '<h2>Curves</h2><p class="soft">Evaluations are of the weights\' moving average where a run has one.</p>',
            f"<div>{''.join(drawn)}</div>",
            _config_differences(runs),
            _fact_differences(runs),
        ]
    )


def _is_averaged(run: Run, kind: str) -> bool:
    return kind == "eval" and any("ema_top1" in entry for entry in run.evaluations)


def _results(runs: Sequence[Run]) -> str:
    head = ["run", "best top-1 %", "at step", "last top-1 %", "steps", "images a second, median", "wall time"]
    rows = [
        (
            "<tr>",
            [
                run.name,
                "" if run.best is None else f"{run.best[1]:.2f}",
                "" if run.best is None else f"{run.best[0]:,}",
                f"{run.judged[-1][1]:.2f}" if run.judged else "",
                f"{run.last_step:,}",
                "" if run.images_per_s is None else charts.number(run.images_per_s),
                "" if run.seconds is None else duration(run.seconds),
                "" if run.peak_memory_mb is None else f"{run.peak_memory_mb:,.0f}",
                "" if run.num_parameters is None else f"{run.num_parameters:,}",
                run.state,
            ],
        )
        for run in runs
    ]
    return f"<h2>Results</h2>{_table([*head, 'peak memory, MB', 'parameters', 'state'], rows)}"


def _config_differences(runs: Sequence[Run]) -> str:
    configs = [run.config or {} for run in runs]
    rows = [
        ("<tr>", [key, *(_said(config.get(key, _MISSING)) for config in configs)])
        for key in dict.fromkeys(key for config in configs for key in config)
        if any(config.get(key, _MISSING) != configs[0].get(key, _MISSING) for config in configs)
    ]
    if not rows:
        return "<h2>Config</h2><p>The runs' configs are the same.</p>"
    head = ["key", *(run.name for run in runs)]
    return f"<h2>Config: where the runs differ</h2>{_table(head, rows, 'text')}"


def _fact_differences(runs: Sequence[Run]) -> str:
    """Of the last beginning of each."""
    facts = [
        {key: value for part in session.facts.values() for key, value in part.items()}
        for run in runs
        for session in [*run.sessions, Session(0, "", "", {})][max(len(run.sessions) - 1, 0) :][:1]
    ]
    rows = [
        ("<tr>", [key.replace("_", " "), *(_said(of_run.get(key, _MISSING)) for of_run in facts)])
        for key in dict.fromkeys(key for of_run in facts for key in of_run)
        if any(of_run.get(key, _MISSING) != facts[0].get(key, _MISSING) for of_run in facts)
    ]
    if not rows:
        return ""
    head = ["", *(run.name for run in runs)]
    return f"<h2>Mesh and environment: where the runs differ</h2>{_table(head, rows, 'text')}"


# -- pieces of HTML ---------------------------------------------------------------------------------------------------

_MISSING = object()


def _text(text: str) -> str:
    """As HTML, in an element as in an attribute."""
    return html.escape(text)


def _said(value: Any) -> str:
    """A value of a config or a log, as YAML has it."""
    if value is _MISSING:
        return "not there"
    text = value if isinstance(value, str) else getattr(value, "text", None) or json.dumps(value, default=str)
    return text if len(text) <= 4 * _LONGEST_NAME else f"{text[: 4 * _LONGEST_NAME]}…"


def _marked(rows: Sequence[list[str]]) -> list[tuple[str, list[str]]]:
    """Rows whose values differ stand out."""
    return [("<tr class=differs>" if len(set(row[1:])) > 1 else "<tr>", row) for row in rows]


def _table(head: Sequence[str] | None, rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Of texts; a row has its opening tag before it. `kind`: text, all to the left; named, the first column(s)."""
    top = "" if head is None else f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>"
    body = "".join(f"{tag}{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>" for tag, cells in rows)
    return f'<div class="wide"><table class="{kind}">{top}{body}</table></div>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"
