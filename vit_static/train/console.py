"""Console of a run: lines, in colour on a terminal, above a progress bar."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext

from vit_static.common.terminal import ProgressBar, highlight, make_console
from vit_static.common.text import counted, escape_lines, print_text, wrap_lines
from vit_static.train.file_sinks import PartialWriter
from vit_static.train.sinks import Sink

_COMPILING = "compiling the first step"
_MIN_COLUMNS = 72  # that have room for it behind the bar


class Console(Sink[str]):
    """Lines on standard output, above the progress bar if there is one."""

    name = "the console (standard output)"

    def __init__(self) -> None:
        self._writer = PartialWriter()
        self._bar: ProgressBar | None = None
        self._is_compiling = False

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    @property
    def num_columns(self) -> int:
        """Width of the terminal; very large for files."""
        return make_console().width

    def write(self, item: str) -> None:
        try:
            sys.stdout.flush()
            descriptor = sys.stdout.fileno()
        except io.UnsupportedOperation:  # replaced by a stream in memory
            print_text(item, flush=True)
            return
        text = escape_lines(item)
        if sys.stdout.isatty():
            text = highlight(wrap_lines(text, self.num_columns))
        line = f"{text}\n".encode(sys.stdout.encoding, sys.stdout.errors or "strict")
        # Not through the stream, whose buffer would keep the line after an error.
        with nullcontext() if self._bar is None else self._bar.hidden():
            self._writer.write(descriptor, line)

    def loss_note(self, num_lost: int) -> str:
        """Return a line with the number of lost ones."""
        return f"({counted(num_lost, 'line')} could not be shown)"

    def close(self) -> None:
        self.close_bar()

    def open_bar(self, total_steps: int, done_steps: int) -> None:
        """Show a progress bar on a terminal; elsewhere the lines of the log steps are all there is.

        Until the first step is done, it says that this step is being compiled.
        """
        if sys.stdout.isatty():
            self._bar = ProgressBar(total_steps, "step", num_done=done_steps, stream=sys.stdout)
            self._is_compiling = done_steps < total_steps
            if self._is_compiling and self.num_columns < _MIN_COLUMNS:
                self.write(f"{_COMPILING} ...")
            elif self._is_compiling:
                self._bar.describe(_COMPILING)

    def advance_bar(self) -> None:
        """Count a step."""
        if self._bar is not None:
            if self._is_compiling:
                self._is_compiling = False
                self._bar.describe("")
            self._bar.update()

    def describe_bar(self, text: str) -> None:
        """Show a text behind the progress bar."""
        if self._bar is not None:
            self._bar.describe(text)

    def close_bar(self) -> None:
        """End the progress bar, if there is one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
