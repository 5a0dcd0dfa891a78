"""Tables, progress bars and colours: with rich on a terminal, plain and unwrapped lines in files and pipes."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TextIO, TypeVar

from vit_static.common.errors import UserError, escape, truncate
from vit_static.common.text import duration, escape_lines, print_text

if TYPE_CHECKING:  # rich is imported where it is used: most verbs print no table
    from rich.console import Console
    from rich.table import Table

Item = TypeVar("Item")

_MIN_INTERVAL_S = 0.1  # between two drawings of a progress bar
_MIN_BAR_COLUMNS, _MAX_BAR_COLUMNS = 5, 40
_UNLIMITED = 100_000  # columns: lines in files aren't wrapped
_MIN_TEXT_COLUMNS = 24  # of a table's widest column; a narrower terminal gets one block of lines per row


def make_console(stream: TextIO | None = None) -> Console:
    """Return rich's console for a stream (default: standard output): colours on a terminal, unless NO_COLOR is set."""
    from rich.console import Console

    stream = stream or sys.stdout
    width = None if stream.isatty() else _UNLIMITED
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def with_words(rows: Sequence[tuple[Any, ...]], words: Sequence[str], noun: str, remedy: str) -> list[tuple[Any, ...]]:
    """Return the rows of a table in which all these words occur, in small or capital letters.

    Raises UserError, which calls a row `noun`, if there are none.
    """
    wanted = [word.lower() for word in words]
    matching = [row for row in rows if all(word in " ".join(map(str, row)).lower() for word in wanted)]
    if not matching:
        raise UserError(f"no {noun} mentions {' and '.join(map(truncate, words))}; {remedy}")
    return matching


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


def print_wrapped(text: str, indent: int, styles: Mapping[str, str] | None = None) -> None:
    """Print lines; on a terminal those that are too long are wrapped, and continue `indent` columns from the left.

    On a narrow terminal the indentation is at most a quarter. `styles`: of lines that begin with a word, by that word.
    """
    console = make_console()
    if not console.is_terminal:
        print_text(text, flush=True)
        return
    from rich.text import Text

    rest = " " * min(indent, console.width // 4)
    with console.capture() as capture:
        for line in escape_lines(text).split("\n"):
            wrapped = textwrap.fill(
                line, console.width, subsequent_indent=rest, break_on_hyphens=False, drop_whitespace=bool(line.strip())
            )
            styled = Text(wrapped)
            for word, style in (styles or {}).items():
                if line.startswith(word):
                    styled.stylize(style, 0, len(word))
            console.print(styled, soft_wrap=True)
    print(capture.get(), end="", flush=True)


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

    table = Table(
        box=box.SIMPLE_HEAD if has_rule else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
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
    """Print each row as its first cell and, below it, the others, several in a line where they have room."""
    from rich.padding import Padding
    from rich.text import Text

    for name, *values in cells:
        console.print(Text(name, style="cyan bold", overflow="fold"))
        lines: list[str] = []
        for header, value in zip(headers[1:], values, strict=True):
            field = f"{header}: {value}"
            if value and lines and len(lines[-1]) + 3 + len(field) <= console.width - 2:
                lines[-1] += f"   {field}"
            elif value:
                lines.append(field)
        for line in lines:
            console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2)))


