"""The verb `export`: files for inference, compared with the trained model before they are kept."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from paddle.static import InputSpec

from vit_static.common.errors import AtLeast, ExportError, UserError
from vit_static.common.io import fsync, remove_on_failure, write_errors, write_json
from vit_static.common.terminal import ProgressBar
from vit_static.common.text import print_line, print_text
from vit_static.config.schema import Config, InferencePrecision
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import count_classes, has_shards, open_set, split_path
from vit_static.export import onnx as onnx_export
from vit_static.export.calibrate import calibrate, needs_validation
from vit_static.export.card_parts import ClassTally
from vit_static.export.inference_vit import InferenceModel
from vit_static.export.model_card import model_card_text
from vit_static.export.preprocess_layer import FromPixels
from vit_static.inference.artifact import (
    MODEL_CARD_FILE,
    MODEL_FILE,
    ONNX_FILE,
    OPENVINO_CHECK,
    PIXELS_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
    Comparison,
    ModelSpec,
    file_records,
    spec_of,
)
from vit_static.inference.backends import (
    OnnxSession,
    OpenVinoProgram,
    OpenVinoSession,
    PaddleSession,
    Session,
    check_machine,
    has_gpu,
    is_installed,
)
from vit_static.inference.image_io import read_pixels
from vit_static.inference.predictor import Preprocessor
from vit_static.inference.probabilities import to_probabilities
from vit_static.model.variants import shape_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.infer import config_for
from vit_static.weights.load import load_into
from vit_static.weights.loaded import Weights
from vit_static.weights.source import WhichWeights, describe_choice, load_weights

_BATCH_SIZE = 16  # of the comparison
_NUM_DECODER_THREADS = 8


@dataclass(frozen=True)
class Bounds:
    """Largest allowed difference between an exported file and the trained model in float32."""

    logit: float  # in units of the logits' standard deviation if `is_relative`
    is_relative: bool
    top1: float  # per cent

    def logit_bound(self, logits_std: float, scale: float = 1.0) -> float:
        """Return the bound for a logit, given the deviation of all logits, and the factor of an absolute bound."""
        return self.logit * (logits_std if self.is_relative else scale)

    def top1_bound(self, num_images: int) -> float:
        """Return the bound for top-1 in per cent; a difference of one image is always accepted."""
        return max(self.top1, 100.0 / num_images)


BOUNDS: dict[InferencePrecision, Bounds] = {
    "float32": Bounds(1e-4, False, 0.1),
    "bfloat16": Bounds(0.2, True, 0.5),
    "float16": Bounds(0.03, True, 0.2),
    "int8": Bounds(1.0, True, 1.0),
}
PIXELS_BOUND = 0.05  # for a probability: the program's resampling may differ from DALI's by one grey level


def export_checkpoint(
    config: Config | None,
    checkpoint: Path,
    out: Path,
    overrides: list[str],
    *,
    ema: bool = False,
    which: WhichWeights = "best",
    onnx: bool = False,
) -> None:
    """Export a run, a checkpoint or a file of weights to the folder `out`, which is replaced only if nothing fails.

    `which` selects among the weights of a run's folder, `ema` the moving average of the weights, and `onnx` adds a
    float32 ONNX file. Raises UserError for a
    combination of options that can't be exported, and ExportError if a file differs from the trained model by more than
    its bound.
    """
    loaded = load_weights(checkpoint, ema=ema, which=which, overrides=overrides)
    choice = describe_choice(checkpoint, which)
    if choice is not None:
        print_line(choice, flush=True)
    config = config_for(config, loaded, overrides)
    precision = config.export.precision
    check_machine(precision)
    if precision == "int8" and config.export.pixels:
        raise UserError(
            "export.pixels=true: not available for int8, which is an ONNX file; set export.pixels=false, or another "
            "export.precision"
        )
    if onnx or precision == "int8":
        onnx_export.check_installed()
    images = _open_validation(config)
    given_out, out = out, out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    if out.exists() and any(out.iterdir()) and not any(out.rglob(SPEC_FILE)):
        raise UserError(f"{out}: is not empty, and not an exported model; name another folder with --out")
    paddle.set_device("gpu" if has_gpu() and config.device != "cpu" else "cpu")
    sizes = config.export.image_sizes or (config.model.image_size,)
    subfolders = [f"{height}x{width}" if len(sizes) > 1 else "" for height, width in sizes]
    with _replace_folder(out, _least_bytes(loaded, precision, len(sizes), onnx=onnx)) as unfinished:
        for size, subfolder in zip(sizes, subfolders, strict=True):
            resized = config.model_copy(update={"model": config.model.model_copy(update={"image_size": size})})
            _export_size(loaded, resized, images, unfinished / subfolder, subfolder, onnx=onnx)
    folder = given_out / subfolders[0]
    names = ", ".join(path.name for path in sorted(folder.iterdir()))
    print_line(f"{folder}: {names}; './run.sh predict --model {folder} IMAGE' uses them")


def _open_validation(config: Config) -> ImageDataset:
    """Open the validation images; for a model without a head, whatever their labels are."""
    num_classes = config.model.num_classes
    if num_classes == 0:
        is_counted = not has_shards(split_path(config.data, "val"))
        num_classes = count_classes(config.data, "val") if is_counted else 1
    return open_set(config.data, "val", num_classes)


def _least_bytes(loaded: Weights, precision: InferencePrecision, num_sizes: int, *, onnx: bool) -> AtLeast:
    """Return the size of the weights in all files of an export, without their graphs."""
    bytes_per_value = {"float32": 4, "int8": 1}.get(precision, 2) + (4 if onnx and precision != "int8" else 0)
    return AtLeast(num_sizes * bytes_per_value * sum(map(np.size, loaded.state.values())))


@contextmanager
def _replace_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a new folder that replaces `out` if the block doesn't raise. Raises WriteError for a full disk.

    `num_bytes`: the size of what is written.
    """
    unfinished, previous = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.before")
    shutil.rmtree(unfinished, ignore_errors=True)
    with remove_on_failure(unfinished), write_errors(out, num_bytes, unfinished):
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in (*unfinished.rglob("*"), unfinished):
            fsync(file)
        shutil.rmtree(previous, ignore_errors=True)
        if out.exists():
            out.rename(previous)
        try:
            unfinished.rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _export_size(
    loaded: Weights, config: Config, images: ImageDataset, folder: Path, subfolder: str, *, onnx: bool
) -> None:
    """Write and check the files for the config's image size; `subfolder` names the size if there are several."""
    model = VisionTransformer(config.model)
    load_into(model, config.model, loaded, config.init.pos_embed)
    model.eval()
    folder.mkdir(exist_ok=True)
    spec = spec_of(config, (loaded.class_names or images.class_names) if config.model.num_classes else [])
    indices = evenly_spaced(len(images), config.export.num_calibration_images)
    calibration = (inputs for inputs, *_ in read_batches(images, indices, spec))
    if needs_validation(config):
        spec, lines = calibrate(model, spec, config, read_batches(images, np.arange(len(images)), spec))
        print_text(lines, flush=True)
    spec = write_artifact(model, config, spec, folder, calibration, onnx=onnx)
    tally = ClassTally(spec, config)
    with without_tf32():
        comparisons = compare(model, spec, folder, images, config.export.num_check_images, tally)
    for name, comparison in comparisons.items():
        _check(comparison, str(Path(subfolder, name)), name, spec)
    spec = spec.model_copy(update={"files": file_records(folder), "comparisons": comparisons})
    write_json(spec.model_dump(mode="json"), folder / SPEC_FILE)
    shape, num_parameters = shape_of(config.model), sum(p.size for p in model.parameters())
    counts = tally.counts() if spec.class_names else None
    text = model_card_text(spec, config, loaded, shape, int(num_parameters), counts)
    (folder / MODEL_CARD_FILE).write_text(text, encoding="utf-8")


