"""Prometheus metrics of a server."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send


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
        self.under_way = Gauge("vit_static_requests_under_way", "Requests not yet answered", registry=self.registry)
        self.images = Gauge(
            "vit_static_images_under_way", "Images of received requests, not yet answered", registry=self.registry
        )
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

    def to_response(self) -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def count(self, app: Starlette) -> ASGIApp:
        """Return the application with each of its responses counted, including those that no endpoint gives."""
        # The path as the program has it, since clients may write anything where a name is.
        paths: dict[object, str] = {route.endpoint: route.path for route in app.routes if isinstance(route, Route)}

        async def counting_app(scope: Scope, receive: Receive, send: Send) -> None:
            status = "no answer"  # the client disconnected

            async def send_noting_status(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            start = time.perf_counter()
            try:
                await app(scope, receive, send_noting_status)
            except ClientDisconnect:
                pass
            finally:
                path = paths.get(scope.get("endpoint"), "other")
                self.requests.labels(path, status).inc()
                self.request_seconds.labels(path).observe(time.perf_counter() - start)

        return counting_app
