"""What all ranks must do together though one alone knows why: stop before the next step, or complete a checkpoint.

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
from typing import Any

from paddle.base import core


class HostGroup:
    """Rounds, in which every rank of a world takes part; of each name one a process, and one thread at a time."""

    def __init__(self, name: str) -> None:
        self._key = f"vit_static/agreement/{name}"
        self._others: list[Connection] = []  # rank 0's to all others, another rank's to rank 0

    def connect(self, rank: int, world_size: int) -> None:
        """What the first round else does. Waits for all ranks."""
        if world_size > 1 and not self._others:
            self._others = _answer(self._key, world_size) if rank == 0 else [_call(self._key)]

    def all_gather_object(self, value: Any, rank: int, world_size: int) -> list[Any]:
        """What each rank brings to this round, in no order of theirs but rank 0's first, the same list on all of them;
        what JSON can hold. Waits for all ranks. Raises EOFError or OSError where one has gone."""
        if world_size == 1:
            return [value]
        self.connect(rank, world_size)
        if rank > 0:
            (first,) = self._others
            first.send_bytes(json.dumps(value).encode())
            return list(json.loads(first.recv_bytes()))
        values = [value, *(json.loads(other.recv_bytes()) for other in self._others)]
        answer = json.dumps(values).encode()
        for other in self._others:
            other.send_bytes(answer)
        return list(json.loads(answer))

    def first_non_none(self, value: Any, rank: int, world_size: int) -> Any:
        """Of what ranks bring to this round and isn't None, the first; None where nobody brings anything."""
        return next((given for given in self.all_gather_object(value, rank, world_size) if given is not None), None)


def _answer(key: str, world_size: int) -> list[Connection]:
    """Rank 0's connections with the others, in any order."""
    password = secrets.token_bytes(32)
    with Listener(("", 0), authkey=password, backlog=world_size) as listener:
        with _uninterrupted():
            core.create_or_get_global_tcp_store().set(key, f"{listener.address[1]} {password.hex()}")
        return [listener.accept() for _ in range(world_size - 1)]


def _call(key: str) -> Connection:
    """Another rank's connection with rank 0."""
    with _uninterrupted():
        port, password = bytes(core.create_or_get_global_tcp_store().get(key)).decode().split()  # waits for it
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
