"""Status lines, numbers in environment variables, and durations."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def say(line: str, program: str = "vit_static") -> None:
    """Print a status line of a program or tool on stderr, so that stdout holds only results."""
    print(f"{program}: {line}", file=sys.stderr, flush=True)


def positive_int(environ: Mapping[str, str], name: str, default: int) -> int:
    """Return the number in a variable; `default` if it is unset or empty. Raise ValueError unless it is above 0."""
    value = environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError(f"{name}={value}: it must be a positive integer")
    return int(value)


def non_negative_int(environ: Mapping[str, str], name: str) -> int:
    """Return the number in a variable; 0 if it is unset or empty. Raise ValueError for anything else."""
    value = environ.get(name) or "0"
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value}: it must be a whole number")
    return int(value)


def duration(seconds: float) -> str:
    """Format a duration: 15 s, 3 min 05 s, 2 h 10 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
