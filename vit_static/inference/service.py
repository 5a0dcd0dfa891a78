"""HTTP endpoints of one model: predictions, attention, the Open Inference Protocol, the page and monitoring."""

from __future__ import annotations

import asyncio
import difflib
import io
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import vit_static
from vit_static.common.errors import PredictError, escape, truncate
from vit_static.data.dali_pipeline import size_before_crop
from vit_static.inference.access import Access
from vit_static.inference.attention_maps import attention_map, load_exported
from vit_static.inference.batcher import Batcher
from vit_static.inference.connections import client_of
from vit_static.inference.image_io import count_pixels, read_pixels
from vit_static.inference.metrics import Metrics
from vit_static.inference.open_inference import (
    FILES_SUFFIX,
    VERSION,
    infer_response,
    model_metadata,
    read_infer_request,
)
from vit_static.inference.openapi import docs_html, openapi_document
from vit_static.inference.predictor import Predictor
from vit_static.inference.probabilities import to_probabilities
from vit_static.inference.request_limits import (
    RETRY_LATER,
    BodyReader,
    DrainingResponse,
    EarlyRefusal,
    Limits,
    PixelBudget,
    SharedCount,
)
from vit_static.inference.uploads import UploadedImage, read_upload
from vit_static.model.variants import model_name
from vit_static.model.vit import VisionTransformer

_PAGE = Path(__file__).with_name("server_page.html")
# Answered even when there are too many connections
_MONITORING = ("/health", "/healthz", "/ping", "/v2/health/live", "/v2/health/ready", "/metrics")
_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src blob: data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
_PAGE_HEADERS = {"Content-Security-Policy": _CSP, "X-Content-Type-Options": "nosniff"}

_SMALL_SHARE = 4  # images of up to a quarter of --max-total-megapixels are small

_T = TypeVar("_T")
_Endpoint = Callable[[Request], Awaitable[Response]]


