"""The exported model over HTTP, and the verb `serve`.

An image goes through three places: the event loop receives its bytes, one of a few threads decodes and preprocesses
them (so that what waits is small), and one thread puts what waits together and runs the model. Whatever is too much is
refused at the door: a body by its size, a picture by its pixels, a request by how many are there already.
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vit_static.common.errors import PredictError, UserError
from vit_static.common.text import say
from vit_static.config.schema import InferencePrecision
from vit_static.data.dali_pipeline import size_before_crop
from vit_static.inference.attention_maps import attention_map, load_exported
from vit_static.inference.image_io import read_pixels
from vit_static.inference.predictor import Predictor, load_predictor
from vit_static.inference.server_page import PAGE
from vit_static.model.vit import VisionTransformer

# Of Pillow's many formats those that browsers show; among the others are some that run programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
_THROWN_AWAY = 10  # times the largest body
_GRACE_S = 5.0  # beyond a request's own limit, before a stop waits no longer
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """What a request may be, and how many of them there may be. A batch waits `max_wait_s` for others at most."""

    batch_size: int = 32
    max_wait_s: float = 0.005
    max_bytes: int = 20_000_000
    max_pixels: int = 64_000_000
    max_waiting: int = 256
    timeout_s: float = 30.0


class Metrics:
    """What /metrics says, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds, sizes = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30), (1, 2, 4, 8, 16, 32, 64, 128)
        self.requests = Counter("vit_static_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "vit_static_request_seconds", "From the headers to the answer", ["path"], buckets=seconds,
            registry=self.registry,
        )  # fmt: skip
        self.under_way = Gauge("vit_static_requests_under_way", "Images not yet answered", registry=self.registry)
        self.batch_sizes = Histogram(
            "vit_static_batch_size", "Images that the model was run on at once", buckets=sizes, registry=self.registry
        )
        self.model_seconds = Histogram(
            "vit_static_model_seconds", "The model's time on a batch", buckets=seconds, registry=self.registry
        )


