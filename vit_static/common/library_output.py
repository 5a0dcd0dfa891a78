"""Redirect what native libraries print, away from the console and into a run's log."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

_redirection: Redirection | None = None


def _capture_library_output() -> None:
    """Python keeps the console; what libraries print there goes aside: C++'s on either stream, Python's warnings, and
    what is logged below an error.

    (oneDNN's checks in Paddle come on standard output, a decoder's complaints of a bad file on standard error.)
    """
    global _redirection
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
        for stream in (sys.stdout, sys.stderr)
    )
    descriptor, name = tempfile.mkstemp(prefix="vit_static_", suffix=".log")
    Path(name).unlink()
    _redirect_to(Redirection(descriptor, None, 0))
    warnings.showwarning = lambda *said, **_: _write_redirected(warnings.formatwarning(*said[:4]))
    shown = logging.StreamHandler.emit

    def emit(handler: logging.StreamHandler[Any], record: logging.LogRecord) -> None:
        to_console = handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        if to_console and record.levelno < logging.ERROR:
            _write_redirected(handler.format(record) + "\n")
        else:
            shown(handler, record)

    logging.StreamHandler.emit = emit  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class Redirection:
    """Where libraries' words go: a file, without a name until there is a place for it; this process's are from `start`
    on."""

    descriptor: int
    path: Path | None
    start: int


def _redirect_to(aside: Redirection) -> None:
    global _redirection
    before, _redirection = _redirection, aside
    os.dup2(aside.descriptor, 1)
    os.dup2(aside.descriptor, 2)
    if before is not None:
        os.close(before.descriptor)


def _write_redirected(text: str) -> None:
    if _redirection is not None:
        with suppress(OSError):  # a full disk
            os.write(_redirection.descriptor, text.encode(errors="replace"))


def redirect_library_output(path: Path) -> None:
    """What libraries have said so far, and will, goes to the end of this file; nothing where it is shown anyway."""
    if _redirection is None or _redirection.path == path:
        return
    said = library_output()
    with suppress(OSError):  # then it stays where it is
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        start = os.lseek(descriptor, 0, os.SEEK_END)
        _redirect_to(Redirection(descriptor, path, start))
        _write_redirected(
            f"-- {datetime.now().astimezone().isoformat(timespec='seconds')}, process {os.getpid()}\n{said}"
        )


def library_output(most_lines: int | None = None) -> str:
    """What libraries have printed so far, where `prepare` has put it aside: the last lines, and where the rest is."""
    if _redirection is None:
        return ""
    size = os.lseek(_redirection.descriptor, 0, os.SEEK_END) - _redirection.start
    lines = (
        os.pread(_redirection.descriptor, size, _redirection.start).decode(errors="replace").splitlines(keepends=True)
    )
    if most_lines is None or len(lines) <= most_lines:
        return "".join(lines)
    where = "" if _redirection.path is None else f" ({_redirection.path} has all)"
    return f"... the last {most_lines} of {len(lines)} lines that libraries printed{where}:\n" + "".join(
        lines[-most_lines:]
    )
