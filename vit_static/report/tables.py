"""Tables of text for the report's templates."""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from vit_static.common.errors import escape

MAX_NAME_LENGTH = 60  # characters of a class name
MAX_VALUE_LENGTH = 240  # characters of a config value
MISSING = object()  # a run has no value for a key that another run has


@dataclass(frozen=True)
class Table:
    """Rows of cells: the first `num_text_columns` are aligned left, the others are figures and aligned right."""

    head: Sequence[str] | None
    rows: Sequence[Sequence[str]]
    num_text_columns: int
    bold_rows: Collection[int] = ()  # indices


def format_setting(value: Any) -> str:
    """Format a value of a config or a log as YAML shows it; MISSING gives an empty cell."""
    if value is MISSING:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(format_setting, value))}]"
    # A number that was read from YAML keeps its text there: 3e-3 stays 3e-3.
    text = value if isinstance(value, str) else getattr(value, "text", None) or json.dumps(value, default=str)
    return shorten(text, MAX_VALUE_LENGTH)


def escape_html(text: str) -> str:
    """Escape a text of one line: its unprintable characters, then what HTML gives a meaning."""
    return html.escape(escape(text))


def shorten(text: str, max_length: int) -> str:
    """Cut a text off after `max_length` characters, and mark the cut."""
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def spaced(key: str) -> str:
    """Return a key as the tables show it."""
    return key if key == "vit_static" else key.replace("_", " ")
