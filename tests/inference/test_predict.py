"""Predictions of an exported model, from Python and on the command line."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.command_line import run_sh, use_test_environment  # noqa: F401 - a fixture
from helpers.exported import (
    Exported,
    compute_features,
    in_inference_process,
    open_predictor,
    predict,
    runs_in_inference_process,
)
from helpers.numpy_vit import logits as numpy_logits
from helpers.small import ROOT, read_state
from PIL import Image

import vit_static
from vit_static.common.errors import PredictError
from vit_static.inference.attention_maps import load_as_layer
from vit_static.inference.image_io import require_several
from vit_static.inference.predictor import Prediction, Predictor


def inputs_of(model: Predictor, paths: list[Path]) -> np.ndarray:
    return model.preprocess([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@runs_in_inference_process
def test_logits_and_features_are_the_trained_models(exported: Exported) -> None:
    """The reference is a forward pass in NumPy with the run's weights; features times the head's weights are logits."""
    model = open_predictor(exported.folder)
    state = read_state(exported.run / "model.pdparams")
    inputs = inputs_of(model, exported.validation_images())
    expected = numpy_logits(state, inputs, patch_size=8, num_heads=2)
    np.testing.assert_allclose(model.logits(inputs), expected, atol=1e-5)
    features = model.features(exported.validation_images())
    assert features.shape == (30, 32) and features.dtype == np.float32
    np.testing.assert_allclose(features @ state["head.weight"] + state["head.bias"], expected, atol=1e-5)
    powers = np.exp(expected)
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.probabilities(exported.validation_images()), probabilities, atol=1e-6)


@runs_in_inference_process
def test_a_prediction_lists_the_most_likely_classes_first(exported: Exported) -> None:
    model = open_predictor(exported.folder)
    paths = exported.validation_images()
    probabilities = model.probabilities(paths)
    names = (exported.run / "class_names.txt").read_text().split()
    for prediction, row in zip(model(paths, top_k=3), probabilities, strict=True):
        assert prediction.probabilities == sorted(row, reverse=True)[:3]
        assert [row[label] for label in prediction.classes] == prediction.probabilities
        assert [names[label] for label in prediction.classes] == prediction.names
    assert len(model(paths[:1], top_k=1000)[0].classes) == 10
    assert model([]) == []


@runs_in_inference_process
def test_files_images_and_arrays_give_the_same_bits(exported: Exported) -> None:
    model = open_predictor(exported.folder)
    path = exported.validation_images()[4]
    image = Image.open(path)
    probabilities = model.probabilities([path, str(path), image, np.asarray(image.convert("RGB"))])
    assert (probabilities == probabilities[0]).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4), np.uint8), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
    ],
)
@runs_in_inference_process
def test_an_array_that_is_no_image_is_refused(exported: Exported, array: np.ndarray, message: str) -> None:
    model = open_predictor(exported.folder)
    with pytest.raises(PredictError, match=message):
        model([array])


@pytest.mark.parametrize(
    "image", ["pear.png", Path("pear.png"), Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8)]
)
def test_one_image_is_not_taken_for_several(image: Any) -> None:
    """A path's letters would be paths."""
    with pytest.raises(PredictError, match=r"(pear\.png|an array|a Pillow image): is one image; pass a list"):
        require_several(image)
    require_several([image])
    require_several(np.zeros((2, 4, 4, 3), np.uint8))


@runs_in_inference_process
def test_several_threads_get_the_same_bits_as_one(exported: Exported) -> None:
    model = open_predictor(exported.folder)
    paths = exported.validation_images()
    batches = [[paths[(start + step) % 30] for step in range(1 + start % 7)] for start in range(40)]
    sequential = [(model.probabilities(batch), model.features(batch)) for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(lambda batch: (model.probabilities(batch), model.features(batch)), batches))
    for expected, result in zip(sequential, parallel, strict=True):
        assert all(np.array_equal(array, other) for array, other in zip(expected, result, strict=True))


@runs_in_inference_process
def test_a_stream_reads_ahead_a_little_and_continues_after_a_bad_image(exported: Exported, tmp_path: Path) -> None:
    model = open_predictor(exported.folder)
    (tmp_path / "bad.jpeg").write_bytes(b"no image")
    paths = exported.validation_images()
    bad = (2, 5, 6, 7, 8)  # one in the first batch, and all of the second
    num_read = 0

    def endless() -> Iterator[Path]:
        nonlocal num_read
        while True:
            num_read += 1
            yield tmp_path / "bad.jpeg" if num_read in bad else paths[num_read % 30]

    stream = model.stream(endless(), batch_size=4, with_features=True)
    results = [next(stream) for _ in range(12)]
    assert num_read <= 4 * 4
    assert [isinstance(result, PredictError) for result in results] == [number in bad for number in range(1, 13)]
    expected = model([paths[number % 30] for number in range(1, 13)])
    for result, prediction in zip(results, expected, strict=True):
        if isinstance(result, Prediction):
            assert result.classes == prediction.classes and result.features is not None
            assert result.probabilities == pytest.approx(prediction.probabilities, rel=1e-6)
        else:
            assert "bad.jpeg" in str(result)
    stream.close()  # type: ignore[attr-defined]


