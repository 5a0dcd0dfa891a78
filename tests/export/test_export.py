"""What `export` writes, in each precision and from each source, against the trained model and other programs."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import paddle
import pytest
from helpers.exported import Exported
from helpers.exported import in_inference_process as elsewhere
from helpers.exported import run_export as written
from helpers.models import KINDS, config_of, recording_model, without_recorder
from helpers.small import read_state

from vit_static.common import cpu
from vit_static.common.errors import PredictError, UserError
from vit_static.config.loader import load_config
from vit_static.config.schema import InitConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import open_set
from vit_static.export import onnx as onnx_export
from vit_static.export.exporter import BOUNDS, compare, export_checkpoint, num_hits, spread_over
from vit_static.export.inference_vit import InferenceModel
from vit_static.inference.artifact import MODEL_FILE, ONNX_FILE, SPEC_FILE, WEIGHTS_FILE, read_spec
from vit_static.inference.attention_maps import load_as_layer
from vit_static.inference.backends import open_session
from vit_static.inference.image_io import read_pixels
from vit_static.inference.predictor import Predictor
from vit_static.model.vit import VisionTransformer
from vit_static.weights.convert import convert_weights
from vit_static.weights.formats import read_weights
from vit_static.weights.load import init_from

bfloat16 = pytest.param("bfloat16", marks=pytest.mark.needs_bfloat16)


def answers(folder: Path, images: list[Path], precision: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and logits of a folder's model."""
    model = Predictor(folder, precision=precision)
    inputs = model.preprocess([read_pixels(path) for path in images])
    return inputs, model.logits(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inference_model_is_the_model(kind: str) -> None:
    """In float32 to rounding, in bfloat16's weights to bfloat16's."""
    model = recording_model(config_of(kind))
    plain = without_recorder(model, config_of(kind))
    images = paddle.to_tensor(np.random.default_rng(1).standard_normal((3, 3, 12, 16)).astype(np.float32))
    exported = InferenceModel(plain)
    with paddle.no_grad():
        logits, features = exported(images)
        np.testing.assert_allclose(features.numpy(), plain.features(images).numpy(), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(logits.numpy(), plain(images).numpy(), rtol=1e-4, atol=2e-5)
    names = {name for name, _ in exported.body.named_parameters()}
    assert {parameter.name for parameter in exported.parameters()} == names
    low = dict(InferenceModel(plain, "bfloat16").body.named_parameters())
    kinds = {name: parameter.dtype for name, parameter in low.items()}
    assert kinds["blocks.1.norm2.weight"] == paddle.float32 and kinds["blocks.1.attn.qkv.weight"] == paddle.bfloat16
    assert all((kind == paddle.float32) == ("norm" in name) for name, kind in kinds.items())


@pytest.mark.parametrize("precision", ["float32", bfloat16, "int8"])
def test_each_precision_answers_as_the_trained_model(exported: Exported, tmp_path: Path, precision: str) -> None:
    """By figures that the test finds by itself, and that `export` prints, too."""
    out = tmp_path / "model"
    said, error = elsewhere(written, exported.run, out, [f"export.precision={precision}"])
    assert error is None, error
    images = exported.validation_images()
    inputs, logits = elsewhere(answers, out, images)
    model = without_recorder(export_model(exported), read_spec(exported.folder).model)
    with paddle.no_grad():
        trained = model(paddle.to_tensor(inputs)).numpy()
    truth = np.array([int(path.parent.name) for path in images])
    largest = np.abs(logits - trained).max()
    found = re.search(r"\((\w+)\): largest difference .*: ([\d.e+-]+), over 30 .* \(bound ([\d.e+-]+)\)", said)
    assert found is not None and found[1] == precision
    assert float(found[2]) == pytest.approx(largest, rel=0.02, abs=2e-7) and largest <= float(found[3])
    assert (largest > 1e-4) == (precision != "float32")
    shares = [100.0 * float((scores.argmax(axis=1) == truth).mean()) for scores in (logits, trained)]
    assert f"top-1 {shares[0]:.2f} %, the trained model's {shares[1]:.2f} % (difference" in said
    card = read_spec(out)
    (comparison,) = card.comparisons.values()
    assert (comparison.top1_exported, comparison.top1_trained) == pytest.approx(tuple(shares))
    assert comparison.same_class == pytest.approx(100.0 * (logits.argmax(axis=1) == trained.argmax(axis=1)).mean())
    size = sum(record.num_bytes for name, record in card.files.items() if name in (WEIGHTS_FILE, ONNX_FILE))
    in_float32 = 4 * sum(value.size for value in read_state(exported.run / "model.pdparams").values())
    assert size < {"float32": 1.1, "bfloat16": 0.6, "int8": 1.2}[precision] * in_float32 + 50_000


def export_model(exported: Exported) -> Any:
    """The trained model, from its weights."""
    config = load_config(exported.run / "config.yaml")
    model = VisionTransformer(config.model)
    init_from(model, config.model, read_weights(exported.run / "model.pdparams"), "", InitConfig(head="keep"))
    return model


def test_the_onnx_file_in_onnx_runtime(exported: Exported, tmp_path: Path) -> None:
    said, error = elsewhere(with_onnx, exported.run, tmp_path / "model")
    assert error is None and "model.onnx (float32): largest difference" in said
    inputs, logits = elsewhere(answers, tmp_path / "model", exported.validation_images())
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / ONNX_FILE), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.shape, image.type) == ("images", ["batch", 3, 16, 32], "tensor(float)")
    assert [(one.name, one.shape[0]) for one in session.get_outputs()] == [("logits", "batch"), ("features", "batch")]
    for batch_size in (1, 7, 30):
        found, _ = session.run(None, {"images": inputs[:batch_size]})
        np.testing.assert_allclose(found, logits[:batch_size], atol=2e-5)


