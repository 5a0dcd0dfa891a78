"""The server as people run it: a process of its own, real HTTP clients, a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.browser import Browser
from helpers.command_line import run_sh, the_tests_own_environment  # noqa: F401 - a fixture
from helpers.exported import Exported, elsewhere, predictions
from helpers.small import ROOT
from PIL import Image

from vit_static.inference.server import Batcher


class Server:
    """`./run.sh serve` at work on a free port."""

    def __init__(self, folder: Path, *flags: object) -> None:
        command = [ROOT / "run.sh", "serve", "--model", folder, "--port", 0, *flags]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert found, said + self.process.communicate(timeout=30)[1]
        self.url, self.port = found[0].rstrip("/"), int(found[1])

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def answers(self) -> dict[str, float]:
        """Of /predict, by status."""
        found = {
            re.search(r'requests_total\{path="/predict",status="(.+)"', name): n for name, n in self.metrics().items()
        }
        return {match[1]: number for match, number in found.items() if match}

    def wait_for_requests(self, number: int) -> None:
        """Until so many images are under way."""
        deadline = time.monotonic() + 30
        while self.metrics()["vit_static_requests_under_way"] != number:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> tuple[int, str, str]:
        """The exit code, and what was said on stdout after the first line, and on stderr."""
        self.process.send_signal(signal.SIGINT)
        rest, errors = self.process.communicate(timeout=60)
        return self.process.returncode, rest, errors


@contextlib.contextmanager
def serving(exported: Exported, *flags: object) -> Iterator[Server]:
    server = Server(exported.folder, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="module")
def server(exported: Exported) -> Iterator[Server]:
    with serving(exported, "--max-mb", 1, "--timeout-s", 10) as started:
        yield started


@pytest.fixture(scope="module")
def expected(exported: Exported) -> dict[Path, list[dict[str, Any]]]:
    """What `predict` says of the validation images."""
    paths = exported.validation()
    found = elsewhere(predictions, exported.folder, paths)
    return {path: prediction.top() for path, prediction in zip(paths, found, strict=True)}


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Within the rounding that another size of the batch may bring."""
    shares = [[entry["probability"] for entry in top] for top in (found, expected)]
    return [entry["class"] for entry in found] == [entry["class"] for entry in expected] and bool(
        np.allclose(*shares, atol=2e-6)
    )


def connect(server: Server, body: bytes, sent: int, path: str = "/predict") -> socket.socket:
    """A request of which the first `sent` bytes of the body are on their way."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:sent]
    )
    return connection


def answer_on(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON, from a connection that the server may leave open."""
    with connection, connection.makefile("rb") as lines:
        status = int(lines.readline().split()[1])
        headers = {}
        while line := lines.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, json.loads(lines.read(int(headers["content-length"])))


@pytest.mark.slow
def test_an_answer_is_what_predict_says(server: Server, expected: dict[Path, list[dict[str, Any]]]) -> None:
    for path, top in list(expected.items())[:5]:
        answer = httpx.post(f"{server.url}/predict", content=path.read_bytes())
        assert answer.status_code == 200 and same(answer.json()["top"], top)
    png = io.BytesIO()
    Image.open(path).save(png, "PNG")
    as_form = httpx.post(
        f"{server.url}/predict?top_k=1", content=png.getvalue(), headers={"Content-Type": "text/plain"}
    )
    assert same(as_form.json()["top"], top[:1])
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "ok" and health["num_classes"] == 10 and "float32" in health["runs_in"]


def png_of(image: Image.Image, **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, "PNG", **options)
    return written.getvalue()


