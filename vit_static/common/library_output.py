"""Redirection of what libraries print, from the console to the run's log.

libjpeg, oneDNN and Paddle2ONNX write to the file descriptors 1 and 2 without any log level, and so does Paddle's report
of a crash, so these descriptors must lead to a file while Python's `sys.stdout` and `sys.stderr` keep the console.
Log levels would drop the warnings that the run's log has to keep, and Paddle's, DALI's and Paddle2ONNX's loggers create
handlers for the console at any time, so `StreamHandler.emit` is replaced as well.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

_redirection: Redirection | None = None


class BestEffortFile(io.FileIO):
    """A file of messages: what can't be written, because the disk is full or the reader has left, is dropped."""

    def write(self, data: Any, /) -> int:
        """Write bytes, and claim to have done so after an error: a buffer would keep them, and fail again at exit."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def best_effort(stream: TextIO) -> TextIO:
    """Return standard output or error as a stream whose write never fails; unchanged if it isn't the process's own."""
    if type(stream) is not io.TextIOWrapper or stream.fileno() not in (1, 2) or _is_best_effort(stream):
        return stream
    with suppress(OSError):
        stream.flush()
    return _open_text(BestEffortFile(stream.fileno(), "w", closefd=False), stream)


def _is_best_effort(stream: TextIO) -> bool:
    return isinstance(getattr(stream.buffer, "raw", None), BestEffortFile)


def _open_text(raw: io.FileIO, like: TextIO) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=like.encoding, errors=like.errors, line_buffering=True)


def capture_library_output() -> None:
    """Redirect to a temporary file: descriptors 1 and 2, Python's warnings, and log records below an error.

    `sys.stdout`, `sys.stderr` and log records of errors keep the console.
    """
    global _redirection
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout, sys.stderr = (
        _open_text((BestEffortFile if _is_best_effort(stream) else io.FileIO)(os.dup(stream.fileno()), "w"), stream)
        for stream in (sys.stdout, sys.stderr)
    )
    try:
        descriptor, name = tempfile.mkstemp(prefix="vit_static_", suffix=".log")
        Path(name).unlink()
    except OSError:  # no temporary folder, or a full one
        descriptor = os.memfd_create("vit_static.log")
    _redirect_to(Redirection(descriptor, None, 0))
    warnings.showwarning = lambda *fields, **_: _write_redirected(warnings.formatwarning(*fields[:4]))
    emit_to_stream = logging.StreamHandler.emit

    def emit(handler: logging.StreamHandler[Any], record: logging.LogRecord) -> None:
        to_console = handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        if to_console and record.levelno < logging.ERROR:
            _write_redirected(handler.format(record) + "\n")
        else:
            emit_to_stream(handler, record)

    logging.StreamHandler.emit = emit  # type: ignore[method-assign, assignment]


@contextmanager
def hidden_library_output() -> Iterator[None]:
    """Drop what libraries write to descriptor 1 within the block, unless it is redirected: for a caller's own process.

    Python's `sys.stdout` loses nothing that was printed before; another thread's lines in the block are lost.
    """
    if _redirection is not None:
        yield
        return
    with suppress(OSError, ValueError):  # the caller's stream, whatever it is
        sys.stdout.flush()
    flush_c = ctypes.CDLL(None).fflush  # of all streams, with NULL: C's buffers are filled before and in the block
    flush_c(None)
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        flush_c(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


@dataclass(frozen=True)
class Redirection:
    """The file that library output goes to."""

    descriptor: int
    path: Path | None  # None: a temporary file without a name, until the run folder is known
    start: int  # position of this process's first byte


def _redirect_to(redirection: Redirection) -> None:
    global _redirection
    previous, _redirection = _redirection, redirection
    os.dup2(redirection.descriptor, 1)
    os.dup2(redirection.descriptor, 2)
    if previous is not None:
        os.close(previous.descriptor)


def _write_redirected(text: str) -> None:
    if _redirection is not None:
        with suppress(OSError):  # a full disk
            os.write(_redirection.descriptor, text.encode(errors="replace"))


def redirect_library_output(path: Path) -> None:
    """Append to this file what libraries have printed so far and will print, if output is redirected."""
    if _redirection is None or _redirection.path == path:
        return
    printed_so_far = library_output()
    with suppress(OSError):  # the output stays in the temporary file
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        start = os.lseek(descriptor, 0, os.SEEK_END)
        _redirect_to(Redirection(descriptor, path, start))
        _write_redirected(
            f"-- {datetime.now().astimezone().isoformat(timespec='seconds')}, process {os.getpid()}\n{printed_so_far}"
        )


def library_output(max_lines: int | None = None) -> str:
    """Return what libraries have printed, or its last `max_lines` lines; empty if output isn't redirected."""
    if _redirection is None:
        return ""
    size = os.lseek(_redirection.descriptor, 0, os.SEEK_END) - _redirection.start
    lines = (
        os.pread(_redirection.descriptor, size, _redirection.start).decode(errors="replace").splitlines(keepends=True)
    )
    if max_lines is None or len(lines) <= max_lines:
        return "".join(lines)
    where = "" if _redirection.path is None else f" ({_redirection.path} has all)"
    return f"... the last {max_lines} of {len(lines)} lines that libraries printed{where}:\n" + "".join(
        lines[-max_lines:]
    )