class Batcher:
    """A thread that puts what waits together and runs it: as soon as there is a batch of `batch_size`, or the first of
    it has waited `max_wait_s`. What became too late for its asker is left out."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], batch_size: int, max_wait_s: float) -> None:
        self._run, self._batch_size, self._max_wait_s = run, batch_size, max_wait_s
        self._waiting: queue.SimpleQueue[tuple[float, np.ndarray, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, one: np.ndarray) -> Future[np.ndarray]:
        """An input [1, ...] of `run`; its row of the answer."""
        future: Future[np.ndarray] = Future()
        self._waiting.put((time.monotonic(), one, future))
        return future

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Returns when all that waits is answered."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, is_last = [first], False
            while len(batch) < self._batch_size and not is_last:
                try:
                    left = first[0] + self._max_wait_s - time.monotonic()
                    following = self._waiting.get(timeout=left) if left > 0.0 else self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    is_last = True
                else:
                    batch.append(following)
            self._answer([(one, future) for _, one, future in batch if future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _answer(self, batch: list[tuple[np.ndarray, Future[np.ndarray]]]) -> None:
        if not batch:
            return
        try:
            rows = self._run(np.concatenate([one for one, _ in batch]))
        except Exception as error:  # theirs to say: the next batch may be well
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), row in zip(batch, rows, strict=True):
            future.set_result(row)


class Service:
    """The model at work, and the answers to requests."""

    def __init__(self, folder: Path, predictor: Predictor, limits: Limits) -> None:
        self.folder, self.predictor, self.limits = folder, predictor, limits
        self.metrics = Metrics()
        self._num_under_way = 0
        self._decoders = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")
        self._lookers = ThreadPoolExecutor(1, "attention")  # one at a time: its model records what it sees
        self._looked_into: VisionTransformer | None = None
        self._batcher = Batcher(self._run, limits.batch_size, limits.max_wait_s)

    def close(self) -> None:
        self._decoders.shutdown()
        self._lookers.shutdown()
        self._batcher.close()

    def app(self) -> ASGIApp:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/predict", self._limited(self.predict), methods=["POST"]),
            Route("/attention", self._limited(self.attention), methods=["POST"]),
        ]

        async def refuse_early(request: Request, error: Exception) -> Response:
            assert isinstance(error, _RefusedEarly)
            return _EarlyAnswer(error, self.limits)

        handlers = {HTTPException: _as_json, _RefusedEarly: refuse_early}
        return self._counted(Starlette(routes=routes, exception_handlers=handlers))

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE, headers=_HEADERS)

    async def health(self, request: Request) -> Response:
        is_well = self._batcher.is_alive()
        card = self.predictor.card
        said = {
            "status": "ok" if is_well else "the model's thread has ended",
            "model": f"ViT {card.model.variant}",
            "image_size": card.preprocessing.image_size,
            "num_classes": len(card.class_names),
            "runs_in": self.predictor.description,
        }
        return JSONResponse(said, 200 if is_well else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def predict(self, request: Request, body: bytes) -> Response:
        """The likeliest `top_k` classes of the image that the body is, as `./run.sh predict` writes them."""
        top_k = self._top_k(request)
        inputs, _ = await self._in_thread(self._decoders, self._decode, body)
        row = await asyncio.wrap_future(self._batcher.submit(inputs))
        (prediction,) = self.predictor.predictions(row[None], top_k)
        if isinstance(prediction, PredictError):
            raise HTTPException(500, str(prediction))
        return JSONResponse({"top": prediction.top()})

    async def attention(self, request: Request, body: bytes) -> Response:
        """Where the model looked: the share of each patch, row by row, and the part of the image that they are of."""
        inputs, box = await self._in_thread(self._decoders, self._decode, body)
        grid = await self._in_thread(self._lookers, self._look, inputs)
        return JSONResponse({"grid": np.round(grid.astype(float), 6).tolist(), "box": box})

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        self.metrics.batch_sizes.observe(len(inputs))
        with self.metrics.model_seconds.time():
            return self.predictor.logits(inputs)

    def _decode(self, body: bytes) -> tuple[np.ndarray, list[float]]:
        pixels = read_pixels(io.BytesIO(body), "the image", formats=FORMATS, max_pixels=self.limits.max_pixels)
        return self.predictor.preprocess([pixels]), self._seen_box(*pixels.shape[:2])

    def _seen_box(self, height: int, width: int) -> list[float]:
        """What the model sees of an image: left, top, width and height as shares of the image's."""
        asked = self.predictor.card.preprocessing
        if asked.resize == "direct":
            return [0.0, 0.0, 1.0, 1.0]
        least = size_before_crop(asked.image_size, asked.as_evaluation())
        scale = max(least[0] / height, least[1] / width)
        shares = [
            min(side / (whole * scale), 1.0) for side, whole in zip(asked.image_size, (height, width), strict=True)
        ]
        return [(1.0 - shares[1]) / 2, (1.0 - shares[0]) / 2, shares[1], shares[0]]

    def _look(self, inputs: np.ndarray) -> np.ndarray:
        if self._looked_into is None:
            self._looked_into, _ = load_exported(self.folder)
        return attention_map(self._looked_into, inputs)[0]

    def _top_k(self, request: Request) -> int:
        text = request.query_params.get("top_k", "5")
        if not (text.isascii() and text.isdecimal() and int(text[:9]) >= 1):
            raise HTTPException(400, f"top_k={text[:40]}: must be a number of at least 1")
        return min(int(text[:9]), len(self.predictor.card.class_names))

    async def _body(self, request: Request) -> bytes:
        """Refused as soon as it is known to be too large."""
        limit = self.limits.max_bytes
        refusal = f"the body is larger than {limit} bytes"
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise _RefusedEarly(413, refusal)
        parts: list[bytes] = []

        async def receive_all() -> None:
            size, is_more = 0, True
            while is_more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size, is_more = size + len(parts[-1]), message.get("more_body", False)
                if size > limit:
                    raise _RefusedEarly(413, refusal) if is_more else HTTPException(413, refusal)

        try:
            await asyncio.wait_for(receive_all(), self.limits.timeout_s)
        except asyncio.TimeoutError:
            late = f"the body did not come within {self.limits.timeout_s:g} s"
            raise HTTPException(408, late, {"Connection": "close"}) from None
        if body := b"".join(parts):
            return body
        raise HTTPException(400, "the body is empty; it must be an image file, as by curl --data-binary @FILE")

    async def _in_thread(self, threads: ThreadPoolExecutor, do: Callable[[Any], Any], argument: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads, do, argument)

    def _limited(
        self, answer: Callable[[Request, bytes], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that takes an image, within the limits of number, size and time."""
        busy = {"Retry-After": "1"}

        async def limited(request: Request) -> Response:
            if self._num_under_way >= self.limits.max_waiting:
                raise _RefusedEarly(503, f"{self.limits.max_waiting} requests are under way; try again", busy)
            with self._under_way():
                body = await self._body(request)
                try:
                    return await asyncio.wait_for(answer(request, body), self.limits.timeout_s)
                except asyncio.TimeoutError:
                    raise HTTPException(503, f"no answer within {self.limits.timeout_s:g} s; try again", busy) from None
                except PredictError as error:
                    raise HTTPException(400, str(error)) from None

        return limited

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self._num_under_way += 1
        self.metrics.under_way.inc()
        try:
            yield
        finally:
            self._num_under_way -= 1
            self.metrics.under_way.dec()

    def _counted(self, app: Starlette) -> ASGIApp:
        """The same, each answer in the metrics: also those that no endpoint gives."""
        paths = {route.path for route in app.routes if isinstance(route, Route)}

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            status = "no answer"  # to a client that has gone

            async def noted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            path = scope["path"] if scope["path"] in paths else "other"
            begin = time.perf_counter()
            try:
                await app(scope, receive, noted)
            except ClientDisconnect:
                pass
            finally:
                self.metrics.requests.labels(path, status).inc()
                self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)

        return counted


class _RefusedEarly(HTTPException):
    """Before all of the body has come."""


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class _EarlyAnswer(JSONResponse):
    """Then throws away what still comes, for a while, and closes the connection. Closed at once, a connection is reset,
    and a client that is still sending loses the answer."""

    def __init__(self, error: HTTPException, limits: Limits) -> None:
        super().__init__({"error": error.detail}, error.status_code, {**(error.headers or {}), "Connection": "close"})
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})

        async def throw_away() -> None:
            left, is_more = _THROWN_AWAY * self._limits.max_bytes, True
            while is_more and left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                is_more = message.get("more_body", False)

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(throw_away(), self._limits.timeout_s)
        await send({"type": "http.response.body", "body": b""})


def serve_model(
    folder: Path, host: str, port: int, limits: Limits, precision: InferencePrecision | None = None
) -> None:
    """The verb: serves until it is asked to stop, answers what is under way, and ends with KeyboardInterrupt."""
    predictor = load_predictor(folder, precision=precision)
    predictor.probabilities(
        [np.zeros((*predictor.card.preprocessing.image_size, 3), np.uint8)]
    )  # its first run is slow
    listener = _listen(host, port)
    service = Service(folder, predictor, limits)
    try:
        config = uvicorn.Config(
            service.app(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http="h11",
            # A client may take its time to send, and we ours to answer.
            timeout_graceful_shutdown=round(2 * limits.timeout_s + _GRACE_S),
        )
        say(f"{folder}: {predictor.description}; batches of up to {limits.batch_size}")
        where = f"[{host}]" if ":" in host else host
        print(f"serving {folder} at http://{where}:{listener.getsockname()[1]}/", flush=True)
        uvicorn.Server(config).run([listener])
        raise KeyboardInterrupt  # Uvicorn has done so, unless the signal is one that this process was born to ignore
    finally:
        service.close()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: can't be listened at ({error}); choose others") from None
