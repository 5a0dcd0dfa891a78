"""The verb `serve`: an exported model over HTTP.

The event loop receives an image's bytes, a few threads decode and preprocess them (so that what waits for the model is
small), and one thread forms batches and runs the model. What exceeds a limit is refused as early as possible: by
connections.py before a request has arrived, by request_limits.py while its body arrives, and here before it is decoded.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from vit_static.inference.batcher import Batcher
from vit_static.inference.connections import (
    ConnectionLimits,
    ConnectionTable,
    LimitedListener,
    choose_limits,
    limited_protocol,
)
from vit_static.inference.image_io import count_pixels, read_pixels
from vit_static.inference.log_limit import LogLimit
from vit_static.inference.predictor import Predictor, load_predictor
from vit_static.inference.request_limits import (
    RETRY_LATER,
    BodyReader,
    DrainingResponse,
    EarlyRefusal,
    Limits,
    PixelBudget,
)
from vit_static.model.vit import VisionTransformer

_PAGE = Path(__file__).with_name("server_page.html")
_MONITORING = ("/health", "/metrics")  # answered even when there are too many connections
_GRACE_S = 5.0  # added to the time limit of a request before a stop ends it
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src blob: data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}


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
        self.connections = Gauge("vit_static_connections", "Open connections", registry=self.registry)
        self.refused_connections = Counter(
            "vit_static_connections_refused", "Connections beyond the limits", registry=self.registry
        )
        self.batch_sizes = Histogram(
            "vit_static_batch_size", "Images per run of the model", buckets=sizes, registry=self.registry
        )
        self.model_seconds = Histogram(
            "vit_static_model_seconds", "Time of the model per batch", buckets=seconds, registry=self.registry
        )


class Service:
    """The HTTP endpoints of one model, with its threads."""

    def __init__(self, folder: Path, predictor: Predictor, limits: Limits) -> None:
        self.folder, self.predictor, self.limits = folder, predictor, limits
        self.metrics = Metrics()
        self._page_html = _PAGE.read_text(encoding="utf-8")
        self._num_waiting = 0  # requests whose body has arrived
        self._bodies, self._pixels = BodyReader(limits), PixelBudget(limits.max_total_pixels)
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
            assert isinstance(error, EarlyRefusal)
            return DrainingResponse(error, self.limits)

        handlers = {HTTPException: _to_json, EarlyRefusal: refuse_early}
        return self._with_reserve(self._with_metrics(Starlette(routes=routes, exception_handlers=handlers)))

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

    async def predict(self, request: Request, body: bytearray) -> Response:
        """Return the most likely classes of the image in the body, or those that reach their thresholds."""
        top_k = self._top_k(request)
        inputs, _ = await self._decode(body)
        logits = await asyncio.wrap_future(self._batcher.submit(inputs))
        (prediction,) = self.predictor.top_predictions(logits[None], top_k)
        if isinstance(prediction, PredictError):
            raise HTTPException(500, str(prediction))
        return JSONResponse({"top": prediction.top()})

    async def attention(self, request: Request, body: bytearray) -> Response:
        """Return the attention rollout, one share per patch row by row, and the part of the image that it covers."""
        inputs, box = await self._decode(body)
        grid = await _run_in(self._attention_thread, self._attention_map, inputs)
        return JSONResponse({"grid": np.round(grid.astype(float), 6).tolist(), "box": box})

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        self.metrics.batch_sizes.observe(len(inputs))
        with self.metrics.model_seconds.time():
            return self.predictor.logits(inputs)

    async def _decode(self, body: bytearray) -> tuple[np.ndarray, list[float]]:
        """Return the model's input [1, 3, height, width] and the crop that it shows, when there is room to decode."""
        loop = asyncio.get_running_loop()
        num_pixels = await loop.run_in_executor(self._decoders, lambda: count_pixels(io.BytesIO(body)))
        is_refused = num_pixels > self.limits.max_pixels  # from its header, so it needs no room
        num_acquired = 0 if is_refused else await self._pixels.acquire(num_pixels)
        future = self._decoders.submit(self._decode_now, body)
        self._pixels.release_after(future, num_acquired)
        return await asyncio.wrap_future(future)

    def _decode_now(self, body: bytearray) -> tuple[np.ndarray, list[float]]:
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

    def _with_limits(
        self, respond: Callable[[Request, bytearray], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that receives an image within the limits on number, size and time."""

        def busy(refusal: type[HTTPException]) -> HTTPException:
            message = f"the server is busy, {self.limits.max_waiting} requests are under way; try again"
            return refusal(503, message, RETRY_LATER)

        async def endpoint(request: Request) -> Response:
            if self._num_waiting >= self.limits.max_waiting:
                raise busy(EarlyRefusal)
            with self.metrics.under_way.track_inprogress():
                async with self._bodies.receive(request) as body:
                    if self._num_waiting >= self.limits.max_waiting:
                        raise busy(HTTPException)
                    with self._count_waiting():
                        return await self._answer(respond(request, body))

        return endpoint

    async def _answer(self, response: Awaitable[Response]) -> Response:
        try:
            return await asyncio.wait_for(response, self.limits.timeout_s)
        except asyncio.TimeoutError:
            message = f"no answer within {self.limits.timeout_s:g} s; try again"
            raise HTTPException(503, message, RETRY_LATER) from None
        except PredictError as error:
            raise HTTPException(400, str(error)) from None

    @contextmanager
    def _count_waiting(self) -> Iterator[None]:
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    def _with_reserve(self, app: ASGIApp) -> ASGIApp:
        """Return the application, but on connections of the reserve only its endpoints for monitoring."""
        message = "the server has too many connections, or too many of yours; try again"
        refusal = DrainingResponse(HTTPException(503, message, RETRY_LATER), self.limits)

        async def reserved_app(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_and_close(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                await send(message)

            if not scope["state"]["is_reserved"]:
                await app(scope, receive, send)
            elif scope["path"] in _MONITORING:
                await app(scope, receive, send_and_close)
            else:
                await refusal(scope, receive, send)

        return reserved_app

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


async def _to_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


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
    # Twice the limit: once for the client to send its body, once for the answer.
    request_timeout_s = 2 * limits.timeout_s + _GRACE_S
    listener = _listen(host, port)
    service = Service(folder, predictor, limits)
    try:
        connection_limits = choose_limits(
            limits.max_connections,
            limits.max_per_client,
            header_timeout_s=limits.header_timeout_s,
            request_timeout_s=request_timeout_s,
        )
        log_limit = LogLimit()
        listener.table = _make_table(connection_limits, service.metrics, log_limit)
        config = uvicorn.Config(
            service.app(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http=limited_protocol(listener.table),
            timeout_graceful_shutdown=round(request_timeout_s),
        )
        log_limit.install()
        say(
            f"{folder}: {predictor.description}; batches of up to {limits.batch_size}; at most "
            f"{connection_limits.max_connections} connections, {connection_limits.max_per_client} per client"
        )
        url_host = f"[{host}]" if ":" in host else host
        print_line(f"serving {folder} at http://{url_host}:{listener.getsockname()[1]}/", flush=True)
        uvicorn.Server(config).run([listener])
        raise KeyboardInterrupt  # Uvicorn raises it itself, except for a signal that this process inherited as ignored
    finally:
        service.close()
        listener.close()


def _make_table(limits: ConnectionLimits, metrics: Metrics, log_limit: LogLimit) -> ConnectionTable:
    """Return a table whose connections and refusals are in the metrics, and its refusals on stderr."""

    def report_refusal(client: str) -> None:
        metrics.refused_connections.inc()
        if (suffix := log_limit.note(report_refusal)) is not None:
            say(
                f"too many connections, the last from {client}: at most {limits.max_connections}, "
                f"{limits.max_per_client} per client{suffix}"
            )

    table = ConnectionTable(limits, report_refusal)
    metrics.connections.set_function(lambda: table.num_open)
    return table


def _listen(host: str, port: int) -> LimitedListener:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return LimitedListener(fileno=socket.create_server((host, port), family=family, backlog=1024).detach())
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error}); choose another host or port"
        ) from None
