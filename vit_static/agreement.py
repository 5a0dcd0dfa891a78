"""What all ranks must do together though one alone knows why: stop before the next step.

Ranks tell rank 0 over a connection each, and it tells all. So the device isn't waited for, and a rank may be as late as
it likes, say because its disk is slow: no collective is under way that could time out. (The key-value store in which
ranks have met would do, but for the 40 ms that each of its answers takes.)
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener

from paddle.base import core

_KEY = "vit_static/agreement"


class Agreement:
    """Rounds, in which every rank of a world takes part; one a process."""

    def __init__(self) -> None:
        self._others: list[Connection] = []  # rank 0's to all others, another rank's to rank 0

    def first_reason(self, reason: str | None, rank: int, world_size: int) -> str | None:
        """The reason of the first rank that gives one in this round, on all of them, or None. Waits for all ranks."""
        if world_size == 1:
            return reason
        if not self._others:
            self._others = _answer(world_size) if rank == 0 else [_call()]
        if rank > 0:
            (first,) = self._others
            first.send_bytes(json.dumps(reason).encode())
            found: str | None = json.loads(first.recv_bytes())
            return found
        reasons = [reason, *(json.loads(other.recv_bytes()) for other in self._others)]
        found = next((given for given in reasons if given is not None), None)
        for other in self._others:
            other.send_bytes(json.dumps(found).encode())
        return found


def _answer(world_size: int) -> list[Connection]:
    """Rank 0's connections with the others, in any order."""
    password = secrets.token_bytes(32)
    with Listener(("", 0), authkey=password, backlog=world_size) as listener:
        with _uninterrupted():
            core.create_or_get_global_tcp_store().set(_KEY, f"{listener.address[1]} {password.hex()}")
        return [listener.accept() for _ in range(world_size - 1)]


def _call() -> Connection:
    """Another rank's connection with rank 0."""
    with _uninterrupted():
        port, password = bytes(core.create_or_get_global_tcp_store().get(_KEY)).decode().split()  # waits for it
    host = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0].rsplit(":", 1)[0]
    return Client((host, int(port)), authkey=bytes.fromhex(password))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals come after it: one that interrupts Paddle's store while it waits for an answer is an error to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
