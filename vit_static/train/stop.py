"""Why and when a run stops: signals, bad images, failed saves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BAD_IMAGE, ON_REQUEST, UNSAVED, NONFINITE = "bad image", "stopped", "not saved", "not finite"


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its time, and what is to be told of it."""

    reason: str
    message: str

    @property
    def saves(self) -> bool:
        """Whether there is a state worth saving, and somewhere to save it."""
        return self.reason in (BAD_IMAGE, ON_REQUEST)


def stop_of(agreed: list[str] | None) -> Stop | None:
    return None if agreed is None else Stop(*agreed)


class StopRequests:
    """Whether SIGTERM or SIGINT has come. A second one ends the process at once, but not one within a second: a
    scheduler and a launcher may both pass the same request on."""

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0

    def receive(self, signum: int, frame: Any) -> None:
        if not self.received:
            self.received, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > 1.0:
            os._exit(128 + signum)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """While open, the two signals are noted instead of ending the process."""
    requests = StopRequests()
    before = {number: signal.signal(number, requests.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
