"""Exported files, in each precision and from each source, against the trained model and other programs."""

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
import yaml
from helpers.exported import Exported, in_inference_process, predict, run_export
from helpers.models import KINDS, config_of, recording_model, without_recorder
from helpers.sets import UPRIGHT_ON_WHITE
from helpers.small import read_state
from sklearn.metrics import precision_recall_fscore_support

from vit_static.common import cpu
from vit_static.common.errors import PredictError, UserError
from vit_static.config.loader import load_config
from vit_static.config.schema import InitConfig
from vit_static.data.image_set import ImageDataset
from vit_static.data.list_file import Labels
from vit_static.data.open_set import open_set
from vit_static.export import onnx as onnx_export
from vit_static.export.exporter import BOUNDS, compare, count_correct, evenly_spaced, export_checkpoint
from vit_static.export.inference_vit import InferenceModel
from vit_static.export.model_card import code_span
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
int8 = pytest.param("int8", marks=pytest.mark.needs_paddle2onnx)


def inputs_and_logits(
    folder: Path, images: list[Path], precision: Any = None, backend: Any = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Preprocess images for an exported model, and return its input and logits."""
    model = Predictor(folder, precision=precision, backend=backend)
    inputs = model.preprocess([read_pixels(path, UPRIGHT_ON_WHITE) for path in images])
    return inputs, model.logits(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inference_model_computes_what_the_model_does(kind: str) -> None:
    """Up to rounding in float32; in bfloat16 the types of the weights are checked."""
    model = recording_model(config_of(kind))
    plain = without_recorder(model, config_of(kind))
    images = paddle.to_tensor(np.random.default_rng(1).standard_normal((3, 3, 12, 16)).astype(np.float32))
    exported = InferenceModel(plain)
    with paddle.no_grad():
        logits, features = exported(images)
        np.testing.assert_allclose(features.numpy(), plain.features(images).numpy(), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(logits.numpy(), plain(images).numpy(), rtol=1e-4, atol=2e-5)
    names = {name for name, _ in exported.backbone.named_parameters()}
    assert {parameter.name for parameter in exported.parameters()} == names
    low_precision = dict(InferenceModel(plain, "bfloat16").backbone.named_parameters())
    dtypes = {name: parameter.dtype for name, parameter in low_precision.items()}
    assert dtypes["blocks.1.norm2.weight"] == paddle.float32 and dtypes["blocks.1.attn.qkv.weight"] == paddle.bfloat16
    assert all((dtype == paddle.float32) == ("norm" in name or ".rope." in name) for name, dtype in dtypes.items())
    rope = plain.blocks[1].attn.rope
    if rope is not None:  # its tables aren't rounded
        exact = dict(rope.named_buffers())
        tables = dict(InferenceModel(plain, "bfloat16").backbone.blocks[1].attn.rope.named_buffers())
        assert all(np.array_equal(table.numpy(), exact[name].numpy()) for name, table in tables.items())


@pytest.mark.parametrize("precision", ["float32", bfloat16, int8])
def test_each_precision_agrees_with_the_trained_model(exported: Exported, tmp_path: Path, precision: str) -> None:
    """The test computes the differences and accuracies, and compares them with those that `export` prints."""
    out = tmp_path / "model"
    output, error = in_inference_process(run_export, exported.run, out, [f"export.precision={precision}"])
    assert error is None, error
    images = exported.validation_images()
    inputs, logits = in_inference_process(inputs_and_logits, out, images)
    model = without_recorder(trained_model(exported), read_spec(exported.folder).model)
    with paddle.no_grad():
        trained = model(paddle.to_tensor(inputs)).numpy()
    truth = np.array([int(path.parent.name) for path in images])
    max_difference = np.abs(logits - trained).max()
    match = re.search(r"\((\w+)\): largest difference .*: ([\d.e+-]+), over 30 .* \(bound ([\d.e+-]+)\)", output)
    assert match is not None and match[1] == precision
    assert float(match[2]) == pytest.approx(max_difference, rel=0.02, abs=2e-7) and max_difference <= float(match[3])
    assert (max_difference > 1e-4) == (precision != "float32")
    top1 = [100.0 * float((scores.argmax(axis=1) == truth).mean()) for scores in (logits, trained)]
    assert f"top-1 {top1[0]:.2f} %, the trained model's {top1[1]:.2f} % (difference" in output
    spec = read_spec(out)
    (comparison,) = spec.comparisons.values()
    assert (comparison.top1_exported, comparison.top1_trained) == pytest.approx(tuple(top1))
    assert comparison.same_class == pytest.approx(100.0 * (logits.argmax(axis=1) == trained.argmax(axis=1)).mean())
    size = sum(record.num_bytes for name, record in spec.files.items() if name in (WEIGHTS_FILE, ONNX_FILE))
    float32_size = 4 * sum(value.size for value in read_state(exported.run / "model.pdparams").values())
    assert size < {"float32": 1.1, "bfloat16": 0.6, "int8": 1.2}[precision] * float32_size + 50_000


def trained_model(exported: Exported) -> Any:
    """Build the trained model from its weights."""
    config = load_config(exported.run / "config.yaml")
    model = VisionTransformer(config.model)
    init_from(model, config.model, read_weights(exported.run / "model.pdparams"), "", InitConfig(head="keep"))
    return model


@pytest.mark.needs_paddle2onnx
def test_onnx_runtime_agrees_with_paddle_inference(exported: Exported, tmp_path: Path) -> None:
    output, error = in_inference_process(export_with_onnx, exported.run, tmp_path / "model")
    assert error is None and "model.onnx (float32): largest difference" in output
    arguments = tmp_path / "model", exported.validation_images(), None, "paddle"
    inputs, logits = in_inference_process(inputs_and_logits, *arguments)
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / ONNX_FILE), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.shape, image.type) == ("images", ["batch", 3, 16, 32], "tensor(float)")
    outputs = [(output.name, output.shape[0]) for output in session.get_outputs()]
    assert outputs == [("logits", "batch"), ("features", "batch")]
    for batch_size in (1, 7, 30):
        onnx_logits, _ = session.run(None, {"images": inputs[:batch_size]})
        np.testing.assert_allclose(onnx_logits, logits[:batch_size], atol=2e-5)


def export_with_onnx(run: Path, out: Path) -> tuple[str, str | None]:
    return run_export(run, out, [], onnx=True)


def test_each_image_size_has_its_folder(exported: Exported, tmp_path: Path) -> None:
    """The training's size gives the same logits; for another size the position embedding is resampled."""
    out = tmp_path / "model"
    output, error = in_inference_process(run_export, exported.run, out, ["export.image_sizes=[[16, 32], 24]"])
    assert error is None, error
    assert {path.name for path in out.iterdir()} == {"16x32", "24x24"} and output.count(": top-1") == 2
    images = exported.validation_images()[:5]
    np.testing.assert_array_equal(
        in_inference_process(inputs_and_logits, out / "16x32", images)[1],
        in_inference_process(inputs_and_logits, exported.folder, images)[1],
    )
    assert in_inference_process(inputs_and_logits, out / "24x24", images)[0].shape == (5, 3, 24, 24)
    with pytest.raises(PredictError, match="one model per image size; name one of them: 16x32, 24x24"):
        read_spec(out)
    _, error = in_inference_process(run_export, exported.run, out, ["export.image_sizes=[[16, 32], 20]"])
    assert error is not None and error.startswith("ConfigError") and "20" in error
    assert (out / "24x24" / SPEC_FILE).is_file()


def export_with_bounds(run: Path, out: Path, precision: str, bounds: dict[str, float]) -> tuple[str, str | None]:
    """Export with some of the precision's bounds changed."""
    before = BOUNDS[precision]
    BOUNDS[precision] = replace(before, **bounds)
    try:
        return run_export(run, out, [f"export.precision={precision}"])
    finally:
        BOUNDS[precision] = before


@pytest.mark.needs_paddle2onnx
def test_beyond_its_bound_nothing_is_written(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    _, error = in_inference_process(export_with_bounds, exported.run, tmp_path / "model", "int8", {"logit": 1e-3})
    assert error is not None and error.startswith("ExportError: model.onnx: differs from the trained model")
    assert list((tmp_path / "model").iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["model"]


class WrongLabels(ImageDataset):
    """Another set's images, all with the same label."""

    def __init__(self, images: ImageDataset, label: int) -> None:
        super().__init__(images.root, images.class_names)
        self.images, self.label = images, label

    def __len__(self) -> int:
        return len(self.images)

    def relative_name(self, index: int) -> str:
        return self.images.relative_name(index)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.images.read(index)[0], np.array([self.label], np.int32)

    def labels(self) -> Labels:
        raise NotImplementedError

    def digest(self) -> str:
        raise NotImplementedError

    def exclude(self, names: Any) -> ImageDataset:
        raise NotImplementedError


def compare_with_another_model(run: Path, folder: Path) -> dict[str, Any]:
    """Compare an export with a model of other weights, on images with wrong labels."""
    config = load_config(run / "config.yaml")
    paddle.seed(3)
    other = VisionTransformer(config.model)
    other.head.weight.set_value(paddle.randn(other.head.weight.shape))
    other.eval()
    images = WrongLabels(open_set(config.data, "val", config.model.num_classes), 4)
    comparisons = compare(other, read_spec(folder), folder, images, 20)
    return {name: comparison.model_dump() for name, comparison in comparisons.items()}


def test_the_comparison_detects_another_model(exported: Exported) -> None:
    comparison = in_inference_process(compare_with_another_model, exported.run, exported.folder)[MODEL_FILE]
    assert comparison["num_images"] == 20 and comparison["largest_difference"] > 1000 * comparison["bound"]
    assert comparison["same_class"] < 60.0 and comparison["top1_exported"] < 60.0


def test_images_are_evenly_spaced_and_correct_ones_counted() -> None:
    assert evenly_spaced(10, None).tolist() == list(range(10)) == evenly_spaced(10, 50).tolist()
    assert evenly_spaced(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert count_correct(np.eye(3), [np.array([0]), np.array([2, 1]), np.array([1])]) == 2


@pytest.fixture(scope="module")
def weights(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that converts the trained weights to a file of another format."""
    folder = tmp_path_factory.mktemp("weights")

    def convert(name: str) -> Path:
        with redirect_stdout(io.StringIO()):
            options = {"to": None, "head": "keep", "image_size": None, "fold_layer_scale": False, "ema": False}
            convert_weights(None, exported.run, folder / name, [], **options)
        return folder / name

    return convert


@pytest.mark.parametrize("source", ["checkpoint", "model.pdparams", "google.npz", "timm.safetensors"])
def test_every_source_gives_the_same_bits(
    exported: Exported, weights: Callable[[str], Path], tmp_path: Path, source: str
) -> None:
    config = load_config(exported.run / "config.yaml")
    paths = {"checkpoint": exported.run / "checkpoints" / "latest", "model.pdparams": exported.run / "model.pdparams"}
    path = paths.get(source) or weights(source)
    _, error = in_inference_process(run_export, path, tmp_path / "model", [], config)
    assert error is None, error
    assert (tmp_path / "model" / WEIGHTS_FILE).read_bytes() == (exported.folder / WEIGHTS_FILE).read_bytes()


def test_unavailable_options_are_refused_before_anything_is_written(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    for python, reason in (((3, 12), "is not installed"), ((3, 13), r"has no build for Python 3\.13")):
        with monkeypatch.context() as patched, pytest.raises(UserError, match=f"paddle2onnx {reason}"):
            patched.setattr(sys, "version_info", python)
            onnx_export.check_installed()
    with pytest.raises(UserError, match="float16: needs a GPU"):
        export_checkpoint(None, exported.run, tmp_path / "model", ["export.precision=float16"])
    with pytest.raises(UserError, match=r"export\.pixels"):
        export_checkpoint(None, exported.run, tmp_path / "model", ["export.precision=int8", "export.pixels=true"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "span"),
    [("out/my_run", "`out/my_run`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("", "`  `"), ("a\n*b*", "`a\\n*b*`")],
)
def test_text_as_a_code_span(text: str, span: str) -> None:
    """By CommonMark 0.31, section 6.1."""
    assert code_span(text) == span


def test_the_model_card(exported: Exported) -> None:
    text = (exported.folder / "MODEL_CARD.md").read_text()
    spec = json.loads((exported.folder / SPEC_FILE).read_text())
    assert f"for {len(spec['class_names'])} classes (zero, one," in text
    comparison = spec["comparisons"][MODEL_FILE]
    assert f"| model.json | float32 | {comparison['top1_exported']:.2f} | {comparison['top1_trained']:.2f} |" in text
    assert "[B, 3, 16, 32] float32" in text
    num_parameters = sum(value.size for value in read_state(exported.run / "model.pdparams").values())
    assert f"{num_parameters / 1e6:.2f} million parameters" in text
    assert "| `optim.lr` | 0.003 |" in text and "## Limits" in text
    assert not re.search(r"`[^`|\n]*\\[^`|\n]*`", text)  # in code spans nothing is escaped

    paths = exported.validation_images()
    classes = sorted({path.parent.name for path in paths})
    labels = [classes.index(path.parent.name) for path in paths]
    predicted = [prediction.classes[0] for prediction in in_inference_process(predict, exported.folder, paths)]
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, zero_division=0)
    for label, name in enumerate(spec["class_names"]):
        values = (100 * values[label] for values in (precision, recall, f1))
        assert f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} | {support[label]} |" in text

    header = yaml.safe_load(text.split("---\n")[1])
    assert (header["license"], header["pipeline_tag"]) == ("unknown", "image-classification")
    (model,) = header["model-index"]
    assert model["name"] == "tiny"
    metrics = {metric["type"]: metric["value"] for metric in model["results"][0]["metrics"]}
    assert metrics == {
        "accuracy": pytest.approx(np.mean(np.equal(labels, predicted)), abs=1e-4),
        "f1": pytest.approx(np.mean(f1), abs=1e-4),
    }


@pytest.fixture(scope="module")
def int8_folder(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    assert in_inference_process(run_export, exported.run, folder, ["export.precision=int8"])[1] is None
    return folder


@pytest.mark.cpu_isa
@pytest.mark.needs_paddle2onnx
def test_an_int8_export_is_refused_in_another_precision(exported: Exported, int8_folder: Path) -> None:
    images = exported.validation_images()[:3]
    with pytest.raises(PredictError, match=r"exported for int8, and does not run in float32; .*precision=float32"):
        in_inference_process(inputs_and_logits, int8_folder, images, "float32")
    with pytest.raises(PredictError, match="int8 model gives no attention"):
        load_as_layer(int8_folder)


def int8_logits(folder: Path, images: np.ndarray, **options: Any) -> np.ndarray:
    """Return ONNX Runtime's logits with options of a session; `graph_optimization_level` is one of its attributes."""
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
@pytest.mark.needs_paddle2onnx
def test_int8_products_saturate_on_no_cpu(int8_folder: Path) -> None:
    """Kernels that can't saturate give the same bits, and float32 arithmetic the same values up to rounding."""
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 32)).astype(np.float32) * 3.0
    logits = int8_logits(int8_folder, images)
    np.testing.assert_array_equal(int8_logits(int8_folder, images, x64quantprecision="1"), logits)
    unoptimized = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # dequantises, and multiplies in float32
    float_logits = int8_logits(int8_folder, images, graph_optimization_level=unoptimized)
    tolerance = 0.05 * float_logits.std()  # a quantised activation may be rounded to the next integer
    np.testing.assert_allclose(logits, float_logits, atol=tolerance)
    initializers = onnx.load(str(int8_folder / ONNX_FILE)).graph.initializer
    arrays = [onnx.numpy_helper.to_array(initializer) for initializer in initializers]
    weights = [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]
    assert max(int(np.abs(weight.astype(np.int32)).max()) for weight in weights) == 64


@pytest.mark.cpu_isa
@pytest.mark.needs_paddle2onnx
def test_an_earlier_int8_export_is_refused_where_its_products_saturate(
    int8_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its description doesn't record the number of bits of its weights."""
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