@runs_in_inference_process
def test_a_call_raises_for_an_unreadable_image(exported: Exported, tmp_path: Path) -> None:
    model = open_predictor(exported.folder)
    with pytest.raises(PredictError, match=r"nowhere\.png"):
        model([exported.validation_images()[0], tmp_path / "nowhere.png"])
    with pytest.raises(PredictError, match=r"nowhere\.png"):
        model.features([tmp_path / "nowhere.png"])


@runs_in_inference_process
def test_a_failed_preprocessor_is_replaced(exported: Exported) -> None:
    """A DALI pipeline can't be used again after an error."""
    model = open_predictor(exported.folder)
    pixels = np.asarray(Image.open(exported.validation_images()[0]).convert("RGB"))
    before = model.preprocess([pixels])
    for _ in range(3):
        with pytest.raises(RuntimeError):
            model.preprocess([np.zeros((4, 4), np.uint8)])
    assert np.array_equal(model.preprocess([pixels]), before)


@runs_in_inference_process
def test_the_layer_of_an_export_has_its_logits(exported: Exported) -> None:
    model = open_predictor(exported.folder)
    inputs = inputs_of(model, exported.validation_images()[:8])
    with paddle.no_grad():
        logits = load_as_layer(exported.folder)(paddle.to_tensor(inputs)).numpy()
    np.testing.assert_allclose(logits, model.logits(inputs), atol=1e-5)


@runs_in_inference_process
def test_a_precision_that_the_machine_cannot_run_is_refused(exported: Exported) -> None:
    if not paddle.is_compiled_with_cuda():
        with pytest.raises(PredictError, match="GPU"):
            vit_static.load(exported.folder, precision="float16")
    assert "float32 (as exported)" in vit_static.load(exported.folder).description


def run_predict_verb(exported: Exported, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [ROOT / "run.sh", "predict", "--model", exported.folder, *arguments]
    return subprocess.run(list(map(str, command)), input=stdin, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def listed(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], bytes]:
    """Return paths, the fourth of a text file and the sixth of a missing one, and a list of them with blank lines."""
    folder = tmp_path_factory.mktemp("some files")
    (folder / "text, and “quotes”.png").write_text("no image")
    paths = exported.validation_images()[:7]
    paths[3], paths[5] = folder / "text, and “quotes”.png", folder / "nowhere.png"
    return paths, b"\n" + b"\r\n\n".join(bytes(path) for path in paths)


@pytest.mark.slow
def test_a_list_on_stdin_and_a_file_of_features(
    exported: Exported, listed: tuple[list[Path], bytes], tmp_path: Path
) -> None:
    paths, text = listed
    finished = run_predict_verb(exported, "--features", tmp_path / "out.npy", "--batch-size", 3, "-", stdin=text)
    assert finished.returncode == 2
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    assert ["error" in line for line in lines] == [False, False, False, True, False, True, False]
    features = np.load(tmp_path / "out.npy")
    readable = [0, 1, 2, 4, 6]
    expected = in_inference_process(compute_features, exported.folder, [paths[index] for index in readable])
    np.testing.assert_allclose(features[readable], expected, atol=1e-5)
    assert features.dtype == np.float32 and np.isnan(features[[3, 5]]).all()
    messages = finished.stderr.decode().splitlines()
    assert len(messages) == 2 and "float32 (as exported) on the CPU, oneDNN" in messages[0]
    assert "2 images" in messages[1] and "out.npy are NaN" in messages[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


@pytest.mark.slow
def test_csv_and_a_table(exported: Exported, listed: tuple[list[Path], bytes]) -> None:
    paths, text = listed
    (expected,) = in_inference_process(predict, exported.folder, paths[:1], 2)
    finished = run_predict_verb(exported, "--format", "csv", "--top-k", 2, "-", stdin=text)
    rows = list(csv.DictReader(io.StringIO(finished.stdout.decode())))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, False, True, False]
    assert [rows[0]["name_1"], rows[0]["name_2"]] == expected.names
    assert float(rows[0]["probability_2"]) == pytest.approx(expected.probabilities[1], abs=1e-6)
    assert int(rows[0]["class_1"]) == expected.classes[0] and None not in rows[3]

    finished = run_predict_verb(exported, "--format", "table", "--top-k", 2, *paths[:3])
    lines = finished.stdout.decode().splitlines()
    assert lines[0].split() == ["Image", "Class", "1", "Class", "2"] and len(lines) == 4
    assert all(line.startswith(str(exported.digits)) for line in lines[1:])
    assert all(name in lines[1] for name in expected.names) and f"{expected.probabilities[0]:.2%}" in lines[1]
