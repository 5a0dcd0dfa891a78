"""Sinks of what a run reports, and the guard that keeps a failing one from disturbing the run."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vit_static.common.errors import describe_error
from vit_static.common.text import counted

MAX_BUFFERED = 10_000  # records; of metrics.jsonl about 3 MB
MAX_RETRY_S = 300.0  # between two attempts; the first come after 1 s, 2 s, 4 s, ...
GIVE_UP_S = 86_400.0  # of system errors, such as a full disk
MAX_EXCEPTIONS = 8  # in a row of any other kind, over about two minutes
_PERMANENT = frozenset({errno.EPIPE, errno.EBADF})  # the reader has left; no attempt will succeed

PICTURES = "pictures"  # the kind of a record that has only these

Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """An entry of the log: a training step, an evaluation, an event; or the pictures of an evaluation, for trackers.

    `tag` replaces the kind in the names of trackers' numbers.
    """

    kind: str
    step: int
    epoch: float
    values: dict[str, Any] = field(default_factory=dict)
    tag: str | None = None
    time: float = field(default_factory=time.time)  # seconds since 1970
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNG files by name


class Sink(ABC, Generic[Item]):
    """Something that a run reports to: a file, the console, an experiment tracker. Its methods may raise anything.

    After an exception `write` is called again with the same item, which may have been written in part. Nothing is
    opened before the first `write`, so that an error in opening is handled like one in writing.
    """

    name: str  # for messages, such as a path

    @abstractmethod
    def write(self, item: Item) -> None:
        """Write an item through to where others can read it."""

    def loss_note(self, num_lost: int) -> Item | None:
        """Return an item that tells how many were lost before it, or None if this sink has no place for it."""
        return None

    def close(self) -> None:
        """Release what `write` has opened."""


class GuardedSink(Generic[Item]):
    """Writes to a sink, and never raises.

    A failing sink is reported once, and tried again after 1 s, 2 s, 4 s and so on, at most MAX_RETRY_S. Until then
    `max_buffered` items are kept; of more, the oldest are lost, and counted. The sink is dropped when the reader of a
    pipe has left, after GIVE_UP_S of system errors, or after MAX_EXCEPTIONS other exceptions in a row.
    """

    def __init__(
        self,
        sink: Sink[Item],
        report: Callable[[GuardedSink[Any], str], None],
        *,
        max_buffered: int = MAX_BUFFERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`report` gets a message about this sink, for the other ones. With `max_buffered` = 1, an item replaces the
        one before, which doesn't count as lost."""
        self.name, self.num_lost, self.is_dropped, self.is_closed = sink.name, 0, False, False
        self._sink, self._report, self._clock = sink, report, clock
        self._max_buffered = max_buffered
        self._buffer: deque[Item] = deque()
        self._num_failures = 0  # in a row
        self._failing_since, self._retry_at = 0.0, float("-inf")
        self._has_reported = False

    @property
    def has_backlog(self) -> bool:
        """Whether items are kept for the next attempt."""
        return bool(self._buffer)

    def write(self, item: Item) -> None:
        """Write the item and those kept before it, or keep it until the next attempt."""
        if self.is_closed:
            return
        if self.is_dropped:
            self.num_lost += 1
            return
        if self._max_buffered == 1:
            self._buffer.clear()
        self._buffer.append(item)
        if len(self._buffer) > self._max_buffered:
            del self._buffer[1]  # not the first, of which a part may be written
            self.num_lost += 1
        if self._clock() >= self._retry_at:
            self._write_buffer()

    def close(self) -> None:
        """Make a last attempt to write what is kept, and report what is lost."""
        if not self.is_dropped and self._buffer:
            self._write_buffer()
        self.is_closed = True
        if self._max_buffered > 1:
            self.num_lost += len(self._buffer)
            self._buffer.clear()
            if self.num_lost:
                self._report(self, f"{self.name}: {counted(self.num_lost, 'record', be=True)} lost")
        try:
            self._sink.close()
        except Exception as error:  # everything is written through already
            self._report_once(f"{self.name} could not be closed ({describe_error(error)})")

    def _write_buffer(self) -> None:
        while self._buffer:
            try:
                self._sink.write(self._buffer[0])
            except Exception as error:  # a tracker may raise anything
                self._handle(error)
                return
            self._buffer.popleft()
            self._num_failures = 0
            note = self._sink.loss_note(self.num_lost) if self.num_lost else None
            if note is not None:  # the lost ones came after the first, which has just been written
                self._buffer.appendleft(note)
                self.num_lost = 0

    def _handle(self, error: Exception) -> None:
        now = self._clock()
        if self._num_failures == 0:
            self._failing_since = now
        self._num_failures += 1
        self._retry_at = now + min(2.0 ** min(self._num_failures - 1, 30), MAX_RETRY_S)
        if isinstance(error, OSError):
            is_final = error.errno in _PERMANENT or now - self._failing_since >= GIVE_UP_S
        else:
            is_final = self._num_failures >= MAX_EXCEPTIONS
        problem = f"{self.name} can't be written ({describe_error(error)})"
        if is_final:
            self.is_dropped = True
            self.num_lost += len(self._buffer) if self._max_buffered > 1 else 0
            self._buffer.clear()
            self._report(self, f"{problem}: nothing more will be written to it; training continues")
        else:
            self._report_once(f"{problem}; training continues, and this is tried again until it succeeds")

    def _report_once(self, message: str) -> None:
        if not self._has_reported:
            self._has_reported = True
            self._report(self, message)