def _check(comparison: Comparison, path: str, name: str, spec: ModelSpec) -> None:
    """Print the comparison of the file `name`, shown as `path`. Raises ExportError if it exceeds its bounds."""
    precision = file_precision(name, spec)
    quantity = "a feature" if not spec.class_names else "a probability" if name == PIXELS_FILE else "a logit"
    print_line(
        f"{path} ({precision}): largest difference of {quantity} from the trained model's: "
        f"{comparison.largest_difference:.2e}, over {comparison.num_images} validation images "
        f"(bound {comparison.bound:.0e})",
        flush=True,
    )
    is_within = comparison.largest_difference <= comparison.bound
    if comparison.top1_exported is not None and comparison.top1_trained is not None:
        top1_difference = comparison.top1_exported - comparison.top1_trained
        top1_bound = BOUNDS[precision].top1_bound(comparison.num_images)
        print_line(
            f"{path}: top-1 {comparison.top1_exported:.2f} %, the trained model's {comparison.top1_trained:.2f} % "
            f"(difference {top1_difference:+.2f}, bound {top1_bound:.2f}); "
            f"the same class for {comparison.same_class:.2f} %",
            flush=True,
        )
        is_within = is_within and abs(top1_difference) <= top1_bound + 1e-9
    if not is_within:
        raise ExportError(f"{path}: differs from the trained model by more than its bound; nothing was written")


def file_precision(name: str, spec: ModelSpec) -> InferencePrecision:
    """Return the precision in which a file of the folder computes."""
    return "float32" if name in (ONNX_FILE, OPENVINO_CHECK) and spec.precision != "int8" else spec.precision