def with_onnx(run: Path, out: Path) -> tuple[str, str | None]:
    return written(run, out, [], onnx=True)


def test_several_sizes_are_a_folder_each(exported: Exported, tmp_path: Path) -> None:
    """Of the size that it was trained on the same logits; of another the positions are resampled."""
    out = tmp_path / "model"
    said, error = elsewhere(written, exported.run, out, ["export.image_sizes=[[16, 32], 24]"])
    assert error is None, error
    assert {path.name for path in out.iterdir()} == {"16x32", "24x24"} and said.count("top-1") == 2
    images = exported.validation_images()[:5]
    np.testing.assert_array_equal(
        elsewhere(answers, out / "16x32", images)[1], elsewhere(answers, exported.folder, images)[1]
    )
    assert elsewhere(answers, out / "24x24", images)[0].shape == (5, 3, 24, 24)
    with pytest.raises(PredictError, match="16x32, 24x24; name one"):
        read_spec(out)
    _, error = elsewhere(written, exported.run, out, ["export.image_sizes=[[16, 32], 20]"])
    assert error is not None and error.startswith("ConfigError") and "20" in error
    assert (out / "24x24" / SPEC_FILE).is_file()


def refused(run: Path, out: Path, precision: str, bounds: dict[str, float]) -> tuple[str, str | None]:
    """Where the bounds are others."""
    before = BOUNDS[precision]  # type: ignore[index]
    BOUNDS[precision] = replace(before, **bounds)  # type: ignore[index, arg-type]
    try:
        return written(run, out, [f"export.precision={precision}"])
    finally:
        BOUNDS[precision] = before  # type: ignore[index]


