"""Make v2_requests.json: what Triton's HTTP client sends for the Open Inference Protocol.

A list of requests to a model `tiny`, each with `name`, `method`, `path`, the `headers` that the protocol defines and
`body` in base64. The tensors are the same in `binary` and `json`: images [2, 3, 16, 32] float32 of SEED, standard
normal, with 10 bits behind the binary point, so that their decimals are short and exact. `files` has two PNG files of
40x40 pixels, red and green.
"""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import tritonclient.http as client
from PIL import Image

SEED = 20261130
RECORDED_HEADERS = ("Content-Type", "Inference-Header-Content-Length")


class Recorder(BaseHTTPRequestHandler):
    """Records each request, and refuses it."""

    protocol_version = "HTTP/1.1"
    requests: ClassVar[list[dict[str, object]]] = []

    def _record(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name: self.headers[name] for name in RECORDED_HEADERS if name in self.headers}
        entry = {"method": self.command, "path": self.path, "headers": headers}
        self.requests.append({**entry, "body": base64.b64encode(body).decode()})
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = _record

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def png(colour: str) -> bytes:
    Image.new("RGB", (40, 40), colour).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def main() -> None:
    recorder = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    server = client.InferenceServerClient(f"127.0.0.1:{recorder.server_port}")
    images = np.random.default_rng(SEED).standard_normal((2, 3, 16, 32)).astype(np.float32)
    images = np.round(images * 1024) / np.float32(1024)
    tensors = {}
    for is_binary, name in ((True, "binary"), (False, "json")):
        tensors[name] = client.InferInput("images", list(images.shape), "FP32")
        tensors[name].set_data_from_numpy(images, binary_data=is_binary)
    files = client.InferInput("files", [2], "BYTES")
    files.set_data_from_numpy(np.array([png("red"), png("green")], dtype=object))
    json_logits = client.InferRequestedOutput("logits", binary_data=False)
    calls = {
        "live": server.is_server_live,
        "ready": server.is_server_ready,
        "server": server.get_server_metadata,
        "model": lambda: server.get_model_metadata("tiny"),
        "model ready": lambda: server.is_model_ready("tiny", "1"),
        "binary": lambda: server.infer("tiny", [tensors["binary"]]),
        "json": lambda: server.infer("tiny", [tensors["json"]], request_id="7", outputs=[json_logits]),
        "files": lambda: server.infer("tiny_files", [files], model_version="1"),
    }
    recorded = []
    for name, call in calls.items():
        with contextlib.suppress(client.InferenceServerException):
            call()
        recorded.append({"name": name, **Recorder.requests.pop()})
    recorder.shutdown()
    path = Path(__file__).with_name("v2_requests.json")
    path.write_text(json.dumps(recorded, indent=1) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
