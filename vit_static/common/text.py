"""Status lines, lines of text files, names for display, numbers in environment variables, and durations."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from vit_static.common.errors import escape_character

_UNSAFE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs


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


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their line breaks; bytes that aren't UTF-8 become surrogate escapes.

    Unlike str.splitlines, only a line feed ends a line, since names may have any other character. Raise ValueError for
    UTF-16.
    """
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError("is not UTF-8 text")
    text = content.decode("utf-8-sig", "surrogateescape")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def display_name(name: str) -> str:
    """Return a file's or folder's name as text of one line that UTF-8 can represent, with all of its spaces.

    Line breaks, control characters and bytes that aren't UTF-8 become escapes.
    """
    return "".join(
        escape_character(character) if unicodedata.category(character) in _UNSAFE_CATEGORIES else character
        for character in name
    )


def duration(seconds: float) -> str:
    """Format a duration: 15 s, 3 min 05 s, 2 h 10 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