def test_past_its_bound_nothing_is_written(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    _, error = elsewhere(refused, exported.run, tmp_path / "model", "int8", {"logit": 1e-3})
    assert error is not None and error.startswith("ExportError: model.onnx: differs from the trained model")
    assert list((tmp_path / "model").iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["model"]


class Wrong(ImageDataset):
    """A set whose labels are all one class."""

    def __init__(self, images: ImageDataset, label: int) -> None:
        super().__init__(images.root, images.class_names)
        self.images, self.label = images, label

    def __len__(self) -> int:
        return len(self.images)

    def relative_name(self, number: int) -> str:
        return self.images.relative_name(number)

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images.read(number)[0], np.array([self.label], np.int32)

    def digest(self) -> str:
        raise NotImplementedError

    def exclude(self, names: Any) -> ImageDataset:
        raise NotImplementedError


def compared_with_another(run: Path, folder: Path) -> dict[str, Any]:
    """An export against a model that isn't the one that it is of."""
    config = load_config(run / "config.yaml")
    paddle.seed(3)
    other = VisionTransformer(config.model)
    other.head.weight.set_value(paddle.randn(other.head.weight.shape))
    other.eval()
    images = Wrong(open_set(config.data, "val", config.model.num_classes), 4)
    found = compare(other, read_spec(folder), folder, images, 20)
    return {name: one.model_dump() for name, one in found.items()}


def test_another_model_is_told_from_the_exported_one(exported: Exported) -> None:
    found = elsewhere(compared_with_another, exported.run, exported.folder)[MODEL_FILE]
    assert found["num_images"] == 20 and found["largest_difference"] > 1000 * found["bound"]
    assert found["same_class"] < 60.0 and found["top1_exported"] < 60.0


def test_images_are_spread_over_the_set() -> None:
    assert spread_over(10, None).tolist() == list(range(10)) == spread_over(10, 50).tolist()
    assert spread_over(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert num_hits(np.eye(3), [np.array([0]), np.array([2, 1]), np.array([1])]) == 2


@pytest.fixture(scope="module")
def weights(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same weights as files of other programs."""
    folder = tmp_path_factory.mktemp("weights")

    def make(name: str) -> Path:
        with redirect_stdout(io.StringIO()):
            options = {"to": None, "head": "keep", "image_size": None, "fold_layer_scale": False, "ema": False}
            convert_weights(None, exported.run, folder / name, [], **options)
        return folder / name

    return make


@pytest.mark.parametrize("source", ["checkpoint", "model.pdparams", "google.npz", "timm.safetensors"])
def test_from_every_source_the_same_bits(
    exported: Exported, weights: Callable[[str], Path], tmp_path: Path, source: str
) -> None:
    config = load_config(exported.run / "config.yaml")
    paths = {"checkpoint": exported.run / "checkpoints" / "latest", "model.pdparams": exported.run / "model.pdparams"}
    path = paths.get(source) or weights(source)
    _, error = elsewhere(written, path, tmp_path / "model", [], config)
    assert error is None, error
    assert (tmp_path / "model" / WEIGHTS_FILE).read_bytes() == (exported.folder / WEIGHTS_FILE).read_bytes()


def test_what_is_missing_is_said_before_anything_is_done(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    with pytest.raises(UserError, match="paddle2onnx is not installed"):
        onnx_export.check_installed()
    with pytest.raises(UserError, match="float16: needs a GPU"):
        export_checkpoint(None, exported.run, tmp_path / "model", ["export.precision=float16"])
    with pytest.raises(UserError, match=r"export\.pixels"):
        export_checkpoint(None, exported.run, tmp_path / "model", ["export.precision=int8", "export.pixels=true"])
    assert list(tmp_path.iterdir()) == []


def test_the_card_for_people(exported: Exported) -> None:
    text = (exported.folder / "MODEL_CARD.md").read_text()
    card = json.loads((exported.folder / SPEC_FILE).read_text())
    assert f"for {len(card['class_names'])} classes (zero, one," in text
    found = card["comparisons"][MODEL_FILE]
    assert f"| model.json | float32 | {found['top1_exported']:.2f} | {found['top1_trained']:.2f} |" in text
    assert "[B, 3, 16, 32] float32" in text
    num_parameters = sum(value.size for value in read_state(exported.run / "model.pdparams").values())
    assert f"{num_parameters / 1e6:.2f} million parameters" in text


@pytest.fixture(scope="module")
def int8_folder(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    assert elsewhere(written, exported.run, folder, ["export.precision=int8"])[1] is None
    return folder


@pytest.mark.cpu_isa
def test_a_precision_runs_in_what_it_can(exported: Exported, int8_folder: Path) -> None:
    images = exported.validation_images()[:3]
    with pytest.raises(PredictError, match=r"exported for int8, and does not run in float32; .*precision=float32"):
        elsewhere(answers, int8_folder, images, "float32")
    with pytest.raises(PredictError, match="int8 model gives no attention"):
        load_as_layer(int8_folder)


def int8_logits(folder: Path, images: np.ndarray, **options: Any) -> np.ndarray:
    """ONNX Runtime's, with options of a session; `graph_optimization_level` is one of its attributes."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        if name == "graph_optimization_level":
            settings.graph_optimization_level = value
        else:
            settings.add_session_config_entry(f"session.{name}", value)
    session = onnxruntime.InferenceSession(str(folder / ONNX_FILE), settings, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


@pytest.mark.cpu_isa
def test_int8_products_saturate_on_no_cpu(int8_folder: Path) -> None:
    """The same bits as by kernels that can't saturate, and to rounding as in float32 arithmetic."""
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 32)).astype(np.float32) * 3.0
    logits = int8_logits(int8_folder, images)
    np.testing.assert_array_equal(int8_logits(int8_folder, images, x64quantprecision="1"), logits)
    float_logits = int8_logits(
        int8_folder, images, graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    np.testing.assert_allclose(
        logits, float_logits, atol=0.05 * float_logits.std()
    )  # a value may round to its neighbour
    weights = [
        onnx.numpy_helper.to_array(initializer)
        for initializer in onnx.load(str(int8_folder / ONNX_FILE)).graph.initializer
    ]
    largest = max(
        int(np.abs(weight.astype(np.int32)).max()) for weight in weights if weight.dtype == np.int8 and weight.ndim == 2
    )
    assert largest == 64


@pytest.mark.cpu_isa
def test_an_earlier_int8_export_is_refused_where_its_products_saturate(
    int8_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its spec doesn't record the number of bits of its weights."""
    folder = shutil.copytree(int8_folder, tmp_path / "earlier")
    spec = json.loads((folder / SPEC_FILE).read_text())
    assert spec.pop("int8_weight_bits") == 7
    (folder / SPEC_FILE).write_text(json.dumps(spec))
    monkeypatch.setenv("VIT_STATIC_MAX_CPU_ISA", "avx2")
    open_session(int8_folder, 1)
    with pytest.raises(PredictError, match=r"earlier: an earlier version exported it with 8-bit weights, .*no VNNI.*"):
        open_session(folder, 1)
    monkeypatch.setattr(cpu, "cpu_has_vnni", lambda: True)
    open_session(folder, 1)
