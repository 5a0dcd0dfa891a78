"""The server's forms of requests, its protocols and its access rules, with an API key and another origin allowed."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from helpers.browser import Browser, chromium
from helpers.command_line import use_test_environment  # noqa: F401 - a fixture
from helpers.exported import Exported, in_inference_process, open_predictor, predict
from helpers.server import Server, serving
from helpers.small import ROOT
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from vit_static.common.errors import PredictError, UserError
from vit_static.inference import uploads
from vit_static.inference.access import read_access

pytestmark = pytest.mark.slow

KEY = "correct-horse-battery"
ORIGIN = "https://example.org"
OPEN_PATHS = {"/", "/docs", "/openapi.json", "/health", "/healthz", "/ping", "/v2/health/live", "/v2/health/ready"}


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    key_file = tmp_path_factory.mktemp("key") / "key"
    key_file.write_text(f"{KEY}\n")
    flags = ("--api-key", key_file, "--cors", ORIGIN, "--max-images", 4, "--max-mb", 1, "--max-waiting", 12)
    with serving(exported, *flags) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(chromium()) as started:
        yield started


@pytest.fixture(scope="module")
def images(exported: Exported) -> list[Path]:
    return exported.validation_images()[:3]


def classes(prediction: dict[str, Any]) -> list[int]:
    return [entry["class"] for entry in prediction["top"]]


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def run_curl(server: Server, *arguments: object) -> Any:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", "-H", f"X-API-Key: {KEY}", *map(str, arguments), f"{server.url}/predict"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def test_forms_and_json_with_several_images_agree_with_predict(
    server: Server, client: httpx.Client, exported: Exported, images: list[Path]
) -> None:
    expected = [prediction.top() for prediction in in_inference_process(predict, exported.folder, images)]
    files = [("file", (path.name, path.read_bytes())) for path in images]
    texts = [base64_of(path) for path in images]
    texts[1] = f"data:image/jpeg;base64,{texts[1]}"
    responses = [
        client.post("/predict", files=files).json(),
        client.post("/predict", json={"images": texts}).json(),
        run_curl(server, *(argument for path in images for argument in ("-F", f"file=@{path}"))),
    ]
    names = [path.name for path in images]
    for response, expected_names in zip(responses, (names, [None] * 3, names), strict=True):
        assert [prediction.get("name") for prediction in response["predictions"]] == expected_names
        for prediction, top in zip(response["predictions"], expected, strict=True):
            assert classes(prediction) == [entry["class"] for entry in top]
            probabilities = [entry["probability"] for entry in prediction["top"]]
            assert np.allclose(probabilities, [entry["probability"] for entry in top], atol=2e-6)
    (one,) = run_curl(server, "-F", f"file=@{images[0]}")["predictions"]
    assert classes(one) == classes(responses[0]["predictions"][0])
    (named,) = client.post("/attention", files=files[:1]).json()["maps"]
    assert named["name"] == names[0] and np.sum(named["grid"]) == pytest.approx(1.0, abs=1e-4)


def test_bad_forms_and_json_are_refused_with_a_reason(client: httpx.Client, images: list[Path]) -> None:
    good = ("good.jpeg", images[0].read_bytes())
    text = base64_of(images[0])
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"files": [("file", good), ("file", ("x.txt", b"text"))]}, 400, "image 2 of 2 (x.txt): can't be read"),
        ({"files": [("file", good)] * 5}, 400, "more than 4 images"),
        ({"files": {"file": good}, "data": {"top_k": "3"}}, 400, "field top_k is not a file"),
        ({"files": {"file": ("large", bytes(1_100_000))}}, 413, "1000000 bytes"),
        ({"files": {"file": ("two\nlines\x1b", b"x")}}, 400, "image 1 of 1"),
        ({"json": {"images": [text, "%%%"]}}, 400, "image 2 of 2: is not base64"),
        ({"json": {"images": [text] * 5}}, 400, "more than 4 images"),
        ({"json": {"images": []}}, 400, "no images"),
        ({"json": {"images": [text], "top_k": 3}}, 400, "settings belong into the URL: ?top_k=3"),
        ({"json": {"images": text}}, 400, "images: input should be a valid list"),
        ({"json": {"image": text}}, 400, 'send {"images": [BASE64, ...]}'),
        ({"json": [1]}, 400, "the JSON"),
        *[
            ({"content": content, "headers": {"Content-Type": media_type}}, 400, message)
            for content, media_type, message in (
                (b"{", "application/json", "not valid JSON"),
                (b'{"images": [NaN]}', "application/json; charset=utf-8", "NaN is not allowed"),
                (b'{"images": ' + b"[" * 900, "application/json", "not valid JSON"),
                (b'{"images": [' + b"[]," * 300_000 + b"[]]}", "application/json", "more than 1000 values"),
                (b"\xff\xfe{}", "application/json", "not valid JSON"),
                (b"x", "multipart/form-data", "not a valid form"),
                (b"--b\r\nContent-", "multipart/form-data; boundary=b", "not a valid form"),
                (b"--b--\r\n", "multipart/form-data; boundary=b", "no images"),
            )
        ],
        *[
            ({"content": content, "headers": headers}, 400, 'header "Content-Type: ' + media_type)
            for content, media_type in (
                (b' {"images": []}', "application/json"),
                (b'["x"]', "application/json"),
                (b"--b\r\nContent-Disposition: form-data", "multipart/form-data"),
            )
            for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"})
        ],
        ({"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 415, "compressed"),
    ]
    for request, status, message in refused:
        response = client.post("/predict", **request)
        assert (response.status_code, message in response.json()["error"]) == (status, True), response.text
    assert client.post("/predict", files={"file": good}).status_code == 200


def test_a_body_of_json_is_not_parsed_when_it_has_too_many_values() -> None:
    with pytest.raises(PredictError, match="more than 10 values"):
        uploads.load_json(b"[" + b"1," * 10 + b"1]", max_items=10)
    assert uploads.load_json(b"[" + b"1," * 8 + b"1]", max_items=10) == [1] * 9
    with pytest.raises(PredictError, match="the body is not valid JSON"):
        uploads.load_json(b"[" * 50_000, max_items=100_000)


def test_query_parameters_that_do_not_exist_are_errors(client: httpx.Client, images: list[Path]) -> None:
    content = images[0].read_bytes()
    for path, message in (
        ("/predict?topk=3", "unknown query parameter topk; did you mean top_k?"),
        ("/predict?top_k=3&top_k=4", "the query parameter top_k is given 2 times; give it once"),
        ("/predict?top_k=3&x", "unknown query parameter x; the only one is top_k"),
        ("/attention?top_k=3", "unknown query parameter top_k; there is none"),
        ("/v2/models/tiny/infer?x=1", "unknown query parameter x; there is none"),
    ):
        response = client.post(path, content=content)
        assert (response.status_code, response.json()["error"]) == (400, message)
    for path in (*OPEN_PATHS, "/metrics", "/v2", "/v2/models/tiny"):
        assert client.get(path).status_code == 200
        assert client.get(path, params={"x": "1"}).status_code == 400


def test_only_clients_with_the_key_are_answered(server: Server, images: list[Path]) -> None:
    """The key isn't in the list of processes, and its check comes before a body is received."""
    content = images[0].read_bytes()
    with httpx.Client(base_url=server.url) as client:
        right: tuple[dict[str, Any], ...] = (
            {"Authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer {KEY}"},
            {"X-API-Key": KEY},
        )
        wrong: tuple[dict[str, Any], ...] = (
            {},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": KEY},
            {"X-API-Key": "ключ".encode()},
        )
        for headers, status in (*((each, 200) for each in right), *((each, 401) for each in wrong)):
            response = client.post("/predict", content=content, headers=headers)
            assert response.status_code == status
            if status == 401:
                assert response.headers["WWW-Authenticate"] == "Bearer" and "Bearer KEY" in response.json()["error"]
        document = client.get("/openapi.json").json()
        for path, item in document["paths"].items():
            for method in {"get", "post"} & set(item):
                response = client.request(method, path.replace("{model}", "tiny"), content=b"")
                assert response.status_code == (200 if path in OPEN_PATHS else 401), path
        assert client.get("/health").json()["needs_api_key"]
    process = psutil.Process(server.process.pid)
    assert all(KEY not in " ".join(each.cmdline()) for each in (process, *process.children(recursive=True)))


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(f"  {KEY}\n")
    assert read_access(key_file, [], {"VIT_STATIC_API_KEY": "another-key"}).api_key == KEY
    assert read_access(None, ["*"], {"VIT_STATIC_API_KEY": KEY}).api_key == KEY
    assert read_access(None, ["http://[::1]:80"], {"VIT_STATIC_API_KEY": ""}).api_key is None
    with pytest.raises(UserError, match="VIT_STATIC_API_KEY") as mistake:
        read_access(Path("the-secret-itself"), [], {})
    assert "the-secret" not in str(mistake.value)
    for key in ("short", "with a space", "schlüssel-lang"):
        with pytest.raises(UserError, match=r"at least 8 printable ASCII") as mistake:
            read_access(None, [], {"VIT_STATIC_API_KEY": key})
        assert key not in str(mistake.value)
    for origin in ("example.org", "https://example.org/", "https://*.example.org"):
        with pytest.raises(UserError, match="is not an origin"):
            read_access(None, [origin], {})


