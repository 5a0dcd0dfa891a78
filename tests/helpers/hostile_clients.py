"""Clients that try to exhaust a server: idle, slow, half-closed, deaf, huge and malformed ones, mixed for a soak test.

Each client is a coroutine that opens one connection, does its harm until the server or `patience_s` ends it, and
returns the status that it received (0: closed without an answer; None: still open at the end).
"""

from __future__ import annotations

import asyncio
import io
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

Client = Callable[[int, float], Awaitable["int | None"]]
HOST = "127.0.0.1"


def request_head(path: str, num_bytes: int, media_type: str = "image/jpeg") -> bytes:
    """Return the headers of a POST request with a body of this size."""
    headers = f"Host: localhost\r\nContent-Type: {media_type}\r\nContent-Length: {num_bytes}\r\n"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode()


FORM_TYPE = "multipart/form-data; boundary=b"


def form(*files: bytes) -> bytes:
    """Return a form of FORM_TYPE with these files."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    return b"".join(head + content + b"\r\n" for content in files) + b"--b--\r\n"


def deep_png(side: int) -> bytes:
    """Return a grey PNG of 16 bits per pixel, the mode whose conversion needs the most memory."""
    image = Image.fromarray(np.zeros((side, side), np.uint16))
    image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


async def read_status(reader: asyncio.StreamReader, patience_s: float) -> int | None:
    """Return the status of the response; 0 if the connection ends without one, None if nothing comes in time."""
    try:
        line = await asyncio.wait_for(reader.readline(), patience_s)
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    except asyncio.TimeoutError:
        return None
    except OSError:
        return 0


def _client(
    start: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> Client:
    """Return a client that connects, runs `start`, and waits for the answer or the end."""

    async def run(port: int, patience_s: float) -> int | None:
        writer = None
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
            harm = asyncio.ensure_future(start(reader, writer))
            try:
                return await read_status(reader, patience_s)
            finally:
                harm.cancel()
                await asyncio.gather(harm, return_exceptions=True)
        except OSError:
            return 0
        finally:
            if writer is not None:
                writer.transport.abort()

    return run


async def _stay_idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def _send_slow_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
    for number in range(10_000):
        await asyncio.sleep(0.5)
        writer.write(f"X-{number}: a\r\n".encode())


async def _send_slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(request_head("/predict", 1_000_000))
    while True:
        await asyncio.sleep(0.5)
        writer.write(b"x")


async def _send_noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    starts = [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"POST /predict HTTP/9.9\r\n\r\n",
        request_head("/predict", 50),
        b"\x16\x03\x01",
    ]
    writer.write(random.choice(starts) + random.randbytes(random.randrange(1, 5000)) + b"\r\n\r\n")


async def _never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)


def half_closed(body: bytes, declared_bytes: int | None = None) -> Client:
    """Return a client that sends a request, whole unless it declares more, and closes its side of the connection."""

    async def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request_head("/predict", declared_bytes or len(body)) + body)
        writer.write_eof()

    return _client(start)


def posts(body: bytes, path: str = "/predict", media_type: str = "image/jpeg") -> Client:
    """Return a client that sends a request and waits for the answer."""

    async def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request_head(path, len(body), media_type) + body)

    return _client(start)


idle, slow_headers, slow_body = _client(_stay_idle), _client(_send_slow_headers), _client(_send_slow_body)
noise, deaf = _client(_send_noise), _client(_never_read)


@dataclass
class Crowd:
    """Clients of several kinds at once, each replaced by a new one of its kind when it ends."""

    port: int
    num_clients: dict[str, int]  # by kind
    kinds: dict[str, Client]
    patience_s: float
    statuses: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    _has_ended: bool = False

    async def run(self, seconds: float) -> None:
        """Keep this many clients of each kind busy for a time."""
        tasks = [
            asyncio.ensure_future(self._repeat(kind))
            for kind, number in self.num_clients.items()
            for _ in range(number)
        ]
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self._has_ended = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            await task  # raises the mistake of a client

    async def _repeat(self, kind: str) -> None:
        while not self._has_ended:
            self.statuses[kind, await self.kinds[kind](self.port, self.patience_s)] += 1
            await asyncio.sleep(random.uniform(0.0, 0.5))
