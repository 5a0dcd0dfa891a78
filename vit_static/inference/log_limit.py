"""Limit on log lines, so that clients can't fill a disk or a terminal with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

_MAX_KINDS = 100
_LOGGERS = ("", "uvicorn", "uvicorn.error", "asyncio", "PIL")  # "" is the root


class LogLimit(logging.Filter):
    """Lets a few lines of each kind pass per interval, and counts the others.

    As a filter of a logger, the kind of a line is its text before its values are inserted. The first line after a
    silence says how many were left out.
    """

    def __init__(
        self, max_lines: int = 5, interval_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._max_lines, self._interval_s, self._clock = max_lines, interval_s, clock
        self._counts: dict[Hashable, tuple[float, int]] = {}  # by kind: start of the interval, lines in it

    def note(self, kind: Hashable) -> str | None:
        """Count a line; return None if it must be left out, else what to append to it, mostly nothing."""
        now = self._clock()
        start, num_lines = self._counts.get(kind, (now, 0))
        if now - start >= self._interval_s:
            num_left_out = num_lines - self._max_lines
            self._counts[kind] = now, 1
            return f" ({num_left_out} more like this in {now - start:.0f} s)" if num_left_out > 0 else ""
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            del self._counts[next(iter(self._counts))]
        self._counts[kind] = start, num_lines + 1
        return "" if num_lines < self._max_lines else None

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is written."""
        suffix = self.note(record.msg)
        if suffix:
            record.msg, record.args = record.getMessage() + suffix, ()
        return suffix is not None

    def install(self) -> None:
        """Filter what the program's loggers write; call it when their handlers exist."""
        handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
        if logging.lastResort is not None:  # it writes where a logger has no handler
            handlers.append(logging.lastResort)
        for handler in handlers:
            handler.addFilter(self)
