"""The exported model from Python and from the command line."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.command_line import run_sh, the_tests_own_environment  # noqa: F401 - a fixture
from helpers.exported import Exported, elsewhere, features, in_a_process_of_its_own, opened, predictions
from helpers.numpy_vit import logits as numpy_logits
from helpers.small import ROOT, read_state
from PIL import Image

from vit_static.common.errors import PredictError
from vit_static.inference.attention_maps import load_model
from vit_static.inference.predictor import Prediction, Predictor, load_predictor


def inputs_of(model: Predictor, paths: list[Path]) -> np.ndarray:
    return model.preprocess([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@in_a_process_of_its_own
def test_logits_and_features_are_the_trained_models(exported: Exported) -> None:
    """By NumPy's forward pass of the run's weights; the features times the head's are the logits."""
    model = opened(exported.folder)
    state = read_state(exported.run / "model.pdparams")
    inputs = inputs_of(model, exported.validation())
    expected = numpy_logits(state, inputs, patch_size=8, num_heads=2)
    np.testing.assert_allclose(model.logits(inputs), expected, atol=1e-5)
    read = model.features(exported.validation())
    assert read.shape == (30, 32) and read.dtype == np.float32
    np.testing.assert_allclose(read @ state["head.weight"] + state["head.bias"], expected, atol=1e-5)
    powers = np.exp(expected)
    shares = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.probabilities(exported.validation()), shares, atol=1e-6)


@in_a_process_of_its_own
def test_a_prediction_names_the_likeliest_classes_first(exported: Exported) -> None:
    model = opened(exported.folder)
    paths = exported.validation()
    shares = model.probabilities(paths)
    names = (exported.run / "class_names.txt").read_text().split()
    for prediction, row in zip(model(paths, top_k=3), shares, strict=True):
        assert prediction.probabilities == sorted(row, reverse=True)[:3]
        assert [row[number] for number in prediction.classes] == prediction.probabilities
        assert [names[number] for number in prediction.classes] == prediction.names
    assert len(model(paths[:1], top_k=1000)[0].classes) == 10
    assert model([]) == []


@in_a_process_of_its_own
def test_files_pictures_and_arrays_are_the_same_to_the_bit(exported: Exported) -> None:
    model = opened(exported.folder)
    path = exported.validation()[4]
    picture = Image.open(path)
    kinds = [path, str(path), picture, np.asarray(picture.convert("RGB"))]
    shares = model.probabilities(kinds)
    assert (shares == shares[0]).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4), np.uint8), "uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
    ],
)
@in_a_process_of_its_own
def test_what_is_no_image_is_refused_by_name(exported: Exported, array: np.ndarray, said: str) -> None:
    model = opened(exported.folder)
    with pytest.raises(PredictError, match=said):
        model([array])


@in_a_process_of_its_own
def test_many_threads_get_what_one_gets_to_the_bit(exported: Exported) -> None:
    model = opened(exported.folder)
    paths = exported.validation()
    batches = [[paths[(start + step) % 30] for step in range(1 + start % 7)] for start in range(40)]
    alone = [(model.probabilities(batch), model.features(batch)) for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda batch: (model.probabilities(batch), model.features(batch)), batches))
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@in_a_process_of_its_own
def test_a_stream_reads_little_ahead_and_goes_on_after_a_bad_image(exported: Exported, tmp_path: Path) -> None:
    model = opened(exported.folder)
    (tmp_path / "bad.jpeg").write_bytes(b"no image")
    paths = exported.validation()
    given = 0

    def endless() -> Iterator[Path]:
        nonlocal given
        while True:
            given += 1
            yield tmp_path / "bad.jpeg" if given in (2, 5, 6, 7, 8) else paths[given % 30]  # all of the second batch

    found = model.stream(endless(), batch_size=4, with_features=True)
    first = [next(found) for _ in range(12)]
    assert given <= 4 * 4
    assert [isinstance(one, PredictError) for one in first] == [n in (2, 5, 6, 7, 8) for n in range(1, 13)]
    expected = model([paths[n % 30] for n in range(1, 13)])
    for one, other in zip(first, expected, strict=True):
        if isinstance(one, Prediction):
            assert one.classes == other.classes and one.features is not None
            assert one.probabilities == pytest.approx(other.probabilities, rel=1e-6)
        else:
            assert "bad.jpeg" in str(one)
    found.close()  # type: ignore[attr-defined]


