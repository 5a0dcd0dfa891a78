"""The server in its own process, with real HTTP clients and a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.browser import Browser, chromium
from helpers.command_line import run_sh, use_test_environment  # noqa: F401 - a fixture
from helpers.exported import Exported, in_inference_process, predict
from helpers.server import Server, serving
from PIL import ExifTags, Image

from vit_static.inference.batcher import Batcher


@pytest.fixture(scope="module")
def server(exported: Exported) -> Iterator[Server]:
    with serving(exported, "--max-mb", 1, "--timeout-s", 30) as started:
        yield started


@pytest.fixture(scope="module")
def expected(exported: Exported) -> dict[Path, list[dict[str, Any]]]:
    """Return the classes of the validation images as `predict` gives them."""
    paths = exported.validation_images()
    predictions = in_inference_process(predict, exported.folder, paths)
    return {path: prediction.top() for path, prediction in zip(paths, predictions, strict=True)}


def is_same(top: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Compare classes, and probabilities up to the rounding that depends on the batch size."""
    actual, wanted = ([entry["probability"] for entry in entries] for entries in (top, expected))
    return [entry["class"] for entry in top] == [entry["class"] for entry in expected] and bool(
        np.allclose(actual, wanted, atol=2e-6)
    )


def start_request(server: Server, body: bytes, num_bytes: int, path: str = "/predict") -> socket.socket:
    """Send the headers of a request, and the first `num_bytes` of its body."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    headers = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(headers.encode() + body[:num_bytes])
    return connection


def receive_response(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Return status, headers and JSON from a connection that the server may leave open."""
    with connection, connection.makefile("rb") as lines:
        status = int(lines.readline().split()[1])
        headers = {}
        while line := lines.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, json.loads(lines.read(int(headers["content-length"])))


