"""The verb `serve`: an exported model over HTTP.

The event loop receives an image's bytes, a few threads decode and preprocess them (so that what waits for the model is
small), and one thread forms batches and runs the model. Oversized bodies, oversized images and requests beyond the
limit are refused as early as possible.
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
from vit_static.common.text import print_line, say
from vit_static.config.schema import InferencePrecision
from vit_static.data.dali_pipeline import size_before_crop
from vit_static.inference.attention_maps import attention_map, load_exported
from vit_static.inference.image_io import read_pixels
from vit_static.inference.predictor import Predictor, load_predictor
from vit_static.model.vit import VisionTransformer

_PAGE = Path(__file__).with_name("server_page.html")
_MAX_DRAINED_BODIES = 10  # how much of a refused body is still received, in multiples of the largest allowed one
_GRACE_S = 5.0  # added to the time limit of a request before a stop ends it
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """Limits on requests and batches."""

    batch_size: int = 32
    max_wait_s: float = 0.005  # how long a request waits for others to join its batch
    max_bytes: int = 20_000_000  # of an image file
    max_pixels: int = 64_000_000  # of an image
    max_waiting: int = 256  # requests at once
    timeout_s: float = 30.0  # for receiving a body, and for answering it


class Metrics:
    """Prometheus metrics of one server, in a registry that no other server shares."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds, sizes = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30), (1, 2, 4, 8, 16, 32, 64, 128)
        self.requests = Counter("vit_static_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "vit_static_request_seconds", "Time from the headers to the answer", ["path"], buckets=seconds,
            registry=self.registry,
        )  # fmt: skip
        self.under_way = Gauge("vit_static_requests_under_way", "Images not yet answered", registry=self.registry)
        self.batch_sizes = Histogram(
            "vit_static_batch_size", "Images per run of the model", buckets=sizes, registry=self.registry
        )
        self.model_seconds = Histogram(
            "vit_static_model_seconds", "Time of the model per batch", buckets=seconds, registry=self.registry
        )