@pytest.fixture(scope="module")
def bad(exported: Exported) -> dict[str, tuple[bytes, int, str]]:
    """Bodies, and the status and the words with which they are refused."""
    whole = exported.validation()[0].read_bytes()
    program = io.BytesIO()
    Image.new("RGB", (8, 8)).save(program, "EPS")
    return {
        "truncated": (whole[: len(whole) // 2], 400, "truncated"),
        "text": (b"This is no picture.", 400, "no known format"),
        "empty": (b"", 400, "empty"),
        "too large": (os.urandom(5_000_000), 413, "1000000 bytes"),
        "a bomb": (png_of(Image.new("1", (9000, 9000))), 400, "9000x9000 pixels"),
        "Pillow's bomb": (png_of(Image.new("1", (20000, 10000)), compress_level=9), 400, "pixels"),
        "a program": (program.getvalue(), 400, "no known format"),
    }


@pytest.mark.slow
def test_two_hundred_at_once_with_bad_ones_among_them(
    server: Server, expected: dict[Path, list[dict[str, Any]]], bad: dict[str, tuple[bytes, int, str]]
) -> None:
    """Each gets its own answer, the metrics count them all, and the server is as well as before."""
    before, batches = server.answers(), server.metrics()["vit_static_batch_size_count"]
    slow = [connect(server, b"x" * 1000, 10) for _ in range(2)]  # and nothing more comes
    bodies = {path: path.read_bytes() for path in expected}
    wanted: list[tuple[str, bytes, Any]] = []
    for number in range(198):
        if number % 5 == 2:
            name = list(bad)[number // 5 % len(bad)]
            wanted.append((name, bad[name][0], bad[name][1:]))
        else:
            path = list(bodies)[number % len(bodies)]
            wanted.append((path.name, bodies[path], expected[path]))

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=198)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post(f"{server.url}/predict", content=body) for _, body, _ in wanted))

    for (name, _, want), answer in zip(wanted, asyncio.run(ask_all()), strict=True):
        if isinstance(want, list):
            assert answer.status_code == 200 and same(answer.json()["top"], want), name
        else:
            assert (answer.status_code, want[1] in answer.json()["error"]) == (want[0], True), (name, answer.text)
    for connection in slow:
        status, _, found = answer_on(connection)
        assert status == 408 and "within 10 s" in found["error"]

    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    statuses = ["200" if isinstance(want, list) else str(want[0]) for _, _, want in wanted] + ["408", "408"]
    added = {status: number - before.get(status, 0) for status, number in server.answers().items()}
    assert {status: number for status, number in added.items() if number} == {
        status: statuses.count(status) for status in statuses
    }
    metrics = server.metrics()
    assert metrics["vit_static_requests_under_way"] == 0
    assert metrics["vit_static_batch_size_sum"] == server.answers()["200"]
    assert metrics["vit_static_batch_size_count"] - batches < statuses.count("200") / 2  # they were put together


@pytest.mark.slow
def test_other_mistakes_are_said_in_json(server: Server, exported: Exported) -> None:
    image = exported.validation()[0].read_bytes()
    for top_k in ("0", "-1", "many", "٣"):
        answer = httpx.post(f"{server.url}/predict", params={"top_k": top_k}, content=image)
        assert answer.status_code == 400 and "top_k" in answer.json()["error"]
    assert httpx.get(f"{server.url}/predict").status_code == 405
    assert httpx.get(f"{server.url}/nowhere").json() == {"error": "Not Found"}


@pytest.mark.slow
def test_a_body_whose_size_is_not_said_is_refused_too(server: Server) -> None:
    """As soon as it is too large; the client learns of it at the end of it, if it has one."""

    def chunks(number: float) -> Iterator[bytes]:
        while (number := number - 1) >= 0:
            yield bytes(100_000)

    answer = httpx.post(f"{server.url}/predict", content=chunks(30))
    assert answer.status_code == 413 and "1000000 bytes" in answer.json()["error"]
    before = server.answers()["413"]
    with contextlib.suppress(httpx.TransportError):  # it is still sending when the connection ends
        assert httpx.post(f"{server.url}/predict", content=chunks(float("inf"))).status_code == 413
    assert server.answers()["413"] == before + 1


