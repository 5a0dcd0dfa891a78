"""The choice of the library that runs an export: measured, checked against the exported program, and cached."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.exported import Exported, in_inference_process, run_export, runs_in_inference_process
from helpers.forked_verbs import run_verb
from helpers.numpy_vit import logits as numpy_logits
from helpers.small import ROOT, read_state
from onnx import numpy_helper

from vit_static.common.errors import PredictError
from vit_static.common.io import file_record
from vit_static.inference import choose_backend
from vit_static.inference.artifact import ONNX_FILE, OPENVINO_CHECK, SPEC_FILE, read_spec
from vit_static.inference.backends import Backend
from vit_static.inference.predictor import Predictor

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
pytestmark = pytest.mark.needs_paddle2onnx
INSTALLED: tuple[Backend, ...] = ("onnxruntime", "openvino") if HAS_OPENVINO else ("onnxruntime",)


def export_with_onnx(run: Path, out: Path) -> tuple[str, str | None]:
    return run_export(run, out, [], onnx=True)


@pytest.fixture(scope="module")
def onnx_folder(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model with an ONNX file."""
    folder = tmp_path_factory.mktemp("onnx") / "model"
    output, error = in_inference_process(export_with_onnx, exported.run, folder)
    assert error is None, error
    assert (f"{OPENVINO_CHECK} (float32): largest difference" in output) == HAS_OPENVINO
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def noise(num_images: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((num_images, 3, 16, 32), np.float32)


@runs_in_inference_process
def test_every_backend_computes_the_trained_models_logits(exported: Exported, onnx_folder: Path) -> None:
    """For any batch size, in any order, and from four threads at once; the reference is NumPy's forward pass."""
    inputs = noise(9)
    expected = numpy_logits(read_state(exported.run / "model.pdparams"), inputs, patch_size=8, num_heads=2)
    for backend in ("paddle", *INSTALLED):
        model = Predictor(onnx_folder, 1, backend=backend)
        assert model.backend == backend and model.description.endswith("(as requested)")
        for batch_size in (9, 1, 4):
            np.testing.assert_allclose(model.logits(inputs[:batch_size]), expected[:batch_size], atol=2e-5)
        with ThreadPoolExecutor(4) as threads:
            rows = list(threads.map(lambda n, model=model: model.logits(inputs[n % 9 : n % 9 + 1]), range(36)))
        np.testing.assert_allclose(np.concatenate(rows), np.tile(expected, (4, 1)), atol=2e-5)
        features = model.run(inputs, with_features=True)[1]
        assert features is not None and features.shape == (9, 32)


@runs_in_inference_process
def test_a_measurement_is_kept_for_this_machine_and_model(exported: Exported, onnx_folder: Path, cache: Path) -> None:
    """The cached times decide; others are measured for another batch size, and if the cache is damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        Predictor(onnx_folder, 1)
        (file,) = cache.rglob("backends.json")
        content = json.loads(file.read_text())
        ((key, seconds),) = content["seconds"].items()
        assert set(seconds) == {"paddle", *INSTALLED} and min(seconds.values()) > 0.0
        for slowest in seconds:
            times = {name: 0.5 if name == slowest else 0.001 for name in seconds}
            file.write_text(json.dumps({**content, "seconds": {key: times}}))
            model = Predictor(onnx_folder, 1)
            assert model.backend != slowest
            assert "fastest here, batch 8: " in model.description and " 500.0 ms" in model.description
        Predictor(onnx_folder, 1, usual_batch_size=1)
        assert len(json.loads(file.read_text())["seconds"]) == 2
        for damaged in ("", "[1]", json.dumps({**content, "seconds": {key: {"paddle": "fast"}}})):
            file.write_text(damaged)
            assert Predictor(onnx_folder, 1).description.count(" ms") == len(seconds)
        assert Predictor(exported.folder, 1).backend == "paddle"  # without an ONNX file there is no choice


def test_another_backend_must_be_clearly_faster() -> None:
    assert choose_backend.fastest({"paddle": 1.0, "onnxruntime": 0.98, "openvino": 0.99}, "paddle") == "paddle"
    assert choose_backend.fastest({"paddle": 1.0, "onnxruntime": 0.97, "openvino": 0.9}, "paddle") == "openvino"


def damage_weights(folder: Path) -> None:
    """Change a weight of the ONNX file, and its record, as if it were of another model."""
    path = folder / ONNX_FILE
    model = onnx.load(str(path))
    # paddle2onnx writes weights as constants.
    tensors = (node.attribute[0].t for node in model.graph.node if node.op_type == "Constant")
    weights = next(tensor for tensor in tensors if list(tensor.dims) == [32, 96])  # of queries, keys and values
    weights.CopyFrom(numpy_helper.from_array(1.01 * numpy_helper.to_array(weights), weights.name))
    onnx.save(model, str(path))
    spec = json.loads((folder / SPEC_FILE).read_text())
    spec["files"][ONNX_FILE] = asdict(file_record(path))
    (folder / SPEC_FILE).write_text(json.dumps(spec))


@runs_in_inference_process
def test_a_file_that_computes_something_else_is_not_used(onnx_folder: Path, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(onnx_folder, folder)
    damage_weights(folder)
    for backend in INSTALLED:
        with pytest.raises(PredictError, match=r"a logit differs by .* \(bound 1e-04\); use --backend paddle"):
            Predictor(folder, 1, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        model = Predictor(folder, 1)
    assert model.backend == "paddle" and "differed from the checked program" in model.description


@runs_in_inference_process
def test_a_request_that_cannot_be_met_names_the_remedy(exported: Exported, onnx_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictError, match=r"needs model.onnx, .* export it again: .* with --onnx"):
        Predictor(exported.folder, 1, backend="onnxruntime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_backend, "is_installed", lambda backend: False)
        with pytest.raises(PredictError, match="OpenVINO is not installed; install it with 'pip install openvino'"):
            Predictor(onnx_folder, 1, backend="openvino")
    folder = tmp_path / "model"
    shutil.copytree(onnx_folder, folder)
    with (folder / ONNX_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PredictError, match=r"model.onnx is damaged, or belongs to another export"):
        Predictor(folder, 1, backend="onnxruntime")
    assert Predictor(folder, 1).backend == "paddle"


def test_the_command_line_takes_a_backend(exported: Exported, onnx_folder: Path) -> None:
    image = exported.validation_images()[0]
    done = run_verb("predict", "--model", onnx_folder, "--backend", "onnxruntime", image, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime" in done.stderr and json.loads(done.stdout)["top"]
    done = run_verb("predict", "--model", exported.folder, "--backend", "openvino", image, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "OpenVINO needs model.onnx" in done.stderr


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
def test_export_compares_openvino_with_the_trained_model(onnx_folder: Path) -> None:
    comparison = read_spec(onnx_folder).comparisons[OPENVINO_CHECK]
    assert comparison.num_images == 30 and comparison.largest_difference <= comparison.bound == 1e-4


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
@runs_in_inference_process
def test_openvino_leaves_threads_on_the_cores_of_the_process(onnx_folder: Path) -> None:
    before = os.sched_getaffinity(0)
    model = Predictor(onnx_folder, 1, backend="openvino")
    model.logits(noise(2))
    threads = [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]
    assert os.sched_getaffinity(0) == before and all(affinity == before for affinity in threads)
    assert "openvino" in sys.modules
