"""Numbers and durations in messages."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def say(line: str) -> None:
    print(f"vit_static: {line}", file=sys.stderr, flush=True)


def positive_int(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError(f"{name}={value}: it must be a positive integer")
    return int(value)


def whole_number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name) or "0"
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value}: it must be a whole number")
    return int(value)


def duration(seconds: float) -> str:
    """15 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
