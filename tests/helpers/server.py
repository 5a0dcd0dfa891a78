"""The verb `serve` in its own process."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from helpers.exported import Exported
from helpers.small import ROOT


class Server:
    """`./run.sh serve` on a free port."""

    def __init__(self, folder: Path, *flags: object, max_descriptors: int | None = None) -> None:
        command = [ROOT / "run.sh", "serve", "--model", folder, "--port", 0, *flags]
        if max_descriptors is not None:
            command = ["bash", "-c", f'ulimit -n {max_descriptors} && exec "$@"', "bash", *command]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        first_line = self.process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:(\d+)/", first_line)
        assert url, first_line + self.process.communicate(timeout=30)[1]
        self.url, self.port = url[0].rstrip("/"), int(url[1])

    def metrics(self) -> dict[str, float]:
        """Return the value of each metric by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def num_responses(self) -> dict[str, float]:
        """Return the number of responses of /predict by status."""
        pattern = re.compile(r'requests_total\{path="/predict",status="(.+)"')
        matches = ((pattern.search(name), value) for name, value in self.metrics().items())
        return {match[1]: value for match, value in matches if match}

    def wait_for_requests(self, num_requests: int) -> None:
        """Wait until this many requests are under way."""
        self.wait_for_metric("vit_static_requests_under_way", num_requests)

    def wait_for_metric(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        deadline = time.monotonic() + 30
        while self.metrics()[name] != value:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> tuple[int, str, str]:
        """Interrupt the server, and return its exit code, stdout after the first line, and stderr."""
        self.process.send_signal(signal.SIGINT)
        stdout, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stdout, stderr


@contextlib.contextmanager
def serving(exported: Exported, *flags: object, max_descriptors: int | None = None) -> Iterator[Server]:
    """Run a server, and kill it if it hasn't ended by itself."""
    server = Server(exported.folder, *flags, max_descriptors=max_descriptors)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
