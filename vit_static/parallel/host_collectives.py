"""Host-side all-gather over sockets, independent of the device.

With it all ranks act together on what only one of them knows, for example to stop before the next step or to complete a
checkpoint. Each rank sends its value to rank 0, which sends all values back. Nothing waits for the device, and a rank
may be late, for example because its disk is slow: no collective is running that could time out. Only the training
loop's own waits have a limit (parallel.collective_timeout_s). (The key-value store through which ranks meet would work,
too, but each of its answers takes 40 ms.)
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
    """All ranks of a run, connected by sockets through rank 0.

    Each process has one group per name. Every rank must make the same calls, from one thread at a time.
    """

    def __init__(self, name: str) -> None:
        self._key = f"vit_static/host_group/{name}"
        self._connections: list[Connection] = []  # on rank 0 to all other ranks, on another rank to rank 0

    def connect(self, rank: int, world_size: int) -> None:
        """Connect all ranks, which the first collective does otherwise. Waits for all ranks."""
        if world_size > 1 and not self._connections:
            self._connections = connect_ranks(self._key, rank, world_size)

    def all_gather_object(self, value: Any, rank: int, world_size: int) -> list[Any]:
        """Return every rank's value, the same list on all ranks: rank 0's first, the others in any order.

        Values must be JSON. Waits for all ranks. Raises EOFError or OSError if the connection to one is lost.
        """
        if world_size == 1:
            return [value]
        self.connect(rank, world_size)
        if rank > 0:
            (rank_0,) = self._connections
            rank_0.send_bytes(json.dumps(value).encode())
            return list(json.loads(rank_0.recv_bytes()))
        values = [value, *(json.loads(connection.recv_bytes()) for connection in self._connections)]
        answer = json.dumps(values).encode()
        for connection in self._connections:
            connection.send_bytes(answer)
        return list(json.loads(answer))

    def first_non_none(self, value: Any, rank: int, world_size: int) -> Any:
        """Return the first of all ranks' values that isn't None, or None if there is none."""
        values = self.all_gather_object(value, rank, world_size)
        return next((other for other in values if other is not None), None)


def connect_ranks(key: str, rank: int, world_size: int) -> list[Connection]:
    """Return rank 0's connections to all other ranks, in any order, and another rank's one connection to rank 0.

    `key` names the connections in Paddle's store. Waits for all ranks.
    """
    return _accept_all(key, world_size) if rank == 0 else [_connect_to_rank_0(key)]


def _accept_all(key: str, world_size: int) -> list[Connection]:
    """Return rank 0's connections to the others, in any order."""
    password = secrets.token_bytes(32)
    with Listener(("", 0), authkey=password, backlog=world_size) as listener:
        with _blocked_signals():
            core.create_or_get_global_tcp_store().set(key, f"{listener.address[1]} {password.hex()}")
        return [listener.accept() for _ in range(world_size - 1)]


def _connect_to_rank_0(key: str) -> Connection:
    with _blocked_signals():
        port, password = bytes(core.create_or_get_global_tcp_store().get(key)).decode().split()  # waits for the key
    host = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0].rsplit(":", 1)[0]
    return Client((host, int(port)), authkey=bytes.fromhex(password))


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Delay signals: one that arrives while Paddle's store waits for an answer makes the store fail."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