@in_a_process_of_its_own
def test_a_call_raises_what_a_stream_tells(exported: Exported, tmp_path: Path) -> None:
    model = opened(exported.folder)
    with pytest.raises(PredictError, match=r"nowhere\.png"):
        model([exported.validation()[0], tmp_path / "nowhere.png"])
    with pytest.raises(PredictError, match=r"nowhere\.png"):
        model.features([tmp_path / "nowhere.png"])


@in_a_process_of_its_own
def test_a_preprocessor_that_fails_is_replaced(exported: Exported) -> None:
    """DALI's pipelines are dead after an error."""
    model = opened(exported.folder)
    pixels = np.asarray(Image.open(exported.validation()[0]).convert("RGB"))
    before = model.preprocess([pixels])
    for _ in range(3):
        with pytest.raises(RuntimeError):
            model.preprocess([np.zeros((4, 4), np.uint8)])
    assert np.array_equal(model.preprocess([pixels]), before)


@in_a_process_of_its_own
def test_the_layer_of_an_export_answers_as_it_does(exported: Exported) -> None:
    model = opened(exported.folder)
    inputs = inputs_of(model, exported.validation()[:8])
    with paddle.no_grad():
        logits = load_model(exported.folder)(paddle.to_tensor(inputs)).numpy()
    np.testing.assert_allclose(logits, model.logits(inputs), atol=1e-5)


@in_a_process_of_its_own
def test_a_precision_that_the_machine_has_not_is_refused(exported: Exported) -> None:
    if not paddle.is_compiled_with_cuda():
        with pytest.raises(PredictError, match="card"):
            load_predictor(exported.folder, precision="float16")
    assert "float32 (as exported)" in load_predictor(exported.folder).description


def run_predict(exported: Exported, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [ROOT / "run.sh", "predict", "--model", exported.folder, *arguments]
    return subprocess.run(list(map(str, command)), input=stdin, capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def listed(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], bytes]:
    """Files, the fourth of which is text and the sixth missing, and a list of them with blank lines."""
    folder = tmp_path_factory.mktemp("some files")
    (folder / "text, and “quotes”.png").write_text("no image")
    paths = exported.validation()[:7]
    paths[3], paths[5] = folder / "text, and “quotes”.png", folder / "nowhere.png"
    return paths, b"\n" + b"\r\n\n".join(bytes(path) for path in paths)


@pytest.mark.slow
def test_a_list_on_stdin_and_features_beside(
    exported: Exported, listed: tuple[list[Path], bytes], tmp_path: Path
) -> None:
    paths, text = listed
    done = run_predict(exported, "--features", tmp_path / "out.npy", "--batch-size", 3, "-", stdin=text)
    assert done.returncode == 2
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in paths]
    assert ["error" in line for line in lines] == [False, False, False, True, False, True, False]
    written = np.load(tmp_path / "out.npy")
    good = [0, 1, 2, 4, 6]
    np.testing.assert_allclose(written[good], elsewhere(features, exported.folder, [paths[n] for n in good]), atol=1e-5)
    assert written.dtype == np.float32 and np.isnan(written[[3, 5]]).all()
    said = done.stderr.decode().splitlines()
    assert len(said) == 2 and "float32 (as exported) on the CPU, oneDNN" in said[0]
    assert "2 images" in said[1] and "out.npy are NaN" in said[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


@pytest.mark.slow
def test_csv_and_a_table(exported: Exported, listed: tuple[list[Path], bytes]) -> None:
    paths, text = listed
    (expected,) = elsewhere(predictions, exported.folder, paths[:1], 2)
    done = run_predict(exported, "--format", "csv", "--top-k", 2, "-", stdin=text)
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, False, True, False]
    assert [rows[0]["name_1"], rows[0]["name_2"]] == expected.names
    assert float(rows[0]["probability_2"]) == pytest.approx(expected.probabilities[1], abs=1e-6)
    assert int(rows[0]["class_1"]) == expected.classes[0] and None not in rows[3]

    done = run_predict(exported, "--format", "table", "--top-k", 2, *paths[:3])
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 3 and len({line.index(str(exported.digits)) for line in lines}) == 1
    assert all(name in lines[0] for name in expected.names) and f"{expected.probabilities[0]:.2%}" in lines[0]
