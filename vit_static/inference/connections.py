"""Limits on the connections of a server: their number, their number per client, and the time that each may take.

Uvicorn limits none of these. (Granian has a deadline for headers, Hypercorn one for each read; neither has limits per
client or a reserve for monitoring.) Here a listener admits each connection before any object is made for it, and a
subclass of Uvicorn's protocol gives every connection a deadline at every moment of its life. Connections beyond the
limits are admitted to a small reserve, in which only a monitoring request is answered.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import resource
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vit_static.common.errors import UserError

_LOGGER = logging.getLogger("uvicorn.error")  # whose lines are shown
NUM_RESERVED = 32  # connections beyond the limits that monitoring may use
_NUM_OTHER_DESCRIPTORS = 48  # left free for files and for connections that are being closed
_RESERVED_TIMEOUT_S = 5.0  # for a request in the reserve, and for an answer that the client doesn't read
_MIN_RESERVED_S = 1.0  # for which a request in the reserve isn't ended to admit another one
_PAUSE_S = 0.05  # before the next attempt when the system has no descriptor or memory for a connection
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TIMEOUT_RESPONSE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on connections; `choose_limits` fits them to the limit on descriptors."""

    max_connections: int
    max_per_client: int
    header_timeout_s: float = 10.0  # from the start of a connection, or the last answer, to the end of the headers
    request_timeout_s: float = 65.0  # from the end of the headers to the end of the answer