class Service:
    """The HTTP endpoints of one model, with its threads."""

    def __init__(self, folder: Path, predictor: Predictor, limits: Limits, access: Access, share: float) -> None:
        """`share`: of the memory and of the waiting images, that one client may use."""
        self.folder, self.predictor, self.limits, self.access = folder, predictor, limits, access
        self.name = predictor.spec.name or folder.resolve().name
        self.metrics = Metrics()
        self._document = openapi_document(self.name, needs_key=access.api_key is not None)
        self._page_html = _PAGE.read_text(encoding="utf-8")
        self._waiting = SharedCount(limits.max_waiting, share)  # images whose request has arrived
        self.metrics.images.set_function(lambda: self._waiting.total)
        self._max_images = min(limits.max_images, self._waiting.limit_per_client)
        self._bodies = BodyReader(limits, share)
        # Small images have a budget of their own: they don't wait for seconds until a large one is decoded.
        self._large_images = PixelBudget(limits.max_total_pixels)
        self._small_images = PixelBudget(limits.max_total_pixels // _SMALL_SHARE)
        self._decoders = ThreadPoolExecutor(max(len(os.sched_getaffinity(0)), 2), "decode")
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
        models = ("/v2/models/{model}", f"/v2/models/{{model}}/versions/{VERSION}")
        routes = [
            self._open("/", self.page),
            self._open("/docs", self.docs),
            self._open("/openapi.json", self.openapi),
            self._open("/health", self.health),
            *(self._open(path, self.liveness) for path in ("/healthz", "/ping", "/v2/health/live", "/v2/health/ready")),
            self._get("/metrics", self.show_metrics),
            self._post("/predict", self.predict, parameters=("top_k",)),
            self._post("/attention", self.attention),
            self._get("/v2", self.server_metadata),
            *(self._get(path, self.model_metadata) for path in models),
            *(self._get(f"{path}/ready", self.model_readiness) for path in models),
            *(self._post(f"{path}/infer", self.infer, check=self._input_shape) for path in models),
        ]

        async def refuse_early(request: Request, error: Exception) -> Response:
            assert isinstance(error, EarlyRefusal)
            return DrainingResponse(error, self.limits)

        handlers = {HTTPException: _to_json, EarlyRefusal: refuse_early}
        app = Starlette(routes=routes, exception_handlers=handlers, middleware=self.access.cors())
        return self._with_reserve(self.metrics.count(app))

    # Endpoints

    async def page(self, request: Request) -> Response:
        """Return the page on which images are dropped."""
        return HTMLResponse(self._page_html, headers=_PAGE_HEADERS)

    async def docs(self, request: Request) -> Response:
        """Return a page that describes the endpoints."""
        needs_key = self.access.api_key is not None
        page = docs_html(self._document, self.name, str(request.base_url).rstrip("/"), needs_key=needs_key)
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document."""
        return JSONResponse(self._document)

    async def health(self, request: Request) -> Response:
        """Return the model's facts, with status 503 if the thread that runs it has ended."""
        spec = self.predictor.spec
        content = {
            "status": "ok" if self._batcher.is_alive() else "the model's thread has ended; restart the server",
            "name": self.name,
            "model": model_name(spec.model),
            "image_size": spec.preprocessing.image_size,
            "orientation": spec.preprocessing.orientation,
            "num_classes": len(spec.class_names),
            "runs_in": self.predictor.description,
            "needs_api_key": self.access.api_key is not None,
        }
        return JSONResponse(content, self._health_status())

    async def liveness(self, request: Request) -> Response:
        """Return whether the server can answer, for load balancers and orchestrators."""
        is_alive = self._batcher.is_alive()
        return JSONResponse({"live": is_alive, "ready": is_alive}, self._health_status())

    async def show_metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus's text format."""
        return self.metrics.to_response()

    async def predict(self, request: Request, body: bytearray) -> Response:
        """Return the most likely classes of each image in the body, or those that reach their thresholds."""
        top_k = self._top_k(request)

        async def classify(image: UploadedImage) -> dict[str, Any]:
            inputs, _ = await self._decode(image, _client(request))
            (prediction,) = self.predictor.top_predictions((await self._logits(inputs))[None], top_k)
            if isinstance(prediction, PredictError):
                raise HTTPException(500, str(prediction))
            return {"top": prediction.top()}

        return await self._answer_images(request, body, "predictions", classify)

    async def attention(self, request: Request, body: bytearray) -> Response:
        """Return the attention rollout, one share per patch row by row, and the part of the image that it covers."""

        async def explain(image: UploadedImage) -> dict[str, Any]:
            inputs, box = await self._decode(image, _client(request))
            grid = await _run_in(self._attention_thread, self._attention_map, inputs)
            return {"grid": np.round(grid.astype(float), 6).tolist(), "box": box}

        return await self._answer_images(request, body, "maps", explain)

    async def server_metadata(self, request: Request) -> Response:
        """Return the server's name and the extensions of the protocol."""
        content = {"name": "vit_static", "version": vit_static.__version__, "extensions": ["binary_tensor_data"]}
        return JSONResponse(content)

    async def model_metadata(self, request: Request) -> Response:
        """Return the inputs and outputs of one of the two models."""
        platform = "onnxruntime_onnx" if self.predictor.spec.precision == "int8" else "paddle_inference"
        name, num_classes = request.path_params["model"], len(self.predictor.spec.class_names)
        return JSONResponse(model_metadata(name, self._input_shape(request), num_classes, platform))

    async def model_readiness(self, request: Request) -> Response:
        """Return whether one of the two models can answer."""
        self._input_shape(request)
        content = {"name": request.path_params["model"], "ready": self._batcher.is_alive()}
        return JSONResponse(content, self._health_status())

    async def infer(self, request: Request, body: bytearray) -> Response:
        """Answer a request of the Open Inference Protocol with logits and probabilities."""
        shape = self._input_shape(request)
        read = partial(read_infer_request, body, request.headers, shape, self._max_images)
        inference = await _run_in(self._decoders, read)

        async def run_file(image: UploadedImage) -> np.ndarray:
            return await self._logits((await self._decode(image, _client(request)))[0])

        with self._admit(request, len(inference.inputs) - 1):
            if isinstance(inference.inputs, list):
                rows = await _gather(map(run_file, inference.inputs))
            else:
                rows = await _gather(self._logits(row[None]) for row in inference.inputs)
        logits = np.stack(rows)
        if not np.isfinite(logits).all():
            raise HTTPException(500, "the model's output has NaN or infinite values; check it with './run.sh eval'")
        outputs = {"logits": logits, "probabilities": to_probabilities(logits, self.predictor.spec.activation)}
        content, headers = infer_response(request.path_params["model"], inference, outputs)
        return Response(content, headers=headers)

    # Parts of endpoints

    async def _answer_images(
        self,
        request: Request,
        body: bytearray,
        key: str,
        answer: Callable[[UploadedImage], Awaitable[dict[str, Any]]],
    ) -> Response:
        """Return the answer to an image file, or under `key` those to the images of a form or of JSON, in order."""
        upload = await _run_in(self._decoders, partial(read_upload, body, request.headers, self._max_images))
        with self._admit(request, len(upload.images) - 1):
            answers = await _gather(map(answer, upload.images))
        if not upload.is_list:
            return JSONResponse(answers[0])
        names = ({} if image.name is None else {"name": image.name} for image in upload.images)
        return JSONResponse({key: [{**name, **content} for name, content in zip(names, answers, strict=True)]})

    async def _logits(self, inputs: np.ndarray) -> np.ndarray:
        """Return the logits [num_classes] of a preprocessed image [1, 3, height, width]."""
        return await asyncio.wrap_future(self._batcher.submit(inputs))

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        self.metrics.batch_sizes.observe(len(inputs))
        with self.metrics.model_seconds.time():
            return self.predictor.logits(inputs)

    async def _decode(self, image: UploadedImage, client: str) -> tuple[np.ndarray, list[float]]:
        """Return the model's input [1, 3, height, width] and the crop that it shows, when there is room to decode."""
        loop = asyncio.get_running_loop()
        num_pixels = await loop.run_in_executor(self._decoders, lambda: count_pixels(io.BytesIO(image.content)))
        is_refused = num_pixels > self.limits.max_pixels  # from its header, so it needs no room
        budget = self._small_images if num_pixels <= self._small_images.max_pixels else self._large_images
        num_acquired = 0 if is_refused else await budget.acquire(num_pixels, client)
        future = self._decoders.submit(self._decode_now, image)
        budget.release_after(future, num_acquired)
        return await asyncio.wrap_future(future)

    def _decode_now(self, image: UploadedImage) -> tuple[np.ndarray, list[float]]:
        options = self.predictor.spec.preprocessing.to_decode_options()
        content = io.BytesIO(image.content)
        pixels = read_pixels(content, options, image.label, max_pixels=self.limits.max_pixels)
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

    def _input_shape(self, request: Request) -> tuple[int, ...]:
        """Return the shape of a model's input without the batch. Raises EarlyRefusal for an unknown model."""
        name, spec = request.path_params["model"], self.predictor.spec
        shapes = {self.name: (spec.model.num_channels, *spec.model.image_size), self.name + FILES_SUFFIX: ()}
        if name not in shapes:
            raise EarlyRefusal(404, f"unknown model {escape(truncate(name))}; there are {' and '.join(shapes)}")
        return shapes[name]

    def _health_status(self) -> int:
        return 200 if self._batcher.is_alive() else 503

    # Routes, with what is checked before a body is received

    def _open(self, path: str, endpoint: _Endpoint) -> Route:
        """Return a route that needs no API key."""
        return Route(path, _with_known_parameters(endpoint, ()))

    def _get(self, path: str, endpoint: _Endpoint) -> Route:
        return Route(path, self._with_key(_with_known_parameters(endpoint, ())))

    def _post(
        self,
        path: str,
        respond: Callable[[Request, bytearray], Awaitable[Response]],
        *,
        parameters: tuple[str, ...] = (),
        check: Callable[[Request], object] = lambda _: None,
    ) -> Route:
        """Return a route whose endpoint receives a body within the limits, after `check` of its request."""

        async def endpoint(request: Request) -> Response:
            check(request)
            return await self._receive(request, respond)

        return Route(path, self._with_key(_with_known_parameters(endpoint, parameters)), methods=["POST"])

    def _with_key(self, endpoint: _Endpoint) -> _Endpoint:
        async def protected(request: Request) -> Response:
            self.access.check_key(request)
            return await endpoint(request)

        return protected

    async def _receive(
        self, request: Request, respond: Callable[[Request, bytearray], Awaitable[Response]]
    ) -> Response:
        """Receive a body within the limits on number, size and time, and answer it."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise EarlyRefusal(415, "compressed bodies are not accepted; send it without Content-Encoding")
        if not self._waiting.has_room(_client(request), 1):
            raise self._busy(EarlyRefusal)
        with self.metrics.under_way.track_inprogress():
            async with self._bodies.receive(request, _client(request)) as body:
                with self._admit(request, 1):
                    return await self._answer(respond(request, body))

    async def _answer(self, response: Awaitable[Response]) -> Response:
        try:
            return await asyncio.wait_for(response, self.limits.timeout_s)
        except asyncio.TimeoutError:
            message = f"no answer within {self.limits.timeout_s:g} s; try again"
            raise HTTPException(503, message, RETRY_LATER) from None
        except PredictError as error:
            raise HTTPException(400, str(error)) from None

    @contextmanager
    def _admit(self, request: Request, num_images: int) -> Iterator[None]:
        """Count images as waiting. Raises HTTPException if there would be too many, in all or of this client."""
        client = _client(request)
        if not self._waiting.has_room(client, num_images):
            raise self._busy(HTTPException)
        self._waiting.add(client, num_images)
        try:
            yield
        finally:
            self._waiting.add(client, -num_images)

    def _busy(self, refusal: type[HTTPException]) -> HTTPException:
        message = f"the server is busy, {self._waiting.total} images are under way; try again"
        return refusal(503, message, RETRY_LATER)

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


def _client(request: Request) -> str:
    """Return what counts as the client of a request."""
    return "" if request.client is None else client_of(request.client)


def _with_known_parameters(endpoint: _Endpoint, parameters: tuple[str, ...]) -> _Endpoint:
    """Return an endpoint that refuses a query parameter which it doesn't have, or which is given twice."""

    async def strict(request: Request) -> Response:
        names = [name for name, _ in request.query_params.multi_items()]
        for name in names:
            shown = escape(truncate(name, 40))
            if name not in parameters:
                nearest = difflib.get_close_matches(name[:100], parameters, n=1, cutoff=0.5)
                known = f"the only one is {parameters[0]}" if parameters else "there is none"
                remedy = f"did you mean {nearest[0]}?" if nearest else known
                raise EarlyRefusal(400, f"unknown query parameter {shown}; {remedy}")
            if names.count(name) > 1:
                raise EarlyRefusal(400, f"the query parameter {shown} is given {names.count(name)} times; give it once")
        return await endpoint(request)

    return strict


async def _run_in(executor: ThreadPoolExecutor, function: Callable[..., _T], *arguments: Any) -> _T:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)


async def _gather(awaitables: Iterable[Awaitable[_T]]) -> list[_T]:
    """Return the results in order; when one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _to_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