def write_artifact(
    model: VisionTransformer,
    config: Config,
    spec: ModelSpec,
    folder: Path,
    calibration: Iterable[np.ndarray] = (),
    *,
    onnx: bool = False,
) -> ModelSpec:
    """Write the model's files in the precision of `spec`, for any batch size, and the description with their records.

    Returns this description. `onnx` adds a float32 ONNX file. `calibration`, which int8 needs, are batches of
    preprocessed images [B, 3, height, width] float32.
    """
    if spec.precision == "int8":
        with tempfile.TemporaryDirectory() as temporary:
            _save(model, spec, "float32", Path(temporary))
            onnx_export.write_onnx(Path(temporary), Path(temporary) / ONNX_FILE, spec.model.gelu)
            onnx_export.quantize(Path(temporary) / ONNX_FILE, folder / ONNX_FILE, calibration)
        spec = spec.model_copy(update={"int8_weight_bits": onnx_export.INT8_WEIGHT_BITS})
    else:
        _save(model, spec, spec.precision, folder, pixels=config.export.pixels)
        if onnx and spec.precision == "float32":
            onnx_export.write_onnx(folder, folder / ONNX_FILE, spec.model.gelu)
        elif onnx:
            with tempfile.TemporaryDirectory() as temporary:
                _save(model, spec, "float32", Path(temporary))
                onnx_export.write_onnx(Path(temporary), folder / ONNX_FILE, spec.model.gelu)
    spec = spec.model_copy(update={"files": file_records(folder)})
    write_json(spec.model_dump(mode="json"), folder / SPEC_FILE)
    return spec


def _save(
    model: VisionTransformer, spec: ModelSpec, dtype: InferencePrecision, folder: Path, *, pixels: bool = False
) -> None:
    """Write model.json and model.pdiparams for Paddle Inference, and with `pixels` the program pixels.json."""
    program = InferenceModel(model, dtype)
    program.eval()
    inputs = [InputSpec([None, spec.model.num_channels, *spec.model.image_size], "float32", "images")]
    paddle.jit.save(program, str(folder / MODEL_FILE.removesuffix(".json")), input_spec=inputs)
    if not pixels:
        return
    pixels_program = FromPixels(program, spec.preprocessing, spec.activation)
    pixels_program.eval()
    inputs = [InputSpec([None, None, None, 3], "uint8", "pixels")]
    paddle.jit.save(pixels_program, str(folder / PIXELS_FILE.removesuffix(".json")), input_spec=inputs)
    weights = (folder / PIXELS_FILE).with_suffix(".pdiparams")
    assert weights.read_bytes() == (folder / WEIGHTS_FILE).read_bytes()  # so that one copy serves both programs
    weights.unlink()


# -- comparison with the trained model ---------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Comparison of one file so far."""

    max_difference: float = 0.0
    num_same_class: int = 0
    num_correct: int = 0

    def add(self, scores: np.ndarray, trained_scores: np.ndarray, labels: list[np.ndarray]) -> None:
        """Add the logits or probabilities of a batch, [B, num_classes], and the trained model's."""
        difference = np.abs(scores - trained_scores)
        is_finite = bool(np.isfinite(difference).all())
        self.max_difference = max(self.max_difference, float(difference.max()) if is_finite else float("inf"))
        self.num_same_class += int((scores.argmax(axis=1) == trained_scores.argmax(axis=1)).sum())
        self.num_correct += count_correct(scores, labels)


@dataclass
class _TrainedTally:
    """Results of the trained model so far."""

    num_images: int = 0
    num_correct: int = 0
    batch_variances: list[float] = field(default_factory=list)  # of the logits

    def add(self, logits: np.ndarray, labels: list[np.ndarray]) -> None:
        """Add the logits of a batch, [B, num_classes]."""
        self.num_images += len(logits)
        self.num_correct += count_correct(logits, labels)
        self.batch_variances.append(float(logits.var()))


def count_correct(scores: np.ndarray, labels: list[np.ndarray]) -> int:
    """Count the rows of `scores` [B, num_classes] whose most likely class is one of the image's labels."""
    return sum(int(best) in image_labels for best, image_labels in zip(scores.argmax(axis=1), labels, strict=True))


def evenly_spaced(num_images: int, max_images: int | None) -> np.ndarray:
    """Return at most `max_images` indices of a set's images, evenly spaced; without a maximum, all of them."""
    num_chosen = min(max_images or num_images, num_images)
    return np.unique(np.linspace(0, num_images - 1, num_chosen).round().astype(int))