@pytest.mark.slow
def test_a_stop_loses_no_request_that_is_under_way(
    exported: Exported, expected: dict[Path, list[dict[str, Any]]]
) -> None:
    with serving(exported, "--timeout-s", 20) as server:
        images = [(path.read_bytes(), top) for path, top in list(expected.items())[:12]]
        connections = [connect(server, body, len(body) // 2) for body, _ in images]
        server.wait_for_requests(len(images))
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        with pytest.raises(OSError):  # no new connections
            while time.monotonic() < deadline:
                socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
                time.sleep(0.01)
        for connection, (body, _) in zip(connections, images, strict=True):
            connection.sendall(body[len(body) // 2 :])
        for connection, (_, top) in zip(connections, images, strict=True):
            status, _, found = answer_on(connection)
            assert status == 200 and same(found["top"], top)
        rest, errors = server.process.communicate(timeout=60)
        assert server.process.returncode == 75 and rest == ""
        assert len(errors.splitlines()) == 2 and "stopped on request" in errors


@pytest.mark.slow
def test_too_many_and_too_late_are_503(exported: Exported) -> None:
    """One place, and a batch that would wait longer than a request may."""
    image = exported.validation()[0].read_bytes()
    with serving(exported, "--max-waiting", 1, "--timeout-s", 2, "--max-wait-ms", 60_000) as server:
        first = connect(server, image, len(image))
        server.wait_for_requests(1)
        refused = httpx.post(f"{server.url}/predict", content=image)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "1 requests are under way" in refused.json()["error"]
        status, headers, found = answer_on(first)
        assert status == 503 and headers["retry-after"] == "1" and "no answer within 2 s" in found["error"]
        code, _, errors = server.stop()
        assert code == 75 and "Traceback" not in errors


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(server: Server, exported: Exported, tmp_path: Path) -> None:
    done = run_sh("serve", "--model", exported.folder, "--port", server.port, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert f"--port {server.port}" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_batch_is_what_waits_and_a_failure_is_its_own() -> None:
    """The model is busy while five come: they are its next batches, of three and two."""
    sizes, busy, go_on = [], threading.Event(), threading.Event()

    def run(inputs: np.ndarray) -> np.ndarray:
        sizes.append(len(inputs))
        busy.set()
        assert go_on.wait(10)
        if (inputs < 0).any():
            raise ValueError("negative")
        return 2 * inputs

    batcher = Batcher(run, batch_size=3, max_wait_s=0.0)
    first = batcher.submit(np.array([[0.0]]))
    assert busy.wait(10)
    rest = [batcher.submit(np.array([[value]])) for value in (1.0, -2.0, 3.0, 4.0, 5.0, 6.0)]
    assert rest[4].cancel()  # its asker is gone
    go_on.set()
    assert first.result(10) == 0.0
    for future in rest[:3]:
        with pytest.raises(ValueError, match="negative"):
            future.result(10)
    assert [rest[3].result(10), rest[5].result(10)] == [8.0, 12.0]
    batcher.close()
    assert sizes == [1, 3, 2] and not batcher.is_alive()


@pytest.mark.slow
def test_attention_says_which_part_of_the_image_it_is_of(server: Server) -> None:
    """16 x 32 pixels from 100 x 300: the short side to 16 / 0.875 rounded, 18, the centre cut out."""
    found = httpx.post(f"{server.url}/attention", content=png_of(Image.new("RGB", (300, 100), "red"))).json()
    assert np.shape(found["grid"]) == (2, 4) and np.sum(found["grid"]) == pytest.approx(1.0, abs=1e-4)
    left, top, width, height = found["box"]
    assert [width, height] == pytest.approx([32 / 54, 16 / 18])
    assert [left, top] == pytest.approx([(1 - width) / 2, (1 - height) / 2])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium")
    with Browser(program) as started:
        yield started


@pytest.mark.slow
def test_the_page_shows_a_dropped_images_classes_and_where_the_model_looked(
    server: Server, browser: Browser, exported: Exported, expected: dict[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, top = list(expected.items())[7]
    browser.open(f"{server.url}/")
    browser.wait_until("document.querySelector('#about').textContent.includes('10 classes')")
    browser.drop("#drop", path)
    browser.wait_until(f"document.querySelector('#said').textContent === {json.dumps(path.name)}")
    lines = browser.evaluate("[...document.querySelectorAll('#classes li span span')].map(line => line.textContent)")
    assert lines[::2] == [entry["name"] for entry in top]
    assert [float(line.removesuffix(" %")) for line in lines[1::2]] == pytest.approx(
        [100 * entry["probability"] for entry in top], abs=0.051
    )
    widths = browser.evaluate("[...document.querySelectorAll('#classes i')].map(bar => bar.offsetWidth)")
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    pixels = "document.querySelector('#picture').toDataURL()"
    with_attention = browser.evaluate(pixels)
    browser.evaluate("document.querySelector('#shown').click()")
    assert browser.evaluate(pixels) != with_attention

    (tmp_path / "notes.txt").write_text("no image")
    browser.choose("#file", tmp_path / "notes.txt")
    browser.wait_until("document.querySelector('#said').className === 'error'")
    assert "can't be read as an image" in browser.evaluate("document.querySelector('#said').textContent")
    assert browser.complaints == []