class Batcher:
    """Thread that runs a function on batches of submitted inputs.

    A batch runs when it has `batch_size` inputs, or when its first input has waited for `max_wait_s`. Cancelled inputs
    are left out.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], batch_size: int, max_wait_s: float) -> None:
        self._run, self._batch_size, self._max_wait_s = run, batch_size, max_wait_s
        self._queue: queue.SimpleQueue[tuple[float, np.ndarray, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, row: np.ndarray) -> Future[np.ndarray]:
        """Queue an input [1, ...]; the future gives its row of the function's result."""
        future: Future[np.ndarray] = Future()
        self._queue.put((time.monotonic(), row, future))
        return future

    def is_alive(self) -> bool:
        """Return whether the thread is running."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Run all queued inputs and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, is_last = [first], False
            while len(batch) < self._batch_size and not is_last:
                try:
                    remaining_s = first[0] + self._max_wait_s - time.monotonic()
                    following = self._queue.get(timeout=remaining_s) if remaining_s > 0.0 else self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    is_last = True
                else:
                    batch.append(following)
            self._run_batch([(row, future) for _, row, future in batch if future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _run_batch(self, batch: list[tuple[np.ndarray, Future[np.ndarray]]]) -> None:
        if not batch:
            return
        try:
            results = self._run(np.concatenate([row for row, _ in batch]))
        except Exception as error:  # raised in the callers, because the next batch may succeed
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)


class Service:
    """The HTTP endpoints of one model, with its threads."""

    def __init__(self, folder: Path, predictor: Predictor, limits: Limits) -> None:
        self.folder, self.predictor, self.limits = folder, predictor, limits
        self.metrics = Metrics()
        self._page_html = _PAGE.read_text(encoding="utf-8")
        self._num_under_way = 0
        self._decoders = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")
        # One thread, because the model records its attention; the model is loaded when it is first needed.
        self._attention_thread = ThreadPoolExecutor(1, "attention")
        self._attention_model: VisionTransformer | None = None
        self._batcher = Batcher(self._run, limits.batch_size, limits.max_wait_s)

    def close(self) -> None:
        """Answer the remaining requests and end the threads."""
        self._decoders.shutdown()
        self._attention_thread.shutdown()
        self._batcher.close()

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/predict", self._with_limits(self.predict), methods=["POST"]),
            Route("/attention", self._with_limits(self.attention), methods=["POST"]),
        ]

        async def refuse_early(request: Request, error: Exception) -> Response:
            assert isinstance(error, _EarlyRefusal)
            return _DrainingResponse(error, self.limits)

        handlers = {HTTPException: _to_json, _EarlyRefusal: refuse_early}
        return self._with_metrics(Starlette(routes=routes, exception_handlers=handlers))

    async def page(self, request: Request) -> Response:
        """Return the page on which an image is dropped."""
        return HTMLResponse(self._page_html, headers=_HEADERS)

    async def health(self, request: Request) -> Response:
        """Return the model's facts, with status 503 if the thread that runs it has ended."""
        is_healthy = self._batcher.is_alive()
        spec = self.predictor.spec
        content = {
            "status": "ok" if is_healthy else "the model's thread has ended; restart the server",
            "model": f"ViT {spec.model.variant}",
            "image_size": spec.preprocessing.image_size,
            "orientation": spec.preprocessing.orientation,
            "num_classes": len(spec.class_names),
            "runs_in": self.predictor.description,
        }
        return JSONResponse(content, 200 if is_healthy else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def predict(self, request: Request, body: bytes) -> Response:
        """Return the most likely classes of the image in the body, or those that reach their thresholds."""
        top_k = self._top_k(request)
        inputs, _ = await _run_in(self._decoders, self._decode, body)
        logits = await asyncio.wrap_future(self._batcher.submit(inputs))
        (prediction,) = self.predictor.top_predictions(logits[None], top_k)
        if isinstance(prediction, PredictError):
            raise HTTPException(500, str(prediction))
        return JSONResponse({"top": prediction.top()})

    async def attention(self, request: Request, body: bytes) -> Response:
        """Return the attention rollout, one share per patch row by row, and the part of the image that it covers."""
        inputs, box = await _run_in(self._decoders, self._decode, body)
        grid = await _run_in(self._attention_thread, self._attention_map, inputs)
        return JSONResponse({"grid": np.round(grid.astype(float), 6).tolist(), "box": box})

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        self.metrics.batch_sizes.observe(len(inputs))
        with self.metrics.model_seconds.time():
            return self.predictor.logits(inputs)

    def _decode(self, body: bytes) -> tuple[np.ndarray, list[float]]:
        """Return the model's input [1, 3, height, width] and the crop that it shows."""
        options = self.predictor.spec.preprocessing.to_decode_options()
        pixels = read_pixels(io.BytesIO(body), options, "the image", max_pixels=self.limits.max_pixels)
        return self.predictor.preprocess([pixels]), self._crop_box(*pixels.shape[:2])

    def _crop_box(self, height: int, width: int) -> list[float]:
        """Return the part of an image that the model receives: left, top, width, height as shares of the image's."""
        preprocessing = self.predictor.spec.preprocessing
        if preprocessing.resize == "direct":
            return [0.0, 0.0, 1.0, 1.0]
        min_size = size_before_crop(preprocessing.image_size, preprocessing.to_eval_config())
        scale = max(min_size[0] / height, min_size[1] / width)
        crop_height, crop_width = preprocessing.image_size
        height_share, width_share = min(crop_height / (height * scale), 1.0), min(crop_width / (width * scale), 1.0)
        return [(1.0 - width_share) / 2, (1.0 - height_share) / 2, width_share, height_share]

    def _attention_map(self, inputs: np.ndarray) -> np.ndarray:
        if self._attention_model is None:
            self._attention_model, _ = load_exported(self.folder)
        return attention_map(self._attention_model, inputs)[0]

    def _top_k(self, request: Request) -> int | None:
        text = request.query_params.get("top_k")
        if text is None:
            return None
        if not (text.isascii() and text.isdecimal() and int(text[:9]) >= 1):
            raise HTTPException(400, f"top_k={text[:40]}: must be an integer of at least 1")
        return min(int(text[:9]), len(self.predictor.spec.class_names))

    async def _receive_body(self, request: Request) -> bytes:
        """Return the body, refusing it as soon as it is known to be too large."""
        limit = self.limits.max_bytes
        refusal = f"the body is larger than {limit} bytes; send a smaller image file"
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise _EarlyRefusal(413, refusal)
        chunks: list[bytes] = []

        async def receive_all() -> None:
            size, is_more = 0, True
            while is_more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunks.append(message.get("body", b""))
                size, is_more = size + len(chunks[-1]), message.get("more_body", False)
                if size > limit:
                    raise _EarlyRefusal(413, refusal) if is_more else HTTPException(413, refusal)

        try:
            await asyncio.wait_for(receive_all(), self.limits.timeout_s)
        except asyncio.TimeoutError:
            timeout = f"the body did not arrive within {self.limits.timeout_s:g} s; send it again"
            raise HTTPException(408, timeout, {"Connection": "close"}) from None
        if body := b"".join(chunks):
            return body
        raise HTTPException(400, "the body is empty; send an image file, for example with curl --data-binary @FILE")

    def _with_limits(
        self, respond: Callable[[Request, bytes], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that receives an image within the limits on number, size and time."""
        retry_later = {"Retry-After": "1"}

        async def endpoint(request: Request) -> Response:
            if self._num_under_way >= self.limits.max_waiting:
                message = f"the server is busy, {self.limits.max_waiting} requests are under way; try again"
                raise _EarlyRefusal(503, message, retry_later)
            with self._count_under_way():
                body = await self._receive_body(request)
                try:
                    return await asyncio.wait_for(respond(request, body), self.limits.timeout_s)
                except asyncio.TimeoutError:
                    message = f"no answer within {self.limits.timeout_s:g} s; try again"
                    raise HTTPException(503, message, retry_later) from None
                except PredictError as error:
                    raise HTTPException(400, str(error)) from None

        return endpoint

    @contextmanager
    def _count_under_way(self) -> Iterator[None]:
        self._num_under_way += 1
        self.metrics.under_way.inc()
        try:
            yield
        finally:
            self._num_under_way -= 1
            self.metrics.under_way.dec()

    def _with_metrics(self, app: Starlette) -> ASGIApp:
        """Return the application with each of its responses counted, including those that no endpoint gives."""
        paths = {route.path for route in app.routes if isinstance(route, Route)}

        async def counting_app(scope: Scope, receive: Receive, send: Send) -> None:
            status = "no answer"  # the client disconnected

            async def send_noting_status(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            path = scope["path"] if scope["path"] in paths else "other"
            start = time.perf_counter()
            try:
                await app(scope, receive, send_noting_status)
            except ClientDisconnect:
                pass
            finally:
                self.metrics.requests.labels(path, status).inc()
                self.metrics.request_seconds.labels(path).observe(time.perf_counter() - start)

        return counting_app


async def _run_in(executor: ThreadPoolExecutor, function: Callable[[Any], Any], argument: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, function, argument)


class _EarlyRefusal(HTTPException):
    """Refusal of a request before all of its body has arrived."""


async def _to_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class _DrainingResponse(JSONResponse):
    """Response that keeps receiving the body for a while, discards it, and then closes the connection.

    Closing at once would reset the connection, and a client that is still sending would lose the response.
    """

    def __init__(self, error: HTTPException, limits: Limits) -> None:
        super().__init__({"error": error.detail}, error.status_code, {**(error.headers or {}), "Connection": "close"})
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})

        async def drain() -> None:
            remaining_bytes, is_more = _MAX_DRAINED_BODIES * self._limits.max_bytes, True
            while is_more and remaining_bytes > 0:
                message = await receive()
                remaining_bytes -= len(message.get("body", b""))
                is_more = message.get("more_body", False)

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(drain(), self._limits.timeout_s)
        await send({"type": "http.response.body", "body": b""})


def serve_model(
    folder: Path, host: str, port: int, limits: Limits, precision: InferencePrecision | None = None
) -> None:
    """Serve until a signal requests a stop, answer the requests under way, and raise KeyboardInterrupt.

    Raises UserError if the address can't be used, and PredictError if the model can't.
    """
    predictor = load_predictor(folder, precision=precision)
    if not predictor.spec.class_names:
        raise PredictError(
            f"{folder}: has no classification head, and serve answers with classes; use predict --features"
        )
    blank_image = np.zeros((*predictor.spec.preprocessing.image_size, 3), np.uint8)
    predictor.probabilities([blank_image])  # the first run is slow, so it is done before the first request
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
            # Twice the limit: once for the client to send its body, once for the answer.
            timeout_graceful_shutdown=round(2 * limits.timeout_s + _GRACE_S),
        )
        say(f"{folder}: {predictor.description}; batches of up to {limits.batch_size}")
        url_host = f"[{host}]" if ":" in host else host
        print_line(f"serving {folder} at http://{url_host}:{listener.getsockname()[1]}/", flush=True)
        uvicorn.Server(config).run([listener])
        raise KeyboardInterrupt  # Uvicorn raises it itself, except for a signal that this process inherited as ignored
    finally:
        service.close()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error}); choose another host or port"
        ) from None