@pytest.mark.slow
def test_the_response_agrees_with_predict(
    server: Server, exported: Exported, expected: dict[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for path, top in list(expected.items())[:5]:
        response = httpx.post(f"{server.url}/predict", content=path.read_bytes())
        assert response.status_code == 200 and is_same(response.json()["top"], top)
    image = Image.open(path)
    odd = {tmp_path / name: content for name, content in odd_files(image).items()}
    for odd_path, content in odd.items():
        odd_path.write_bytes(content)
    predictions = in_inference_process(predict, exported.folder, list(odd))
    for content, prediction in zip(odd.values(), predictions, strict=True):
        assert is_same(httpx.post(f"{server.url}/predict", content=content).json()["top"], prediction.top())
    other_type = httpx.post(
        f"{server.url}/predict?top_k=1", content=encode(image, "PNG"), headers={"Content-Type": "text/plain"}
    )
    assert is_same(other_type.json()["top"], top[:1])
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "ok" and health["num_classes"] == 10 and "float32" in health["runs_in"]


def odd_files(image: Image.Image) -> dict[str, bytes]:
    """Return an image to be turned, a transparent one, and one in a format that browsers don't show."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    transparent = image.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "turned.jpeg": encode(image, "JPEG", exif=exif),
        "turned.tiff": encode(image, "TIFF", exif=exif),
        "transparent.png": encode(transparent, "PNG"),
        "grey.jp2": encode(image.convert("L"), "JPEG2000"),
    }


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bad_bodies(exported: Exported) -> dict[str, tuple[bytes, int, str]]:
    """Return bodies that are refused, with the status and a part of the message."""
    image = exported.validation_images()[0].read_bytes()
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    return {
        "truncated": (image[: len(image) // 2], 400, "truncated"),
        "text": (b"This is no image.", 400, "unknown format"),
        "empty": (b"", 400, "empty"),
        "too large": (os.urandom(5_000_000), 413, "1000000 bytes"),
        "large image": (encode(Image.new("1", (9000, 9000)), "PNG"), 400, "9000x9000 pixels"),
        "decompression bomb": (encode(Image.new("1", (20000, 10000)), "PNG", compress_level=9), 400, "pixels"),
        "EPS": (eps.getvalue(), 400, "a PostScript file, which is not supported"),
    }


@pytest.mark.slow
def test_200_requests_at_once_with_bad_bodies_among_them(
    server: Server, expected: dict[Path, list[dict[str, Any]]], bad_bodies: dict[str, tuple[bytes, int, str]]
) -> None:
    """Each request gets the right response, the metrics count all of them, and the server stays healthy."""
    before, num_batches = server.num_responses(), server.metrics()["vit_static_batch_size_count"]
    stalled = [start_request(server, b"x" * 1000, 10) for _ in range(2)]
    bodies = {path: path.read_bytes() for path in expected}
    requests: list[tuple[str, bytes, Any]] = []  # name, body, and the expected classes or refusal
    for index in range(198):
        if index % 5 == 2:
            name = list(bad_bodies)[index // 5 % len(bad_bodies)]
            requests.append((name, bad_bodies[name][0], bad_bodies[name][1:]))
        else:
            path = list(bodies)[index % len(bodies)]
            requests.append((path.name, bodies[path], expected[path]))

    async def post_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=198)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return await asyncio.gather(
                *(client.post(f"{server.url}/predict", content=body) for _, body, _ in requests)
            )

    for (name, _, result), response in zip(requests, asyncio.run(post_all()), strict=True):
        if isinstance(result, list):
            assert response.status_code == 200 and is_same(response.json()["top"], result), name
        else:
            status, message = result
            assert (response.status_code, message in response.json()["error"]) == (status, True), (name, response.text)
    for connection in stalled:
        status, _, content = receive_response(connection)
        assert status == 408 and "within 30 s" in content["error"]

    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    statuses = ["200" if isinstance(result, list) else str(result[0]) for _, _, result in requests] + ["408", "408"]
    increase = {status: value - before.get(status, 0) for status, value in server.num_responses().items()}
    assert {status: value for status, value in increase.items() if value} == {
        status: statuses.count(status) for status in statuses
    }
    metrics = server.metrics()
    assert metrics["vit_static_requests_under_way"] == 0
    assert metrics["vit_static_batch_size_sum"] == server.num_responses()["200"]
    assert metrics["vit_static_batch_size_count"] - num_batches < statuses.count("200")  # batches were formed


@pytest.mark.slow
def test_other_mistakes_are_reported_in_json(server: Server, exported: Exported) -> None:
    image = exported.validation_images()[0].read_bytes()
    for top_k in ("0", "-1", "many", "٣"):
        response = httpx.post(f"{server.url}/predict", params={"top_k": top_k}, content=image)
        assert response.status_code == 400 and "top_k" in response.json()["error"]
    assert httpx.get(f"{server.url}/predict").status_code == 405
    assert httpx.get(f"{server.url}/nowhere").json() == {"error": "Not Found"}


@pytest.mark.slow
def test_a_large_body_without_a_declared_size_is_refused(server: Server) -> None:
    """It is refused as soon as it is too large; the client sees the response when it has sent the body."""

    def chunks(num_chunks: float) -> Iterator[bytes]:
        while (num_chunks := num_chunks - 1) >= 0:
            yield bytes(100_000)

    response = httpx.post(f"{server.url}/predict", content=chunks(30))
    assert response.status_code == 413 and "1000000 bytes" in response.json()["error"]
    before = server.num_responses()["413"]
    with contextlib.suppress(httpx.TransportError):  # the client is still sending when the connection is closed
        assert httpx.post(f"{server.url}/predict", content=chunks(float("inf"))).status_code == 413
    assert server.num_responses()["413"] == before + 1


@pytest.mark.slow
def test_a_stop_answers_the_requests_under_way(exported: Exported, expected: dict[Path, list[dict[str, Any]]]) -> None:
    with serving(exported, "--timeout-s", 20) as server:
        images = [(path.read_bytes(), top) for path, top in list(expected.items())[:12]]
        connections = [start_request(server, body, len(body) // 2) for body, _ in images]
        server.wait_for_requests(len(images))
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        with pytest.raises(OSError):  # new connections are refused
            while time.monotonic() < deadline:
                socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
                time.sleep(0.01)
        for connection, (body, _) in zip(connections, images, strict=True):
            connection.sendall(body[len(body) // 2 :])
        for connection, (_, top) in zip(connections, images, strict=True):
            status, _, content = receive_response(connection)
            assert status == 200 and is_same(content["top"], top)
        stdout, stderr = server.process.communicate(timeout=60)
        assert server.process.returncode == 75 and stdout == ""
        assert len(stderr.splitlines()) == 2 and "stopped on request" in stderr


@pytest.mark.slow
def test_too_many_and_too_slow_requests_get_503(exported: Exported) -> None:
    """The limit is two images, which a form has, and a batch waits longer than a request may take."""
    image = exported.validation_images()[0].read_bytes()
    flags = ("--max-connections", 50, "--max-connections-per-client", 50)  # only one client: no shares
    flags += ("--max-waiting", 2, "--timeout-s", 2, "--max-wait-ms", 60_000)
    with serving(exported, *flags) as server, ThreadPoolExecutor(1) as executor:
        form = [("file", ("image", image))] * 2
        first = executor.submit(httpx.post, f"{server.url}/predict", files=form, timeout=30)
        server.wait_for_metric("vit_static_images_under_way", 2)
        refused = httpx.post(f"{server.url}/predict", content=image)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "2 images are under way" in refused.json()["error"]
        answer = first.result(30)
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
        assert "no answer within 2 s" in answer.json()["error"]
        assert httpx.post(f"{server.url}/predict", files=[*form, form[0]]).status_code == 400  # never more than two
        exit_code, _, stderr = server.stop()
        assert exit_code == 75 and "Traceback" not in stderr


@pytest.mark.slow
def test_a_port_in_use_is_reported_in_one_line(server: Server, exported: Exported, tmp_path: Path) -> None:
    finished = run_sh("serve", "--model", exported.folder, "--port", server.port, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert f"--port {server.port}" in finished.stderr and len(finished.stderr.splitlines()) == 1


def test_waiting_inputs_form_batches_and_a_failure_stays_in_its_batch() -> None:
    """Six inputs arrive while the function runs, and one is cancelled; the next batches have three and two."""
    sizes, is_running, may_finish = [], threading.Event(), threading.Event()

    def run(inputs: np.ndarray) -> np.ndarray:
        sizes.append(len(inputs))
        is_running.set()
        assert may_finish.wait(10)
        if (inputs < 0).any():
            raise ValueError("negative")
        return 2 * inputs

    batcher = Batcher(run, batch_size=3, max_wait_s=0.0)
    first = batcher.submit(np.array([[0.0]]))
    assert is_running.wait(10)
    waiting = [batcher.submit(np.array([[value]])) for value in (1.0, -2.0, 3.0, 4.0, 5.0, 6.0)]
    assert waiting[4].cancel()
    may_finish.set()
    assert first.result(10) == 0.0
    for future in waiting[:3]:
        with pytest.raises(ValueError, match="negative"):
            future.result(10)
    assert [waiting[3].result(10), waiting[5].result(10)] == [8.0, 12.0]
    batcher.close()
    assert sizes == [1, 3, 2] and not batcher.is_alive()


@pytest.mark.slow
def test_attention_gives_the_part_of_the_image_that_it_covers(server: Server) -> None:
    """16x32 pixels of 100x300: the short side is resized to round(16 / 0.875) = 18, and the centre cropped."""
    content = httpx.post(f"{server.url}/attention", content=encode(Image.new("RGB", (300, 100), "red"), "PNG")).json()
    assert np.shape(content["grid"]) == (2, 4) and np.sum(content["grid"]) == pytest.approx(1.0, abs=1e-4)
    left, top, width, height = content["box"]
    assert [width, height] == pytest.approx([32 / 54, 16 / 18])
    assert [left, top] == pytest.approx([(1 - width) / 2, (1 - height) / 2])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(chromium()) as started:
        yield started


@pytest.mark.slow
def test_the_page_shows_the_classes_and_the_attention_of_dropped_images(
    server: Server, browser: Browser, exported: Exported, expected: dict[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    (path, top), (second, _) = list(expected.items())[7:9]
    (tmp_path / "notes.txt").write_text("no image")

    def wait_for_status(text: str) -> None:
        browser.wait_until(f"document.querySelector('#status').textContent === {json.dumps(text)}")

    browser.open(f"{server.url}/")
    browser.wait_until("document.querySelector('#about').textContent.includes('10 classes')")
    assert browser.evaluate("[document.title, document.querySelector('h1').textContent]") == ["tiny", "tiny"]
    browser.drop("#drop", path)
    wait_for_status(path.name)
    lines = browser.evaluate("[...document.querySelectorAll('.result li span span')].map(line => line.textContent)")
    assert lines[::2] == [entry["name"] for entry in top]
    assert [float(line.removesuffix(" %")) for line in lines[1::2]] == pytest.approx(
        [100 * entry["probability"] for entry in top], abs=0.051
    )
    widths = browser.evaluate("[...document.querySelectorAll('.result i')].map(bar => bar.offsetWidth)")
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]

    slide = (
        "(() => { const slider = document.querySelector('#strength'); slider.value = %s; "
        "slider.dispatchEvent(new Event('input')); })()"
    )
    drawn_pixels = "document.querySelector('canvas').toDataURL()"
    assert browser.evaluate("document.querySelector('#strength-text').textContent") == "off"
    without_attention = browser.evaluate(drawn_pixels)
    browser.evaluate(slide % 0.5)
    browser.wait_until(f"{drawn_pixels} !== {json.dumps(without_attention)}")
    with_half = browser.evaluate(drawn_pixels)
    browser.evaluate(slide % 1)
    assert browser.evaluate(drawn_pixels) not in (without_attention, with_half)
    browser.evaluate(slide % 0)
    assert browser.evaluate(drawn_pixels) == without_attention

    browser.choose("#file", tmp_path / "notes.txt")
    browser.wait_until("document.querySelector('#status').className === 'error'")
    assert browser.evaluate("document.querySelectorAll('canvas, .result li').length") == 0
    assert "can't be read as an image" in browser.evaluate("document.querySelector('.result').textContent")
    browser.drop("#drop", path, tmp_path / "notes.txt", second)
    wait_for_status("1 of 3 could not be predicted")
    captions = browser.evaluate("[...document.querySelectorAll('figcaption')].map(caption => caption.textContent)")
    assert (captions[0], captions[2]) == (path.name, second.name) and captions[1].startswith("notes.txt: ")
    assert browser.evaluate("document.querySelectorAll('canvas').length") == 2
    assert browser.page_errors == []
