"""Tables and status lines for people: with rich on a terminal, plain and unwrapped lines in files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from vit_static.common.errors import escape
from vit_static.common.text import print_text

if TYPE_CHECKING:  # rich is imported where it is used: most verbs print no table
    from rich.console import Console
    from rich.table import Table

_UNLIMITED = 100_000  # columns: lines in files aren't wrapped
_MIN_TEXT_COLUMNS = 24  # of a table's widest column; a narrower terminal gets one block of lines per row


def make_console(stream: TextIO | None = None) -> Console:
    """Return rich's console for a stream (default: standard output): colours on a terminal, unless NO_COLOR is set."""
    from rich.console import Console

    stream = stream or sys.stdout
    width = None if stream.isatty() else _UNLIMITED
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", right: Sequence[int] = ()
) -> None:
    """Print a table on standard output, aligned; on a narrow terminal one block of lines per row.

    `right`: the columns that are aligned to the right. Cells may have names from anywhere: see `escape`.
    """
    console = make_console()
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    is_narrow = sum(widths) - max(widths) + 2 * len(widths) + min(max(widths), _MIN_TEXT_COLUMNS) > console.width
    with console.capture() as capture:
        if title:
            console.print(escape(title), style="bold")
        if is_narrow:
            _print_blocks(console, headers, cells)
        else:
            console.print(_table(headers, cells, right, has_rule=console.is_terminal))
    lines = capture.get().splitlines()
    print_plain_or_styled("\n".join(line.rstrip() for line in lines), is_styled=console.is_terminal)


def print_plain_or_styled(text: str, *, is_styled: bool) -> None:
    """Print lines whose names are escaped already; rich's control sequences pass only with `is_styled`."""
    if is_styled:
        print(text, flush=True)
    else:
        print_text(text, flush=True)


def _table(headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[int], *, has_rule: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if has_rule else None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, header in enumerate(headers):
        table.add_column(
            header,
            justify="right" if number in right else "left",
            style="cyan" if number == 0 else "",
            overflow="fold",
            no_wrap=number == 0,
        )
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _print_blocks(console: Console, headers: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for name, *values in cells:
        console.print(Text(name, style="cyan bold", overflow="fold"))
        for header, value in zip(headers[1:], values, strict=True):
            if value:
                console.print(Padding(Text(f"{header.lower()}: {value}", overflow="fold"), (0, 0, 0, 2)))