def test_pages_of_an_allowed_origin_may_use_the_server(
    server: Server, client: httpx.Client, images: list[Path]
) -> None:
    question = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://example.com", None)):
        headers = {"Origin": origin}
        asked = httpx.options(f"{server.url}/predict", headers={**headers, **question})
        assert (asked.status_code, asked.headers.get("access-control-allow-origin")) == (
            200 if allowed else 400,
            allowed,
        )
        for request in ({"content": images[0].read_bytes()}, {"content": b"x"}):
            response = client.post("/predict", headers=headers, **request)
            assert response.headers.get("access-control-allow-origin") == allowed


def test_the_openapi_document_is_valid_and_describes_the_responses(client: httpx.Client, images: list[Path]) -> None:
    document = client.get("/openapi.json").json()
    validate(document)
    assert document["info"]["title"] == "vit_static: tiny"
    files = [("file", (path.name, path.read_bytes())) for path in images]
    responses = [
        ("/predict", client.post("/predict", content=images[0].read_bytes())),
        ("/predict", client.post("/predict", files=files)),
        ("/attention", client.post("/attention", content=images[0].read_bytes())),
        ("/attention", client.post("/attention", files=files[:2])),
        ("/v2/models/{model}/infer", client.post("/v2/models/tiny_files/infer", json=files_request(images[:2]))),
        ("/predict", client.post("/predict", content=b"x")),
    ]
    for path, response in responses:
        described = document["paths"][path]["post"]["responses"]
        answer = described["200"] if response.status_code == 200 else document["components"]["responses"]["Error"]
        schema = answer["content"]["application/json"]["schema"]
        OAS31Validator({**schema, "components": document["components"]}).validate(response.json())
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert all(path in page.text for path in document["paths"])
    assert not re.search(r"(src|href)=.?(https?:)?//", page.text)  # nothing from another server


