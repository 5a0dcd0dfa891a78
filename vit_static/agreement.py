"""What all ranks must do together though one alone knows why: stop before the next step.

Ranks agree through the key-value store that they have met in, so that the device isn't waited for, and a rank may be as
late as it likes, say because its disk is slow: no collective is under way that could time out.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paddle.base import core

_LONGEST_PAUSE_S = 0.005


class Agreement:
    """Rounds, in which every rank of a world takes part; one a process, as the store that counts them is."""

    def __init__(self) -> None:
        self._store: Any = None
        self._num_rounds = 0

    def first_reason(self, reason: str | None, world_size: int) -> str | None:
        """A reason that one of the ranks gives in this round, the same on all of them, or None. Waits for all ranks."""
        if world_size == 1:
            return reason
        if self._store is None:
            self._store = core.create_or_get_global_tcp_store()
        turn = f"vit_static/agreement/{self._num_rounds % 2}"
        # Two turns: while a slow rank still reads one round's outcome, a quick one may write the next one's, but not
        # that of the round after, for which it needs the slow one. The first reason is the last round.
        self._num_rounds += 1
        if reason is not None and self._add(f"{turn}/reasons", 1) == 1:
            with _uninterrupted():
                self._store.set(f"{turn}/reason", reason)
        num_here, pause_s = self._add("vit_static/agreement/arrivals", 1), 0.0001
        while num_here < self._num_rounds * world_size:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            num_here = self._add("vit_static/agreement/arrivals", 0)
        if self._add(f"{turn}/reasons", 0) == 0:
            return None
        with _uninterrupted():
            return bytes(self._store.get(f"{turn}/reason")).decode()

    def _add(self, key: str, number: int) -> int:
        """A counter of the store's, after `number` has been added to it."""
        with _uninterrupted():
            return int(self._store.add(key, number))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals come after it: one that interrupts the store while it waits for an answer is an error to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
