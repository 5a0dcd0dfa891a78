"""Running a verb: errors become exit codes and one line on stderr."""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from vit_static.common.errors import (
    DISK_ERRNOS,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_MISTAKE,
    USER_ERRNOS,
    RunFailed,
    UserError,
    WriteError,
    describe_error,
    describe_os_error,
    escape,
    truncate,
)
from vit_static.common.installation import describe_missing
from vit_static.common.library_output import best_effort, library_output
from vit_static.common.startup import handle_stop_signals, take_stop_signal
from vit_static.common.text import print_text, say

# What libraries say when the host has no memory for an allocation, a thread or a library; and when a GPU has none.
_OUT_OF_MEMORY = re.compile(
    r"[^\n]*(bad_alloc|cannot allocate memory|failed to allocate|failed to map segment|can't start new thread|"
    r"resource temporarily unavailable)[^\n]*",
    re.IGNORECASE,
)
_OF_GPU = re.compile(r"cuda (runtime )?error|cudaMalloc|GPU memory", re.IGNORECASE)
MAX_ERROR_LENGTH = 250
MAX_LIBRARY_LINES = 40  # shown before a traceback
# Verbs whose product is what they print: when its reader, such as `head`, has left, they are done. The others only
# report on what they do, and continue without a reader.
PRINTING_VERBS = frozenset({"bench", "completion", "config", "eval", "models", "plan", "predict", "probe", "recipes"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code.

    A user's mistake is one line on stderr and exit code 2. An unexpected error shows its traceback, after the last
    lines that libraries printed, and is exit code 1.
    """
    # Until the training loop starts, which handles these signals itself to save its state. (The launcher, which may run
    # in this process, has Ctrl-C end it at once.)
    handle_stop_signals()
    sys.stderr = best_effort(sys.stderr)
    try:
        # Imported here, because this takes long enough to be interrupted.
        from vit_static.cli.parser import parse_arguments

        arguments = parse_arguments(argv)
        if arguments.verb not in PRINTING_VERBS:
            sys.stdout = best_effort(sys.stdout)
        code = int(arguments.handler(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _stop()
    except Exception as error:
        return _stop() if take_stop_signal() is not None else _report(error)
    finally:
        sys.stdout = _writable(sys.stdout)


def _stop() -> int:
    say("stopped on request")
    return EXIT_STOPPED


def _report(error: Exception) -> int:
    """Print what has gone wrong, in the block that handles the error, and return the exit code."""
    if isinstance(error, BrokenPipeError) and _has_reader_left():
        return EXIT_DONE
    if isinstance(error, UserError):
        say(str(error))
        return EXIT_USER_MISTAKE
    if isinstance(error, ModuleNotFoundError) and (missing := describe_missing(error)) is not None:
        say(missing)
        return EXIT_USER_MISTAKE
    if isinstance(error, RunFailed):
        say(str(error))
        return EXIT_FAILED
    if isinstance(error, OSError) and error.errno in USER_ERRNOS:
        remedy = "" if isinstance(error, WriteError) else "; use another path, or fix this one"
        say(f"{describe_os_error(error)}{remedy}")
        return EXIT_USER_MISTAKE
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        say(describe_os_error(error))
        return EXIT_FAILED
    shortage = _describe_shortage(error)
    if shortage is not None:
        say(
            f"out of memory ({shortage}); free some, raise the limit for this process, or lower "
            "data.global_batch_size or data.num_threads"
        )
        return EXIT_FAILED
    return _fail_with_traceback()


def _describe_shortage(error: Exception) -> str | None:
    """Return what the host, rather than a GPU, had no memory for; None for another error."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return describe_error(error)
    text = "" if isinstance(error, OSError) else str(error)  # EAGAIN has other reasons, too
    line = _OUT_OF_MEMORY.search(text)
    return None if line is None or _OF_GPU.search(text) else escape(truncate(line[0].strip(), MAX_ERROR_LENGTH))


def _has_reader_left() -> bool:
    """Return whether standard output is a pipe or socket whose other end is closed."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no descriptor
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _writable(stream: TextIO) -> TextIO:
    """Return the stream, or the null device if it can't be written: Python flushes stdout once more when it exits."""
    try:
        stream.flush()
    except OSError:
        null = open(os.devnull, "w")  # noqa: PTH123, SIM115
        os.dup2(null.fileno(), stream.fileno())
        return null
    return stream


def _fail_with_traceback() -> int:
    print_text(library_output(MAX_LIBRARY_LINES) + traceback.format_exc(), sys.stderr)
    return EXIT_FAILED