def files_request(paths: list[Path]) -> dict[str, Any]:
    data = [base64_of(path) for path in paths]
    return {"inputs": [{"name": "files", "datatype": "BYTES", "shape": [len(data)], "data": data}]}


def read_outputs(response: httpx.Response) -> dict[str, np.ndarray]:
    """Read a response of the Open Inference Protocol, with or without binary tensors."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get("Inference-Header-Content-Length", len(response.content)))
    message, rest, outputs = json.loads(response.content[:length]), response.content[length:], {}
    for entry in message["outputs"]:
        assert entry["datatype"] == "FP32"
        if "data" in entry:
            values = np.array(entry["data"], np.float32)
        else:
            size = entry["parameters"]["binary_data_size"]
            values, rest = np.frombuffer(rest[:size], "<f4"), rest[size:]
        outputs[entry["name"]] = values.reshape(entry["shape"])
    assert not rest
    return outputs


def logits_of(folder: Path, inputs: np.ndarray) -> np.ndarray:
    return open_predictor(folder).logits(inputs)


def test_what_tritons_client_sends_is_answered(client: httpx.Client, exported: Exported) -> None:
    """The requests were recorded (tests/reference/make_v2_requests.py); binary and json have the same tensor."""
    recorded = json.loads((ROOT / "tests/reference/v2_requests.json").read_text())
    responses, bodies = {}, {}
    for entry in recorded:
        bodies[entry["name"]] = base64.b64decode(entry["body"])
        content = bodies[entry["name"]]
        responses[entry["name"]] = client.request(
            entry["method"], entry["path"], headers=entry["headers"], content=content
        )
        assert responses[entry["name"]].status_code == 200, responses[entry["name"]].text
    metadata = responses["model"].json()
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 16, 32]}]
    assert [output["shape"] for output in metadata["outputs"]] == [[-1, 10], [-1, 10]]
    inputs = np.frombuffer(bodies["binary"][-2 * 3 * 16 * 32 * 4 :], "<f4").reshape(2, 3, 16, 32)
    expected = in_inference_process(logits_of, exported.folder, inputs)
    binary, from_json = read_outputs(responses["binary"]), read_outputs(responses["json"])
    assert np.allclose(binary["logits"], expected, atol=1e-5) and np.allclose(from_json["logits"], expected, atol=1e-5)
    assert list(from_json) == ["logits"] and responses["json"].json()["id"] == "7"
    exponentials = np.exp(expected.astype(np.float64))
    assert np.allclose(binary["probabilities"], exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-6)
    red, green = read_outputs(responses["files"])["probabilities"]
    assert red.sum() == pytest.approx(1.0, abs=1e-5) and not np.allclose(red, green)


def test_requests_that_do_not_fit_the_protocol_are_refused(client: httpx.Client, images: list[Path]) -> None:
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, 3, 16, 32]}
    numbers = [0.5] * (3 * 16 * 32)
    files = files_request(images[:1])["inputs"][0]
    two_bytes = struct.pack("<I", 10) + b"xy"
    refused: list[tuple[str, dict[str, Any], bytes, str]] = [
        ("tiny", {"inputs": []}, b"", "inputs"),
        ("tiny", {"inputs": [{**tensor, "data": numbers[:-1]}]}, b"", "don't fit its shape"),
        ("tiny", {"inputs": [{**tensor, "data": [[1.0], [1.0, 2.0]]}]}, b"", "don't fit its shape"),
        ("tiny", {"inputs": [{**tensor, "data": ["1"] * len(numbers)}]}, b"", "not numbers"),
        ("tiny", {"inputs": [{**tensor, "data": [1e39, *numbers[1:]]}]}, b"", "NaN or infinite"),
        ("tiny", {"inputs": [{**tensor, "data": [10**400, *numbers[1:]]}]}, b"", "don't fit its shape"),
        ("tiny", {"inputs": [{**tensor, "shape": [0, 3, 16, 32], "data": []}]}, b"", "0 images; send 1 to 4"),
        ("tiny", {"inputs": [{**tensor, "shape": [5, 3, 16, 32], "data": []}]}, b"", "5 images; send 1 to 4"),
        ("tiny", {"inputs": [{**tensor, "shape": [], "data": []}]}, b"", "the model takes images FP32"),
        ("tiny", {"inputs": [{**tensor, "datatype": "FP64", "data": numbers}]}, b"", "the model takes images FP32"),
        ("tiny", {"inputs": [tensor]}, b"", "either data or"),
        ("tiny", {"inputs": [{**tensor, "parameters": {"binary_data_size": 8}}]}, b"123", "3 bytes follow the JSON"),
        ("tiny", {"inputs": [{**tensor, "parameters": {"binary_data_size": 4}}]}, b"1234", "don't fit its shape"),
        ("tiny", {"inputs": [files]}, b"", "the model takes images FP32 [-1, 3, 16, 32]"),
        ("tiny", {"inputs": [{**tensor, "data": numbers}], "outputs": [{"name": "x"}]}, b"", "outputs.0.name"),
        ("tiny", {"inputs": [{**tensor, "data": numbers}], "parameters": {"priority": 1}}, b"", "parameters.priority"),
        ("tiny_files", {"inputs": [{**files, "shape": [2]}]}, b"", "must be 2 base64 strings"),
        ("tiny_files", {"inputs": [{**files, "data": ["%"]}]}, b"", "file 1 of 1: is not base64"),
        ("tiny_files", {"inputs": [{**files, "data": [base64.b64encode(b"x").decode()]}]}, b"", "can't be read"),
        (
            "tiny_files",
            {"inputs": [{"name": "files", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}]},
            two_bytes,
            "don't have the 1 files",
        ),
    ]
    for model, message, binary, error in refused:
        text = json.dumps(message).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))} if binary else {}
        response = client.post(f"/v2/models/{model}/infer", content=text + binary, headers=headers)
        assert (response.status_code, error in response.json()["error"]) == (400, True), response.text
    for length in ("-1", "x", "9" * 30, "100000"):
        headers = {"Inference-Header-Content-Length": length}
        assert client.post("/v2/models/tiny/infer", content=b"{}", headers=headers).status_code == 400
    unknown = client.post("/v2/models/other/infer", content=b"{}")
    assert unknown.status_code == 404 and unknown.json()["error"].endswith("there are tiny and tiny_files")


def test_what_kserves_client_adds_is_accepted(client: httpx.Client, images: list[Path]) -> None:
    """Its InferenceRESTClient (kserve 0.15) repeats the model's name, and gives each request an ID."""
    request = {"id": "8d3f", "model_name": "tiny_files", **files_request(images[:1])}
    response = client.post("/v2/models/tiny_files/infer", json=request)
    assert read_outputs(response)["logits"].shape == (1, 10) and response.json()["id"] == "8d3f"


def test_the_page_asks_for_the_key(server: Server, browser: Browser, images: list[Path]) -> None:
    browser.open(f"{server.url}/")
    browser.wait_until("!document.querySelector('#key').hidden")
    browser.drop("#drop", images[0])
    browser.wait_until("document.querySelector('#status').className === 'error'")
    assert "needs its API key" in browser.evaluate("document.querySelector('.result').textContent")
    browser.evaluate(f"document.querySelector('#key-input').value = {json.dumps(KEY)}")
    browser.drop("#drop", images[0])
    browser.wait_until("!document.querySelector('#overlay').hidden")
    assert browser.evaluate("document.querySelectorAll('.result li').length") == 5
    assert browser.page_errors == []
