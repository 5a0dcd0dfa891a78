"""A watch over the ranks of a run: names the rank that the others wait for, and ends the run after a time limit.

A collective returns when all ranks have joined it. If one is stopped, hangs or has lost its device, the others wait,
and none of them knows for whom. So a thread of each rank reports once per second, over a socket to rank 0, what its
rank waits for. Rank 0 judges for all: a rank that no longer reports is silent; one that reports, but waits for nothing
while others do, is behind. If rank 0 itself is silent, each other rank ends by itself.

This works on CPUs and GPUs, in any program, and with any launcher. Gloo's and NCCL's own time limits don't know which
rank is missing.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from vit_static.common.errors import EXIT_UNANSWERED
from vit_static.common.text import duration, say
from vit_static.parallel.host_collectives import connect_ranks

# With a short collective_timeout_s, the first two are shorter, too.
_REPORT_INTERVAL_S = 1.0
_SILENT_AFTER_S = 5.0  # without a report; a busy rank may skip some
_NOTICE_AFTER_S = 20.0  # then a line says whom the others wait for

_waits: dict[int, tuple[str, int]] = {}  # by thread: what it waits for, and a number that differs for each wait
_num_waits = 0


@contextmanager
def waiting_for_ranks(what: str) -> Iterator[None]:
    """Mark that this thread waits for other ranks, or for a device that may wait for theirs, within the context."""
    global _num_waits
    thread, outer = threading.get_ident(), _waits.get(threading.get_ident())
    _num_waits += 1
    _waits[thread] = what, _num_waits
    try:
        yield
    finally:
        if outer is None:
            del _waits[thread]
        else:
            _waits[thread] = outer


@dataclass
class RankStatus:
    """What is known of one rank. Times are sums of intervals in which the observer itself was running."""

    name: str = ""  # "rank 3 on node-b"
    wait: str | None = None  # what it waits for
    waited_s: float = 0.0
    silent_s: float = 0.0  # since its last report
    heard_at: float = field(default_factory=time.time)  # the time of that report
    began_at: float = field(default_factory=time.time)  # when the wait began


@dataclass(frozen=True)
class Verdict:
    """The rank that others wait for, how long they have waited, and the sentence that names it and since when."""

    rank: int | None  # None if all wait
    waited_s: float
    is_silent: bool
    message: str


def judge(ranks: dict[int, RankStatus], silent_after_s: float = _SILENT_AFTER_S) -> Verdict | None:
    """Return whom the ranks wait for; None if none waits. A rank is silent `silent_after_s` after its last report."""
    silent = {rank: status for rank, status in ranks.items() if status.silent_s >= silent_after_s}
    waiting = {rank: status for rank, status in ranks.items() if status.wait and rank not in silent}
    if not waiting:
        return None
    longest = max(waiting.values(), key=lambda status: status.waited_s)
    if silent:
        rank, status = max(silent.items(), key=lambda item: item[1].silent_s)
        others = _and_others(len(silent) - 1)
        message = f"{status.name} has not answered since {_clock(status.heard_at)}{others}"
        return Verdict(rank, longest.waited_s, True, message)
    behind = [rank for rank in ranks if rank not in waiting]
    if behind:
        status = ranks[behind[0]]
        others = _and_others(len(behind) - 1)
        message = (
            f"{status.name} is running, but has not joined the {longest.wait} of the others since "
            f"{_clock(longest.began_at)}{others}"
        )
        return Verdict(behind[0], longest.waited_s, False, message)
    shortest = min(waiting.values(), key=lambda status: status.waited_s)
    message = f"no rank has finished its {shortest.wait} since {_clock(shortest.began_at)}, and all are running"
    return Verdict(None, shortest.waited_s, False, message)


def _and_others(count: int) -> str:
    return "" if count == 0 else ", nor has 1 other rank" if count == 1 else f", nor have {count} other ranks"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


class RankWatch:
    """The thread of one rank. It ends with the process, or when the other ranks have ended."""

    def __init__(
        self,
        rank: int,
        names: list[str],
        connections: dict[int, Connection],
        limit_s: float,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        """`names` are those of all ranks, for messages. `connections`: on rank 0 to each other rank, else to rank 0.

        After a wait of `limit_s` seconds, `end_process` is called with EXIT_UNANSWERED.
        """
        self.rank, self.limit_s = rank, limit_s
        self.ranks = {
            other: RankStatus(name) for other, name in enumerate(names) if 0 in (rank, other) or other == rank
        }
        self._connections, self._end_process = connections, end_process
        self._interval_s = min(_REPORT_INTERVAL_S, limit_s / 10)
        self._silent_after_s = min(_SILENT_AFTER_S, limit_s / 2)
        self._wait_number = 0  # of the wait in `ranks[rank]`
        self._announced: int | None = None  # the silent rank that a line has named

    def start(self) -> threading.Thread:
        """Start the thread, a daemon."""
        thread = threading.Thread(target=self._run, daemon=True, name="vit_static rank watch")
        thread.start()
        return thread

    def _run(self) -> None:
        last = time.monotonic()
        while self._connections:
            readable = select.select(list(self._connections.values()), [], [], self._interval_s)[0]
            for rank in [rank for rank, connection in self._connections.items() if connection in readable]:
                self._receive(rank)
            elapsed = time.monotonic() - last
            if elapsed >= self._interval_s:
                last += elapsed
                # If this process was stopped itself, the time that passed says nothing about the others.
                self._tick(min(elapsed, 2 * self._interval_s))

    def _tick(self, elapsed_s: float) -> None:
        """Report, and judge the ranks, `elapsed_s` seconds after the last call."""
        self._update_own(elapsed_s)
        for rank in self._connections:
            self.ranks[rank].silent_s += elapsed_s
        own = self.ranks[self.rank]
        self._send({"wait": own.wait, "waited_s": own.waited_s, "began_at": own.began_at})
        verdict = judge(self.ranks, self._silent_after_s)
        if self.rank > 0 and verdict is not None and not (verdict.is_silent and verdict.rank == 0):
            verdict = None  # left to rank 0, which knows all
        self._announce(verdict)
        if verdict is not None and verdict.waited_s >= self.limit_s:
            self._end(
                f"{verdict.message}; others have waited for {duration(verdict.waited_s)} "
                "(parallel.collective_timeout_s), so the run ends without saving"
            )

    def _update_own(self, elapsed_s: float) -> None:
        own = self.ranks[self.rank]
        what, number = min(_waits.copy().values(), key=lambda wait: wait[1], default=(None, 0))
        if number == self._wait_number:
            own.waited_s += elapsed_s
        else:
            own.wait, own.waited_s, own.began_at, self._wait_number = what, 0.0, time.time(), number

    def _announce(self, verdict: Verdict | None) -> None:
        """Say once which rank is silent, before the limit, and when it answers again."""
        if self._announced is not None:
            status = self.ranks.get(self._announced)
            if status is None or status.silent_s < self._silent_after_s:
                if status is not None:
                    say(f"{status.name} answers again")
                self._announced = None
        elif verdict is not None and verdict.is_silent and _NOTICE_AFTER_S <= verdict.waited_s < self.limit_s:
            limit = f"{duration(self.limit_s)} (parallel.collective_timeout_s)"
            say(f"{verdict.message}; the others wait for it, for up to {limit}")
            self._announced = verdict.rank

    def _send(self, message: dict[str, Any]) -> None:
        """Send to all connected ranks, without waiting for one that doesn't read."""
        data = json.dumps(message).encode()
        writable = select.select([], list(self._connections.values()), [], 0)[1]
        for rank, connection in list(self._connections.items()):
            if connection in writable:
                try:
                    connection.send_bytes(data)
                except OSError:
                    self._disconnect(rank)

    def _receive(self, rank: int) -> None:
        connection, status = self._connections[rank], self.ranks[rank]
        try:
            while connection.poll():
                message = json.loads(connection.recv_bytes())
                if "end" in message:
                    say(message["end"])
                    self._end_process(EXIT_UNANSWERED)
                    return
                status.wait, status.waited_s = message["wait"], message["waited_s"]
                status.began_at, status.heard_at, status.silent_s = message["began_at"], time.time(), 0.0
        except (OSError, EOFError):
            self._disconnect(rank)

    def _disconnect(self, rank: int) -> None:
        """Forget a rank that has ended; if it ended too early, the launcher says so."""
        del self._connections[rank], self.ranks[rank]

    def _end(self, message: str) -> None:
        self._send({"end": message})
        say(message)
        self._end_process(EXIT_UNANSWERED)


def start_rank_watch(rank: int, world_size: int, limit_s: float) -> RankWatch:
    """Connect all ranks, and start the watch of this one. Waits for all ranks."""
    connections = connect_ranks("vit_static/rank_watch", rank, world_size)
    own = [rank, socket.gethostname()]
    if rank == 0:
        hellos = [json.loads(connection.recv_bytes()) for connection in connections]
        hosts = [host for _, host in sorted([own, *hellos])]
        for connection in connections:
            connection.send_bytes(json.dumps(hosts).encode())
        by_rank = {other: connection for (other, _), connection in zip(hellos, connections, strict=True)}
    else:
        (connection,) = connections
        connection.send_bytes(json.dumps(own).encode())
        hosts = json.loads(connection.recv_bytes())
        by_rank = {0: connection}
    is_one_host = len(set(hosts)) == 1
    names = [f"rank {other}" + ("" if is_one_host else f" on {host}") for other, host in enumerate(hosts)]
    watch = RankWatch(rank, names, by_rank, limit_s)
    watch.start()
    return watch
