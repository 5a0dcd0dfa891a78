"""Pieces of HTML: texts, tables, what is folded away; and their look, light, dark and on paper."""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Sequence
from typing import Any

LONGEST = 60  # of a name, in characters

STYLE = """
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
th { font-weight: 600; } td.text, th.text { text-align: left; }
td { white-space: nowrap; } td.text { white-space: normal; overflow-wrap: break-word; max-width: 36em; }
tr.bold td { font-weight: 600; }
pre { background: var(--panel); padding: 1em; overflow: auto; font-size: 13px; }
summary { cursor: pointer; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3em; align-items: flex-start; }
.matrix td { width: 1.9em; min-width: 1.9em; padding: .1em; text-align: center; font-size: 12px;
  border: 1px solid var(--line); print-color-adjust: exact; }
.matrix .hit { background: rgb(0 114 178 / var(--share)); } .matrix .miss { background: rgb(213 94 0 / var(--share)); }
.matrix .much { color: #fff; }
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

MISSING = object()


def escaped(text: str) -> str:
    """A text, whoever wrote it, as HTML, in an element as in an attribute."""
    return html.escape(text)


def said_of(value: Any) -> str:
    """A value of a config or a log, as YAML has it; nothing for MISSING."""
    if value is MISSING:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(said_of, value))}]"
    text = value if isinstance(value, str) else getattr(value, "text", None) or json.dumps(value, default=str)
    return text if len(text) <= 4 * LONGEST else f"{text[: 4 * LONGEST]}…"


def table(head: Sequence[str] | None, rows: Sequence[Sequence[str]], num_texts: int, bold: Collection[int] = ()) -> str:
    """Of texts; the first `num_texts` columns to the left, others, figures, to the right. `bold` are rows."""

    def cells(of_row: Sequence[str], tag: str) -> str:
        kinds = [" class=text"] * num_texts + [""] * (len(of_row) - num_texts)
        return "".join(f"<{tag}{kind}>{escaped(cell)}</{tag}>" for kind, cell in zip(kinds, of_row, strict=True))

    top = "" if head is None else f"<tr>{cells(head, 'th')}</tr>"
    body = "".join(
        f"<tr{' class=bold' if number in bold else ''}>{cells(row, 'td')}</tr>" for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table>{top}{body}</table></div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"