class ProgressBar:
    """A line on a terminal that shows how far some work has come; nothing elsewhere. Threads may share it.

    rich renders the line, but isn't left in charge of the screen: its live display hides the cursor, which a killed
    process would leave hidden. What can't be shown, since the terminal has been closed, is dropped.
    """

    def __init__(
        self, total: int | None, unit: str, *, title: str = "", num_done: int = 0, stream: TextIO | None = None
    ) -> None:
        """`total` is None if the amount is unknown; the unit B shows sizes; `stream` is standard error by default."""
        self._stream = stream or sys.stderr
        self.is_shown = self._stream.isatty()
        self._total, self._unit, self._title, self._num_done = total, unit, escape(title), num_done
        self._text, self._lock = "", threading.RLock()
        # The first unit isn't counted in the speed: the first training step takes longer, since it compiles.
        self._first: tuple[float, int] | None = None
        self._drawn_at = float("-inf")
        self._draw()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, num_more: int = 1) -> None:
        """Count what has been done since the last call."""
        with self._lock:
            self._num_done += num_more
            if self._first is None:
                self._first = time.monotonic(), self._num_done
            if time.monotonic() - self._drawn_at >= _MIN_INTERVAL_S or self._num_done == self._total:
                self._draw()

    def describe(self, text: str) -> None:
        """Show a text behind the bar."""
        with self._lock:
            self._text = escape(text)
            self._draw()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the line away, so that others can print above it."""
        with self._lock:
            self._write("\r\x1b[K")
            try:
                yield
            finally:
                self._draw()

    def close(self) -> None:
        """Leave the last state on the terminal."""
        with self._lock:
            self._draw()
            self._write("\n")
            self.is_shown = False

    def line(self, num_columns: int) -> list[tuple[str, str]]:
        """Return the line's parts, (text, style), of at most `num_columns` columns.

        What has no room is left out: the text's fields, between commas, from the right, then the time left, the share
        and the title.
        """
        counts = self._amount(self._num_done) + ("" if self._total is None else f"/{self._amount(self._total)}")
        counts = counts if self._unit == "B" else f"{self._unit} {counts}"
        share = min(self._num_done / self._total, 1.0) if self._total else 0.0
        parts = [f" {share:4.0%}", self._time_left()] if self._total else []
        left = f"{self._title} {counts}" if self._title else counts
        if len(left + "".join(parts[:1])) > num_columns:
            left = counts[:num_columns]
        while parts and len(left + "".join(parts)) > num_columns:
            parts.pop()
        right = "".join(parts)
        num_free = num_columns - len(left + right)
        fields = self._text.split(", ") if self._text and self._total else []
        while fields and len("  " + ", ".join(fields)) > num_free:
            fields.pop()
        text = f"  {', '.join(fields)}" if fields else ""
        if not self._total:
            return [(left, "")]
        num_bar = min(num_free - len(text) - 1, _MAX_BAR_COLUMNS)
        shown = [(left, ""), (" " if num_bar >= _MIN_BAR_COLUMNS else "", "")]
        if num_bar >= _MIN_BAR_COLUMNS:
            num_full = round(share * num_bar)
            shown += [("━" * num_full, "green"), ("╺" if num_full < num_bar else "", "dim")]
            shown += [("━" * (num_bar - num_full - 1), "dim")]
        return [*shown, (right, "cyan"), (text, "")]

    def _amount(self, number: int) -> str:
        return f"{number / 1e9:.1f} GB" if self._unit == "B" else str(number)

    def _time_left(self) -> str:
        if self._first is None or self._total is None or self._num_done in (self._first[1], self._total):
            return ""
        started, num_before = self._first
        seconds = (time.monotonic() - started) / (self._num_done - num_before) * (self._total - self._num_done)
        return f" {duration(max(seconds, 0.0))} left"

    def _draw(self) -> None:
        if not self.is_shown:
            return
        from rich.text import Text

        self._drawn_at = time.monotonic()
        console = make_console(self._stream)
        parts = self.line(console.width - 1)
        if console.options.ascii_only:
            parts = [(text.replace("━", "-").replace("╺", "-"), style) for text, style in parts]
        if console.no_color or console.color_system is None:  # the rest of the bar would look like its beginning
            parts = [(" " * len(text) if style == "dim" else text, style) for text, style in parts]
        try:
            with console.capture() as capture:  # which also writes to the stream, though nothing
                console.print(Text.assemble(*parts), end="", soft_wrap=True)
        except OSError:
            self.is_shown = False
        else:
            self._write(f"\r{capture.get()}\x1b[K")

    def _write(self, text: str) -> None:
        if not self.is_shown:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self.is_shown = False


def tracked(items: Sequence[Item], unit: str, *, title: str = "") -> Iterator[Item]:
    """Yield the items, and show on the terminal how many have been taken."""
    with ProgressBar(len(items), unit, title=title) as bar:
        for item in items:
            yield item
            bar.update()


def highlight(text: str) -> str:
    """Return lines of a run's log with colours for a terminal: labels, results, and what is wrong."""
    from rich.highlighter import RegexHighlighter
    from rich.text import Text
    from rich.theme import Theme

    class Highlighter(RegexHighlighter):
        base_style = "log."
        highlights: ClassVar[list[str]] = [
            r"^  (?P<label>[a-z ]{1,10}?)  ",
            r"(?P<result>(top-1|mAP|macro F1|balanced accuracy) [\d.]+ %)",
            r"(?P<best>\(best\)|, the best of this run)",
            r"(?P<problem>(can't|could not) be (written|read|shown)|not finite)",
        ]

    console = make_console()
    theme = {"log.label": "cyan", "log.result": "bold", "log.best": "green", "log.problem": "red"}
    console.push_theme(Theme(theme))
    highlighter = Highlighter()
    with console.capture() as capture:
        for line in text.split("\n"):
            console.print(highlighter(Text(line)), soft_wrap=True)
    return capture.get().removesuffix("\n")