def choose_limits(
    max_connections: int | None, max_per_client: int | None, *, header_timeout_s: float, request_timeout_s: float
) -> ConnectionLimits:
    """Return limits for which this process has enough file descriptors.

    By default at most 512 connections, and half of them per client. Raises UserError for a number that exceeds the
    descriptors, and if they don't suffice for one connection.
    """
    descriptor_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number
    num_possible = descriptor_limit - num_open - NUM_RESERVED - _NUM_OTHER_DESCRIPTORS
    remedy = "raise the limit with 'ulimit -n'"
    if num_possible < 1:
        raise UserError(
            f"the limit of {descriptor_limit} file descriptors leaves none for connections ({num_open} are open, and "
            f"{NUM_RESERVED + _NUM_OTHER_DESCRIPTORS} are reserved); {remedy}"
        )
    if max_connections is not None and max_connections > num_possible:
        raise UserError(
            f"--max-connections {max_connections}: the limit of {descriptor_limit} file descriptors allows "
            f"{num_possible}; lower the number, or {remedy}"
        )
    num_connections = max_connections or min(512, num_possible)
    num_per_client = max_per_client or max(num_connections // 2, 1)
    return ConnectionLimits(num_connections, num_per_client, header_timeout_s, request_timeout_s)


def client_of(address: tuple[Any, ...]) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 network of an IPv6 address."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


class ConnectionTable:
    """The open connections by the client's address and port. For the event loop's thread only.

    `on_refusal` is called with the client for each connection that is closed, or admitted only to the reserve, because
    of the limits.
    """

    def __init__(self, limits: ConnectionLimits, on_refusal: Callable[[str], None]) -> None:
        self.limits, self._on_refusal = limits, on_refusal
        self._num_by_client: Counter[str] = Counter()
        self._reserved: dict[tuple[Any, ...], LimitedProtocol | None] = {}  # the oldest first; None: not started yet
        self._last_reserved_s = 0.0  # when the last one was admitted

    @property
    def num_open(self) -> int:
        """Number of connections, without the reserve."""
        return self._num_by_client.total()

    def admit(self, address: tuple[Any, ...]) -> bool:
        """Count a new connection and return True; return False if it must be closed."""
        client = client_of(address)
        if self.num_open < self.limits.max_connections and self._num_by_client[client] < self.limits.max_per_client:
            self._num_by_client[client] += 1
            return True
        self._on_refusal(client)
        if len(self._reserved) >= NUM_RESERVED and not self._end_oldest():
            return False
        self._reserved[address] = None
        self._last_reserved_s = time.monotonic()
        return True

    def must_wait(self) -> bool:
        """Return whether the reserve is full of connections that have just been accepted, and haven't been read yet.

        So many arrive at once that a monitoring request may be behind them. The system queues it until the event loop
        has seen which of these connections are idle and can be ended.
        """
        if len(self._reserved) < NUM_RESERVED or None not in self._reserved.values():
            return False
        is_recent = time.monotonic() - self._last_reserved_s < _MIN_RESERVED_S  # else one couldn't be started
        return is_recent and not any(each is not None and each.may_be_ended for each in self._reserved.values())

    def start(self, address: tuple[Any, ...], connection: LimitedProtocol) -> bool:
        """Record the protocol of an admitted connection; return whether it is in the reserve."""
        if address not in self._reserved:
            return False
        self._reserved[address] = connection
        return True

    def release(self, address: tuple[Any, ...], *, is_reserved: bool) -> None:
        """Forget a connection that has ended."""
        if is_reserved:
            self._reserved.pop(address, None)
            return
        client = client_of(address)
        self._num_by_client[client] -= 1
        if not self._num_by_client[client]:
            del self._num_by_client[client]

    def _end_oldest(self) -> bool:
        """End a connection of the reserve, and return whether there was one that may be ended.

        It is the oldest that waits for its client, or that had time for its answer, of the client that has the most.
        """
        candidates = {
            address: connection
            for address, connection in self._reserved.items()
            if connection is not None and connection.may_be_ended
        }
        if not candidates:
            return False
        num_by_client = Counter(client_of(address) for address in candidates)
        greediest, _ = num_by_client.most_common(1)[0]
        oldest = next(address for address in candidates if client_of(address) == greediest)
        del self._reserved[oldest]
        candidates[oldest].transport.abort()
        return True


class LimitedListener(socket.socket):
    """Listening socket that closes connections beyond the limits as it accepts them.

    So the event loop never runs out of descriptors. asyncio would log a line for each attempt, and stop listening.
    """

    table: ConnectionTable

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next admitted connection. Raises BlockingIOError if there is none, or if it must wait."""
        while True:
            if self.table.must_wait():
                raise BlockingIOError
            try:
                connection, address = super().accept()
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                _LOGGER.error("no resources for a connection: %s", error.strerror)
                time.sleep(_PAUSE_S)  # the socket stays readable, and the event loop would spin
                raise BlockingIOError from None
            if self.table.admit(address):
                return connection, address
            connection.close()


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 connection with a deadline for every phase, and an answer to a client that has half-closed it.

    A connection waits for headers, waits for the end of an answer, or is closing. A timer runs in each of these phases,
    so no client can hold a connection for longer than their sum.
    """

    table: ConnectionTable  # set in a subclass by `limited_protocol`
    _timer: asyncio.TimerHandle | None = None
    _is_half_closed = False
    _has_received = False  # anything since the last answer
    _address: tuple[Any, ...] = ()
    _is_reserved = False

    @property
    def is_idle(self) -> bool:
        """Whether no request is being received or answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def may_be_ended(self) -> bool:
        """Whether a newer connection may take this one's place in the reserve."""
        if self.loop.time() - self._start_s > _MIN_RESERVED_S:
            return True
        return self.is_idle and not _has_unread_data(self.transport)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline for the headers."""
        super().connection_made(transport)
        self._start_s = self.loop.time()
        self._address = transport.get_extra_info("peername")
        self._is_reserved = self.table.start(self._address, self)
        self.app_state = {**self.app_state, "is_reserved": self._is_reserved}
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another connection."""
        self._stop_timer()
        self.table.release(self._address, is_reserved=self._is_reserved)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_received = True
        super().data_received(data)

    def handle_events(self) -> None:
        """Start the deadline for the answer when the headers are complete."""
        cycle = self.cycle
        super().handle_events()
        if self.transport.is_closing():
            self._abort_after(_RESERVED_TIMEOUT_S)
        elif self.cycle is not cycle and not self.is_idle:
            self._abort_after(_RESERVED_TIMEOUT_S if self._is_reserved else self.table.limits.request_timeout_s)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keep a half-closed connection open while a complete request is being answered."""
        if self.is_idle or self.cycle.more_body:
            return None  # the request will never be complete
        self._is_half_closed = True
        return True

    def on_response_complete(self) -> None:
        """Start the deadline for the next headers, or for the client to read the answer."""
        self._expect_headers()
        super().on_response_complete()  # starts the next request if it has arrived already
        if self._is_half_closed and self.is_idle and not self.transport.is_closing():
            self.conn.send(h11.ConnectionClosed())
            self.transport.close()
        if self.transport.is_closing():
            self._abort_after(_RESERVED_TIMEOUT_S)

    def _expect_headers(self) -> None:
        self._has_received = False
        self._stop_timer()
        timeout_s = self.table.limits.header_timeout_s
        if self._is_reserved:
            timeout_s = min(timeout_s, _RESERVED_TIMEOUT_S)
        self._timer = self.loop.call_later(timeout_s, self._end_without_headers)

    def _end_without_headers(self) -> None:
        if self._has_received and not self.transport.is_closing():
            self.transport.write(_TIMEOUT_RESPONSE)
        self.transport.close()
        self._abort_after(_RESERVED_TIMEOUT_S)

    def _abort_after(self, timeout_s: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _has_unread_data(transport: asyncio.Transport) -> bool:
    """Return whether the client has sent something that the event loop hasn't read yet."""
    descriptor = transport.get_extra_info("socket").fileno()
    return bool(select.select([descriptor], [], [], 0)[0])


def limited_protocol(connections: ConnectionTable) -> type[LimitedProtocol]:
    """Return the protocol class for the connections of one server; Uvicorn makes its instances."""

    class BoundProtocol(LimitedProtocol):
        table = connections

    return BoundProtocol
