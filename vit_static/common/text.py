"""Text for people and programs: escaped lines on the console, JSON, CSV; names, numbers in variables, durations."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import textwrap
import unicodedata
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

from vit_static.common.errors import escape, escape_character
from vit_static.common.installation import COMMAND, localize

_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSAFE_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs


# Spreadsheets evaluate a cell that begins with one of these, or with its full-width form, as a formula.
_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def program_name() -> str:
    """Return what a user types to start this program."""
    return COMMAND


def say(line: str, program: str = "vit_static") -> None:
    """Print a status line of a program or tool on stderr, so that stdout holds only results."""
    text = escape(f"{program}: {localize(line)}")
    if sys.stderr.isatty():
        text = wrap_lines(text, _num_columns(sys.stderr))
    print(text, file=sys.stderr, flush=True)


def print_line(line: object, *, flush: bool = False) -> None:
    """Print one line of results on stdout. Names in it may come from anywhere: see `escape`."""
    print(escape(str(line)), flush=flush)


def print_text(text: str, file: TextIO | None = None, *, flush: bool = False) -> None:
    """Print text of several lines, on stdout by default. Names in it must be escaped already, so that none of them
    begins a line of its own."""
    print(escape_lines(text.removesuffix("\n")), file=file or sys.stdout, flush=flush)


def escape_lines(text: str) -> str:
    """Escape each line of a text; line feeds and tabs stay."""
    return "\n".join("\t".join(map(escape, line.split("\t"))) for line in text.split("\n"))


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON that any parser reads: bytes of names that aren't UTF-8, which JSON can't hold, become escapes."""
    text = json.dumps(value, indent=indent)
    return json.dumps(_to_unicode(value), indent=indent) if "\\ud" in text else text


def path_fields(path: str) -> dict[str, str]:
    """Return a path as fields of a JSON object: `path`, and `path_base64` with its bytes if they aren't UTF-8."""
    text = to_unicode(path)
    return {"path": text} if text == path else {"path": text, "path_base64": b64encode(os.fsencode(path)).decode()}


def path_of(fields: Mapping[str, str]) -> str:
    """Return the path that `path_fields` was given. Raise KeyError, TypeError or ValueError for other fields."""
    encoded = fields.get("path_base64")
    return fields["path"] if encoded is None else os.fsdecode(b64decode(encoded, validate=True))


def _num_columns(terminal: TextIO) -> int:
    """Return the width of a terminal, or what COLUMNS says."""
    try:
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(terminal.fileno()).columns)
    except (OSError, ValueError):
        return 80


def wrap_lines(text: str, num_columns: int) -> str:
    """Break the lines of a text that are wider than a terminal between words, and indent what continues.

    Words that are longer, such as paths, stay whole, so that they can be copied.
    """
    return "\n".join(
        textwrap.fill(
            line,
            max(num_columns, 20),
            subsequent_indent="    ",
            drop_whitespace=bool(line.strip()),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def json_line(value: Any) -> str:
    """Return JSON of one line that any parser reads. Characters that `escape` escapes are JSON's escapes, so a parser
    gets them unchanged, but for bytes of names that aren't UTF-8: see `path_fields`."""
    text = json.dumps(_to_unicode(value), ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def csv_cell(value: Any) -> Any:
    """Return a value as a cell of CSV: text is escaped, and can't be a spreadsheet's formula; None is an empty cell.

    A text that a spreadsheet would evaluate gets an apostrophe before it, as OWASP recommends against CSV injection;
    numbers, also as text, stay numbers.
    """
    if not isinstance(value, str):
        return "" if value is None else value
    cell = escape(value)
    if cell.lstrip().startswith(_FORMULA_STARTS) and _NUMBER.fullmatch(cell) is None:
        return f"'{cell}"
    return cell


def csv_row(values: Iterable[Any]) -> str:
    """Return a line of CSV (RFC 4180) without its line break; see `csv_cell`."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(map(csv_cell, values))
    return buffer.getvalue()


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


def to_unicode(name: str) -> str:
    """Replace the bytes of a name that aren't UTF-8 by escapes, since JSON can't hold them; keep everything else."""
    return _SURROGATE.sub(lambda match: escape_character(match[0]), name)


def _to_unicode(value: Any) -> Any:
    """Return a JSON value with `to_unicode` of all its texts and keys."""
    if isinstance(value, str):
        return to_unicode(value)
    if isinstance(value, Mapping):
        return {_to_unicode(key): _to_unicode(each) for key, each in value.items()}
    return list(map(_to_unicode, value)) if isinstance(value, list | tuple) else value


def display_name(name: str) -> str:
    """Return a file's or folder's name as a class name that files can store: one line that UTF-8 can represent.

    Line breaks, control characters and bytes that aren't UTF-8 become escapes; spaces, and the joiners and marks of
    direction that some scripts need, stay. What is shown to a person goes through `escape`, which leaves none of them.
    """
    return "".join(
        escape_character(character) if unicodedata.category(character) in _UNSAFE_CATEGORIES else character
        for character in name
    )


def escape_within(text: str, width: int) -> str:
    """Return `text` as `escape` does, cut to `width` characters, with an ellipsis, between its characters' escapes."""
    shown = escape(text)
    if len(shown) <= width:
        return shown
    ends = [*accumulate(len(escape(character)) for character in text[:width])]
    return "".join(map(escape, text[: bisect_right(ends, width - 1)])) + "…"


def counted(number: int, noun: str, *, be: bool = False) -> str:
    """Return a number with its noun in singular or plural: 1 image, 2 classes; with `be` the verb, too: 1 image is."""
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    verb = "" if not be else " is" if number == 1 else " are"
    return f"{number} {noun}{'' if number == 1 else ending}{verb}"


def flops_text(flops: float) -> str:
    """Return a number of operations with its unit: "4.61 GFLOP", and "4.61 MFLOP" below 0.01 GFLOP."""
    return f"{flops / 1e9:.2f} GFLOP" if flops >= 1e7 else f"{flops / 1e6:.2f} MFLOP"


def duration(seconds: float) -> str:
    """Format a duration: 15 s, 3 min 05 s, 2 h 10 min."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
