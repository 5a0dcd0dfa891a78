"""Limits on requests: size, speed and time of a body, and the memory that all bodies and images use together."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

_MAX_DRAINED_BODIES = 10  # how much of a refused body is still received, in multiples of the largest allowed one
_BODY_GRACE_S = 5.0  # before the rate of a body counts, so that a slow start or a short pause does no harm
RETRY_LATER = {"Retry-After": "1"}


@dataclass(frozen=True)
class Limits:
    """Limits on requests, batches and connections; connections.py describes the last three."""

    batch_size: int = 32
    max_wait_s: float = 0.005  # how long a request waits for others to join its batch
    max_bytes: int = 20_000_000  # of a body, so of an image file, or of all images in a form
    max_images: int = 32  # of a request
    max_total_bytes: int = 256_000_000  # of all bodies that are being received or wait
    max_pixels: int = 64_000_000  # of an image
    max_total_pixels: int = 64_000_000  # of all images that are being decoded
    max_waiting: int = 512  # images of received requests at once
    timeout_s: float = 30.0  # for receiving a body, and for answering it
    min_bytes_per_s: float = 10_000.0  # of a body
    max_connections: int | None = None
    max_per_client: int | None = None
    header_timeout_s: float = 10.0


class EarlyRefusal(HTTPException):
    """Refusal of a request before all of its body has arrived."""


class SharedCount:
    """A number in use, of which each client may have a share. For the event loop's thread only."""

    def __init__(self, limit: int, share: float) -> None:
        """`share`: of the limit, that one client may use; at least 1 is left to it."""
        self.limit, self.limit_per_client = limit, max(min(round(share * limit), limit), 1)
        self.total = 0
        self._by_client: Counter[str] = Counter()

    def has_room(self, client: str, number: int) -> bool:
        """Return whether a client may use so many more."""
        has_share = self._by_client[client] + number <= self.limit_per_client
        return has_share and self.total + number <= self.limit

    def add(self, client: str, number: int) -> None:
        """Count what a client uses, or with a negative number no longer uses."""
        self.total += number
        self._by_client[client] += number
        if not self._by_client[client]:
            del self._by_client[client]


class PixelBudget:
    """Semaphore over numbers of pixels. Clients that wait take turns. For the event loop's thread only."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = self._num_free = max_pixels
        # by client, in the order of their turns
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    async def acquire(self, num_pixels: int, client: str) -> int:
        """Wait for room, and return the number to release: an image above the limit takes all of it."""
        num_pixels = min(num_pixels, self.max_pixels)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((num_pixels, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(num_pixels)
            else:
                self._waiting[client].remove((num_pixels, turn))
                self._leave_if_served(client)
                self._admit()
            raise
        return num_pixels

    def release(self, num_pixels: int) -> None:
        """Return pixels, and admit those that wait for them."""
        self._num_free += num_pixels
        self._admit()

    def release_after(self, future: Future[Any], num_pixels: int) -> None:
        """Release when a thread has finished, which may be long after the request that waited for it has timed out."""
        loop = asyncio.get_running_loop()

        def release(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(self.release, num_pixels)

        future.add_done_callback(release)

    def _admit(self) -> None:
        while self._waiting:
            client, images = next(iter(self._waiting.items()))
            if images[0][0] > self._num_free:
                return
            num_pixels, turn = images.popleft()
            self._num_free -= num_pixels
            self._waiting.move_to_end(client)
            self._leave_if_served(client)
            turn.set_result(None)

    def _leave_if_served(self, client: str) -> None:
        if not self._waiting[client]:
            del self._waiting[client]


class BodyReader:
    """Receives bodies within the limits on their size, speed and time, and on the memory of all of them.

    For the event loop's thread only.
    """

    def __init__(self, limits: Limits, share: float) -> None:
        """`share`: of the memory of all bodies, that those of one client may use."""
        self._limits = limits
        self._num_bytes = SharedCount(limits.max_total_bytes, share)

    @asynccontextmanager
    async def receive(self, request: Request, client: str) -> AsyncIterator[bytearray]:
        """Receive a request's body, which counts as memory in use until the end of the block.

        Raises HTTPException, or EarlyRefusal while the body is still arriving, as soon as a limit is exceeded.
        """
        body = bytearray()
        try:
            await self._fill(body, request, client)
            yield body
        finally:
            self._num_bytes.add(client, -len(body))

    async def _fill(self, body: bytearray, request: Request, client: str) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > self._limits.max_bytes:
            raise self._too_large(EarlyRefusal)
        try:
            async for chunk, is_more in _chunks(request.receive, self._limits):
                refusal = EarlyRefusal if is_more else HTTPException
                if len(body) + len(chunk) > self._limits.max_bytes:
                    raise self._too_large(refusal)
                if not self._num_bytes.has_room(client, len(chunk)):
                    message = f"the server is busy, it holds {self._num_bytes.total} bytes of images; try again"
                    raise refusal(503, message, RETRY_LATER)
                body += chunk
                self._num_bytes.add(client, len(chunk))
        except asyncio.TimeoutError:
            raise HTTPException(
                408,
                f"the body arrived at less than {self._limits.min_bytes_per_s:g} bytes per second, or not within "
                f"{self._limits.timeout_s:g} s; send it again",
                {"Connection": "close"},
            ) from None
        except HTTPException:
            self._num_bytes.add(client, -len(body))
            body.clear()  # the exception keeps a reference to it while the response is sent
            raise
        if not body:
            message = "the body is empty; send an image file, for example with curl --data-binary @FILE"
            raise HTTPException(400, message)

    def _too_large(self, refusal: type[HTTPException]) -> HTTPException:
        return refusal(413, f"the body is larger than {self._limits.max_bytes} bytes; send a smaller image file")


class DrainingResponse(JSONResponse):
    """Response that keeps receiving the body for a while, discards it, and then closes the connection.

    Closing at once would reset the connection, and a client that is still sending would lose the response.
    """

    def __init__(self, error: HTTPException, limits: Limits) -> None:
        super().__init__({"error": error.detail}, error.status_code, {**(error.headers or {}), "Connection": "close"})
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        remaining_bytes = _MAX_DRAINED_BODIES * self._limits.max_bytes
        with suppress(asyncio.TimeoutError, ClientDisconnect):
            async for chunk, _ in _chunks(receive, self._limits):
                remaining_bytes -= len(chunk)
                if remaining_bytes <= 0:
                    break
        await send({"type": "http.response.body", "body": b""})


async def _chunks(receive: Receive, limits: Limits) -> AsyncIterator[tuple[bytes, bool]]:
    """Yield the parts of a body, each with whether there are more.

    Raises asyncio.TimeoutError for a body that takes too long or arrives too slowly, and ClientDisconnect.
    """
    start, num_bytes, is_more = time.monotonic(), 0, True
    while is_more:
        allowed_s = min(limits.timeout_s, _BODY_GRACE_S + num_bytes / limits.min_bytes_per_s)
        message = await asyncio.wait_for(receive(), start + allowed_s - time.monotonic())
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, is_more = message.get("body", b""), message.get("more_body", False)
        num_bytes += len(chunk)
        yield chunk, is_more
