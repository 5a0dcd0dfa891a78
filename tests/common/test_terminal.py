"""Tables, progress bars and colours on terminals of 40 to 200 columns, and plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable

import pytest

from vit_static.common.terminal import ProgressBar, highlight, print_table, print_wrapped, tracked
from vit_static.common.text import counted, say, wrap_lines

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(\d+;)*3\d(;\d+)*m")
WIDTHS = [40, 60, 80, 120, 200]
HEADERS = ("Key", "Type", "Default", "Meaning")
ROWS = [
    ("augment.random_erasing_aspect_ratio", "[number, number], each above 0", "[0.3, 3.3]", "height / width " * 6),
    ("seed", "whole number", "0", "\x1b[2Jof initialisation"),
]


class Terminal(io.StringIO):
    """A stream in memory that says it is a terminal; rich reads its width from COLUMNS."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


def shown(stream: Terminal, function: Callable[..., object], *arguments: object, **options: object) -> str:
    """Return what a function prints on a terminal that is standard output."""
    stream.truncate(0)
    stream.seek(0)
    with contextlib.redirect_stdout(stream):
        result = function(*arguments, **options)
    return result if isinstance(result, str) else stream.getvalue()


def plain(text: str) -> str:
    return ESCAPES.sub("", text)


@pytest.mark.parametrize("num_columns", WIDTHS)
def test_a_table_fits_the_terminal_and_loses_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, num_columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(num_columns))
    styled = shown(terminal, print_table, HEADERS, ROWS, title="augment")
    text = plain(styled)
    assert max(map(len, text.splitlines())) <= num_columns
    words = re.sub(r"\s+", "", text)
    for cell in ("augment.random_erasing_aspect_ratio", "eachabove0", "[0.3,3.3]", "wholenumber", "ofinitialisation"):
        assert cell in words or num_columns < 120
    assert text.count("height") == 6
    assert "\x1b[2J" not in styled and "\\x1b[2J" in text  # a name can't control the terminal


def test_a_table_in_a_file_has_one_plain_line_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("Name", "Number"), [("a", 1), ("b" * 300, 23)], right=[1])
    assert capsys.readouterr().out.splitlines() == [
        f"{'Name':<300}  Number", f"{'a':<300}       1", f"{'b' * 300}      23",
    ]  # fmt: skip


def test_colours_are_used_unless_no_color_is_set(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "  model      ViT S/16\nepoch 1.0  top-1 96.25 %  (best)"
    assert COLOUR.search(shown(terminal, highlight, text)) and plain(shown(terminal, highlight, text)) == text
    assert COLOUR.search(shown(terminal, print_table, HEADERS, ROWS))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(shown(terminal, print_table, HEADERS, ROWS) + shown(terminal, highlight, text))
    assert plain(shown(terminal, highlight, text)) == text


@pytest.mark.parametrize("num_columns", WIDTHS)
@pytest.mark.parametrize(("total", "unit"), [(9, "step"), (1_281_167, "image"), (None, "image"), (148 * 10**9, "B")])
def test_a_progress_bar_is_one_line_that_fits(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, num_columns: int, total: int | None, unit: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(num_columns))
    with ProgressBar(total, unit, title="train", stream=terminal) as bar:
        bar.describe("loss 2.345, 1234 images/s")
        for _ in range(3):
            bar.update(1 if total is None else total // 3)
        with bar.hidden():
            terminal.write("a line above\n")
    drawings = plain(terminal.getvalue()).replace("\n", "\r").split("\r")
    assert max(map(len, drawings)) < num_columns and "a line above" in drawings
    assert (f"{unit} " if unit != "B" else " GB") in drawings[-2] and (total is None or "100%" in drawings[-2])
    assert num_columns < 80 or total is None or any("loss 2.345" in drawing and "━" in drawing for drawing in drawings)


@pytest.mark.parametrize("num_columns", range(5, 130, 5))
def test_a_progress_bar_leaves_out_whole_fields(terminal: Terminal, num_columns: int) -> None:
    """From the right, and no word is cut."""
    bar = ProgressBar(766, "step", num_done=123, stream=terminal)
    bar.describe("loss 2.345, 1234 images/s")
    line = "".join(text for text, _ in bar.line(num_columns))
    assert len(line) <= num_columns
    shown = re.sub(r"[━╺]+", "", line)
    assert num_columns < 15 or re.fullmatch(r"step 123/766( +16%( +loss 2\.345(, 1234 images/s)?)?)?", shown), line


def test_nothing_is_drawn_outside_a_terminal_or_on_a_closed_one() -> None:
    stream = io.StringIO()
    assert list(tracked(["a", "b"], "shard")) == ["a", "b"]
    with ProgressBar(3, "step", stream=stream) as bar:
        bar.update()
    assert stream.getvalue() == ""

    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with ProgressBar(3, "step", stream=Closed()) as bar:
        bar.update()
        assert not bar.is_shown


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "image", "1 image"),
        (2, "image", "2 images"),
        (0, "class", "0 classes"),
        (3, "micro-batch", "3 micro-batches"),
    ],
)
def test_nouns_are_counted(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text
    assert counted(number, noun, be=True) == text + (" is" if number == 1 else " are")


@pytest.mark.parametrize("num_columns", WIDTHS)
def test_long_lines_are_wrapped_on_a_terminal_only(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(num_columns))
    text = "ok      kernels     " + "the pixels of an image differ " * 6 + "\n\nFAILED  data        short"
    styled = shown(terminal, print_wrapped, text, 20, {"ok": "green", "FAILED": "red"})
    lines = plain(styled).splitlines()
    assert max(map(len, lines)) <= num_columns and " ".join(plain(styled).split()) == " ".join(text.split())
    assert all(line.startswith(" " * min(20, num_columns // 4)) for line in lines[1 : lines.index("")])
    assert "\x1b[32mok\x1b[0m" in styled and "\x1b[31mFAILED\x1b[0m" in styled
    print_wrapped(text, 20)
    assert capsys.readouterr().out == f"{text}\n"


def test_lines_of_a_run_and_messages_are_broken_between_words(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal; paths stay whole, so that they can be copied."""
    path = "output/" + "x" * 50
    text = f"checkpoints: 3 of 9.9 MB; each write took 250 ms; weights in {path}"
    assert wrap_lines(text, 40).splitlines() == [
        "checkpoints: 3 of 9.9 MB; each write", "    took 250 ms; weights in", f"    {path}",
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr", terminal)
    say(text)
    assert path in terminal.getvalue()
    assert max(len(line) for line in terminal.getvalue().splitlines() if path not in line) <= 40
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    say(text)
    assert stream.getvalue() == f"vit_static: {text}\n"
