"""The verb `serve`: an exported model over HTTP, from the start of the server to its end.

The event loop receives an image's bytes, a few threads decode and preprocess them (so that what waits for the model is
small), and one thread forms batches and runs the model. What exceeds a limit is refused as early as possible: by
connections.py before a request has arrived, by request_limits.py while its body arrives, and by service.py before it is
decoded.
"""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import uvicorn

from vit_static.common.errors import PredictError, UserError
from vit_static.common.text import print_line, say
from vit_static.config.schema import BackendChoice, InferencePrecision
from vit_static.inference.access import Access
from vit_static.inference.connections import (
    ConnectionLimits,
    ConnectionTable,
    LimitedListener,
    choose_limits,
    limited_protocol,
)
from vit_static.inference.log_limit import LogLimit
from vit_static.inference.metrics import Metrics
from vit_static.inference.predictor import load_predictor
from vit_static.inference.request_limits import Limits
from vit_static.inference.service import Service

_GRACE_S = 5.0  # added to the time limit of a request before a stop ends it


def serve_model(
    folder: Path,
    host: str,
    port: int,
    limits: Limits,
    access: Access,
    precision: InferencePrecision | None = None,
    backend: BackendChoice = "auto",
) -> None:
    """Serve until a signal requests a stop, answer the requests under way, and raise KeyboardInterrupt.

    Raises UserError if the address can't be used, and PredictError if the model can't.
    """
    predictor = load_predictor(folder, precision=precision, backend=backend, usual_batch_size=1)
    if not predictor.spec.class_names:
        raise PredictError(
            f"{folder}: has no classification head, and serve answers with classes; use predict --features"
        )
    blank_image = np.zeros((*predictor.spec.preprocessing.image_size, 3), np.uint8)
    predictor.probabilities([blank_image])  # the first run is slow, so it is done before the first request
    # Twice the limit: once for the client to send its body, once for the answer.
    request_timeout_s = 2 * limits.timeout_s + _GRACE_S
    connection_limits = choose_limits(
        limits.max_connections,
        limits.max_per_client,
        header_timeout_s=limits.header_timeout_s,
        request_timeout_s=request_timeout_s,
    )
    listener = _listen(host, port)
    share = connection_limits.max_per_client / connection_limits.max_connections
    service = Service(folder, predictor, limits, access, share)
    try:
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