def compare(
    model: VisionTransformer,
    spec: ModelSpec,
    folder: Path,
    images: ImageDataset,
    max_images: int | None,
    class_tally: ClassTally | None = None,
) -> dict[str, Comparison]:
    """Compare each file of the folder with the trained model, a dynamic graph in float32, on validation images.

    Returns the comparison of each file by its name. Without `max_images` all images are used. Of a model without a head
    the features are compared. `class_tally` gets the logits of the first file.
    """
    has_head = bool(spec.class_names)
    sessions = _open_sessions(folder, spec)
    tallies, first_name = {name: _Tally() for name in sessions}, next(iter(sessions))
    trained = _TrainedTally()
    indices = evenly_spaced(len(images), max_images)
    with ProgressBar(len(indices), "image", title="checking") as progress_bar:
        for inputs, pixels, labels in read_batches(images, indices, spec):
            with paddle.no_grad():
                logits = model(paddle.to_tensor(inputs)).numpy()
            trained.add(logits, labels)
            for name, session in sessions.items():
                if name == PIXELS_FILE:
                    assert isinstance(session, PaddleSession)
                    outputs = [session.outputs(image[None])[0].copy_to_cpu() for image in pixels]
                    trained_outputs = to_probabilities(logits, spec.activation) if has_head else logits
                    tallies[name].add(np.concatenate(outputs), trained_outputs, labels)
                else:
                    exported_logits, features = session.run(inputs, with_features=not has_head)
                    if class_tally is not None and has_head and name == first_name:
                        class_tally.add(exported_logits, labels)
                    tallies[name].add(exported_logits if features is None else features, logits, labels)
            progress_bar.update(len(inputs))
    logits_std = float(np.sqrt(np.mean(trained.batch_variances)))
    # A temperature below 1 enlarges the logits, and with them the differences.
    scale = 1.0 / min(spec.temperature, 1.0)
    bounds = {name: BOUNDS[file_precision(name, spec)].logit_bound(logits_std, scale) for name in tallies}
    return {
        name: Comparison(
            num_images=trained.num_images,
            largest_difference=tally.max_difference,
            bound=PIXELS_BOUND if name == PIXELS_FILE else bounds[name],
            same_class=100.0 * tally.num_same_class / trained.num_images if has_head else None,
            top1_trained=100.0 * trained.num_correct / trained.num_images if has_head else None,
            top1_exported=100.0 * tally.num_correct / trained.num_images if has_head else None,
        )
        for name, tally in tallies.items()
    }


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products in float32 within the context, in Paddle and in Paddle Inference.

    On a GPU, cuBLAS and cuDNN may round their factors to TF32's 10 bits, and the errors exceed float32's bound. Paddle
    reads these switches of the process before each product (3.3.1 starts with cuDNN's on and cuBLAS's off); with
    cuBLASLt it never allows TF32.
    """
    core = paddle.base.core
    switches = ((core.get_cublas_switch, core.set_cublas_switch), (core.get_cudnn_switch, core.set_cudnn_switch))
    previous = [get() for get, _ in switches]
    try:
        for _, set_switch in switches:
            set_switch(False)
        yield
    finally:
        for (_, set_switch), value in zip(switches, previous, strict=True):
            set_switch(value)


def _open_sessions(folder: Path, spec: ModelSpec) -> dict[str, Session]:
    """Open each program in the folder, by the name of its file; the ONNX file also in OpenVINO, where installed."""
    num_threads = len(os.sched_getaffinity(0))
    sessions: dict[str, Session] = {}
    for name in (MODEL_FILE, ONNX_FILE, PIXELS_FILE):
        if not (folder / name).exists():
            continue
        if name == ONNX_FILE:
            sessions[name] = OnnxSession(folder / name, num_threads)
            if is_installed("openvino"):
                sessions[OPENVINO_CHECK] = OpenVinoSession(OpenVinoProgram(folder / name, num_threads))
        else:
            sessions[name] = PaddleSession(folder / name, folder / WEIGHTS_FILE, num_threads, precision=spec.precision)
    return sessions


def read_batches(
    images: ImageDataset, indices: np.ndarray, spec: ModelSpec
) -> Iterator[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]]:
    """Yield batches of a set's images: the model's inputs [B, 3, height, width], the decoded pixels, and the labels."""
    preprocess = Preprocessor(spec.preprocessing, len(os.sched_getaffinity(0)))
    options = spec.preprocessing.to_decode_options()

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        encoded, labels = images.read(index)
        return read_pixels(io.BytesIO(encoded.data), options, images.name(index)), labels

    with ThreadPoolExecutor(_NUM_DECODER_THREADS) as decoders:
        for batch in np.array_split(indices, max(-(-len(indices) // _BATCH_SIZE), 1)):
            pixels, labels = zip(*decoders.map(read, batch.tolist()), strict=True)
            yield preprocess(pixels), list(pixels), list(labels)
