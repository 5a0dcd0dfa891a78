"""``report.html``: a run's curves and tables in one self-contained file, from its metrics.jsonl and config.yaml."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from vit_static.files import write_atomically

# What is drawn: the title, the kind of line in metrics.jsonl, the key
CURVES = [
    ("training loss", "train", "loss"),
    ("validation loss", "eval", "loss"),
    ("top-1 (%)", "eval", "top1"),
    ("learning rate", "train", "lr"),
    ("gradient norm", "train", "grad_norm"),
    ("images a second", "train", "images_per_s"),
    ("data wait (share of the time)", "train", "data_wait"),
]
WIDTH, HEIGHT, MARGIN = 420, 200, 44

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }}
svg {{ width: {width}px; margin: 0 1em 1em 0; }}
text {{ font: 11px sans-serif; fill: #666; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
td, th {{ text-align: right; padding: .15em .8em; border-bottom: 1px solid #ddd; }}
pre {{ background: #f6f6f6; padding: 1em; overflow: auto; }}
</style></head><body>
<h1>{name}</h1>
<p>{summary}</p>
{curves}
<h2>Evaluations</h2>
{table}
<h2>Config</h2>
<pre>{config}</pre>
</body></html>
"""


def write(run_dir: Path) -> Path:
    """Writes the run's report.html anew."""
    entries = of_last_run(read_metrics(run_dir / "metrics.jsonl"))
    evaluations = [entry for entry in entries if entry["kind"] == "eval"]
    best = max((entry["top1"] for entry in evaluations), default=None)
    last_step = max((entry["step"] for entry in entries), default=0)
    page = _PAGE.format(
        name=html.escape(run_dir.name),
        width=WIDTH,
        summary=f"{last_step} steps; best top-1 {'none yet' if best is None else f'{best:.2f} %'}",
        curves="\n".join(curve(title, points(entries, kind, key)) for title, kind, key in CURVES),
        table=_table(evaluations),
        config=html.escape((run_dir / "config.yaml").read_text(encoding="utf-8")),
    )
    path = run_dir / "report.html"
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that a killed run has left unfinished at the end."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def of_last_run(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of runs in the same folder before it was begun anew (--resume never)."""
    begun = [place for place, entry in enumerate(entries) if entry.get("event") == "started"]
    return entries[begun[-1] :] if begun else entries


def points(entries: list[dict[str, Any]], kind: str, key: str) -> list[tuple[int, float]]:
    """(step, value) in the order of the steps; of a step that a resumed run did again, the last."""
    by_step = {
        entry["step"]: float(entry[key]) for entry in entries if entry["kind"] == kind and entry.get(key) is not None
    }
    return sorted(by_step.items())


def curve(title: str, values: list[tuple[int, float]]) -> str:
    """An SVG of the points as a line, its axes marked with the least and the greatest; nothing for no points."""
    if not values:
        return ""
    steps, heights = [step for step, _ in values], [height for _, height in values]
    left, right, low, high = min(steps), max(steps), min(heights), max(heights)

    def place(step: int, height: float) -> str:
        x = MARGIN + (step - left) / max(right - left, 1) * (WIDTH - MARGIN - 10)
        y = HEIGHT - 24 - (height - low) / (high - low or 1.0) * (HEIGHT - 50)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(step, height) for step, height in values)
    dot = place(*values[-1]).split(",")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text x="{MARGIN}" y="14" style="font-size:13px;fill:#222">{html.escape(title)}</text>'
        f'<text x="0" y="{HEIGHT - 22}">{low:.3g}</text><text x="0" y="30">{high:.3g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 6}">{left}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end">step {right}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1665c0" stroke-width="1.5"/>'
        f'<circle cx="{dot[0]}" cy="{dot[1]}" r="2.5" fill="#1665c0"/></svg>'
    )


def _table(evaluations: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{entry['step']}</td><td>{entry['epoch']:.2f}</td><td>{entry['top1']:.2f}</td>"
        f"<td>{entry['top5']:.2f}</td><td>{entry['loss']:.4f}</td><td>{entry['num_images']}</td></tr>"
        for entry in evaluations
    )
    head = "".join(f"<th>{name}</th>" for name in ("step", "epoch", "top-1 %", "top-5 %", "loss", "images"))
    return f"<table><tr>{head}</tr>{rows}</table>"
