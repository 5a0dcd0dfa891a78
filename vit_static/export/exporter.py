"""Files for inference from a trained model, and the proof that they answer as it does; the verb `export`."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from paddle.static import InputSpec
from tqdm import tqdm

from vit_static.common.errors import ExportError, UserError
from vit_static.config.schema import Config, InferencePrecision
from vit_static.data.image_set import ImageDataset
from vit_static.data.open_set import open_set
from vit_static.export import model_card
from vit_static.export import onnx as onnx_export
from vit_static.export.inference_vit import InferenceModel
from vit_static.inference.artifact import (
    MODEL_CARD_FILE,
    MODEL_FILE,
    ONNX_FILE,
    PIXELS_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
    Comparison,
    ModelSpec,
    file_records,
    spec_of,
)
from vit_static.inference.backends import OnnxSession, PaddleSession, check_machine, has_gpu
from vit_static.inference.image_io import read_pixels
from vit_static.inference.predictor import Preprocessor, to_probabilities
from vit_static.model.variants import shape_of
from vit_static.model.vit import VisionTransformer
from vit_static.weights.load import load_into
from vit_static.weights.source import Weights, load_weights

_BATCH_SIZE = 16  # of images that are compared
_NUM_THREADS = 8  # that read and decode them


@dataclass(frozen=True)
class Bounds:
    """How much of a file of the export may differ from the trained model in float32."""

    logit: float  # the largest difference; of `of_spread` times the logits' standard deviation
    of_spread: bool
    top1: float  # per cent; an image more or less is never too much

    def of_logits(self, spread: float) -> float:
        return self.logit * (spread if self.of_spread else 1.0)

    def of_top1(self, num_images: int) -> float:
        return max(self.top1, 100.0 / num_images)


BOUNDS: dict[InferencePrecision, Bounds] = {
    "float32": Bounds(1e-4, False, 0.1),
    "bfloat16": Bounds(0.2, True, 0.5),
    "float16": Bounds(0.03, True, 0.2),
    "int8": Bounds(1.0, True, 1.0),
}
PIXELS_BOUND = 0.05  # of a probability: two programs' resampling may differ by a grey level


def export_checkpoint(
    config: Config | None,
    checkpoint: Path,
    out: Path,
    overrides: list[str],
    *,
    ema: bool = False,
    onnx: bool = False,
) -> None:
    """The verb: writes the config's files for inference and their cards into `out`, once all of them are checked."""
    loaded = load_weights(checkpoint, ema=ema)
    config = config or loaded.config_with(overrides)
    asked = config.export
    check_machine(asked.precision)
    if asked.precision == "int8" and asked.pixels:
        raise UserError("export.pixels: is a program of Paddle Inference, and int8 an ONNX file; leave one of them out")
    if onnx or asked.precision == "int8":
        onnx_export.check_installed()
    images = open_set(config.data, "val", config.model.num_classes)
    given, out = out, out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    if out.exists() and any(out.iterdir()) and not any(out.rglob(SPEC_FILE)):
        raise UserError(f"{out}: is not empty, and not an exported model; name another folder with --out")
    paddle.set_device("gpu" if has_gpu() and config.device != "cpu" else "cpu")
    sizes = asked.image_sizes or (config.model.image_size,)
    with _replacing(out) as part:
        for size in sizes:
            of_size = config.model_copy(update={"model": config.model.model_copy(update={"image_size": size})})
            name = f"{size[0]}x{size[1]}" if len(sizes) > 1 else ""
            _export(loaded, of_size, images, part / name, name, onnx=onnx)
    where = given / f"{sizes[0][0]}x{sizes[0][1]}" if len(sizes) > 1 else given
    names = ", ".join(path.name for path in sorted(where.iterdir()))
    print(f"{where}: {names}; './run.sh predict --model {where} IMAGE' uses them")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` if nothing fails."""
    part, before = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.before")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(before, ignore_errors=True)
        if out.exists():
            out.rename(before)
        part.rename(out)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _export(loaded: Weights, config: Config, images: ImageDataset, folder: Path, name: str, *, onnx: bool) -> None:
    """The files of one image size; `name` says which, if there are several."""
    model = VisionTransformer(config.model)
    load_into(model, config.model, loaded, config.init.pos_embed)
    model.eval()
    folder.mkdir(exist_ok=True)
    card = spec_of(config, loaded.class_names or images.class_names)
    chosen = spread_over(len(images), config.export.num_calibration_images)
    card = write(model, config, card, folder, (inputs for inputs, *_ in read(images, chosen, card)), onnx=onnx)
    comparisons = compare(model, card, folder, images, config.export.num_check_images)
    for file, found in comparisons.items():
        what = f"{name + '/' if name else ''}{file}"
        of = "a probability" if file == PIXELS_FILE else "a logit"
        print(
            f"{what} ({precision_of(file, card)}): largest difference of {of} from the trained model's: "
            f"{found.largest_difference:.2e}, over {found.num_images} validation images (bound {found.bound:.0e})"
        )
        difference = found.top1_exported - found.top1_trained
        allowed = BOUNDS[precision_of(file, card)].of_top1(found.num_images)
        print(
            f"{what}: top-1 {found.top1_exported:.2f} %, the trained model's {found.top1_trained:.2f} % "
            f"(difference {difference:+.2f}, bound {allowed:.2f}); the same class for {found.same_class:.2f} %",
            flush=True,
        )
        if not (found.largest_difference <= found.bound and abs(difference) <= allowed + 1e-9):
            raise ExportError(f"{what}: differs from the trained model: nothing was written")
    card = card.model_copy(update={"files": file_records(folder), "comparisons": comparisons})
    (folder / SPEC_FILE).write_text(card.model_dump_json(indent=1), encoding="utf-8")
    shape, num_parameters = shape_of(config.model), sum(p.size for p in model.parameters())
    card_text = model_card.model_card_text(card, config, str(loaded.source), shape, int(num_parameters))
    (folder / MODEL_CARD_FILE).write_text(card_text, encoding="utf-8")


def precision_of(file: str, card: ModelSpec) -> InferencePrecision:
    """What a file of an export computes in."""
    return "float32" if file == ONNX_FILE and card.precision != "int8" else card.precision


def write(
    model: VisionTransformer,
    config: Config,
    card: ModelSpec,
    folder: Path,
    calibration: Iterable[np.ndarray] = (),
    *,
    onnx: bool = False,
) -> ModelSpec:
    """Write the files of the config's precision, for any batch size, and the spec beside them, which is returned; with
    `onnx` a float32 ONNX file, too. `calibration`: for int8, batches of images [B, 3, height, width] float32."""
    if card.precision == "int8":
        with tempfile.TemporaryDirectory() as name:
            _save(model, card, "float32", Path(name))
            onnx_export.write_onnx(Path(name), Path(name) / ONNX_FILE)
            onnx_export.quantize(Path(name) / ONNX_FILE, folder / ONNX_FILE, calibration)
        card = card.model_copy(update={"int8_weight_bits": onnx_export.INT8_WEIGHT_BITS})
    else:
        _save(model, card, card.precision, folder, pixels=config.export.pixels)
        if onnx and card.precision == "float32":
            onnx_export.write_onnx(folder, folder / ONNX_FILE)
        elif onnx:
            with tempfile.TemporaryDirectory() as name:
                _save(model, card, "float32", Path(name))
                onnx_export.write_onnx(Path(name), folder / ONNX_FILE)
    card = card.model_copy(update={"files": file_records(folder)})
    (folder / SPEC_FILE).write_text(card.model_dump_json(indent=1), encoding="utf-8")
    return card


def _save(
    model: VisionTransformer, card: ModelSpec, dtype: InferencePrecision, folder: Path, *, pixels: bool = False
) -> None:
    """Paddle Inference's files of a model: model.json and model.pdiparams, and pixels.json of the same weights."""
    program = InferenceModel(model, dtype)
    program.eval()
    inputs = [InputSpec([None, 3, *card.model.image_size], "float32", "images")]
    paddle.jit.save(program, str(folder / MODEL_FILE.removesuffix(".json")), input_spec=inputs)
    if not pixels:
        return
    from vit_static.export.preprocess_layer import FromPixels

    whole = FromPixels(program, card.preprocessing, card.activation)
    whole.eval()
    inputs = [InputSpec([None, None, None, 3], "uint8", "pixels")]
    paddle.jit.save(whole, str(folder / PIXELS_FILE.removesuffix(".json")), input_spec=inputs)
    weights = (folder / PIXELS_FILE).with_suffix(".pdiparams")
    assert weights.read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    weights.unlink()


# -- the proof ---------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Of one file, what has been found so far."""

    largest: float = 0.0
    same: int = 0
    hits: int = 0

    def add(self, found: np.ndarray, trained: np.ndarray, labels: list[np.ndarray]) -> None:
        """Rows of logits or probabilities, and the trained model's."""
        difference = np.abs(found - trained)
        self.largest = max(self.largest, float(difference.max()) if np.isfinite(difference).all() else float("inf"))
        self.same += int((found.argmax(axis=1) == trained.argmax(axis=1)).sum())
        self.hits += num_hits(found, labels)


@dataclass
class _Trained:
    hits: int = 0
    num_images: int = 0
    variances: list[float] = field(default_factory=list)


def num_hits(scores: np.ndarray, labels: list[np.ndarray]) -> int:
    """Images whose likeliest class is one of their labels."""
    return sum(int(best) in own for best, own in zip(scores.argmax(axis=1), labels, strict=True))


def spread_over(num_images: int, most: int | None) -> np.ndarray:
    """The numbers of `most` images of a set, at even distances; None: of all."""
    return np.unique(np.linspace(0, num_images - 1, min(most or num_images, num_images)).round().astype(int))


def compare(
    model: VisionTransformer, card: ModelSpec, folder: Path, images: ImageDataset, num_images: int | None
) -> dict[str, Comparison]:
    """Runs the trained model, as a dynamic graph in float32, and each file of the folder on validation images."""
    num_threads = len(os.sched_getaffinity(0))
    sessions: dict[str, OnnxSession | PaddleSession] = {}
    if (folder / MODEL_FILE).exists():
        sessions[MODEL_FILE] = PaddleSession(
            folder / MODEL_FILE, folder / WEIGHTS_FILE, num_threads, precision=card.precision
        )
    if (folder / ONNX_FILE).exists():
        sessions[ONNX_FILE] = OnnxSession(folder / ONNX_FILE, num_threads)
    from_pixels = None
    if (folder / PIXELS_FILE).exists():
        from_pixels = PaddleSession(folder / PIXELS_FILE, folder / WEIGHTS_FILE, num_threads, precision=card.precision)
    tallies = {name: _Tally() for name in (*sessions, *([PIXELS_FILE] if from_pixels else []))}
    trained = _Trained()
    chosen = spread_over(len(images), num_images)
    with tqdm(total=len(chosen), unit="image", desc="checking", disable=not sys.stderr.isatty()) as bar:
        for inputs, pixels, labels in read(images, chosen, card):
            with paddle.no_grad():
                logits = model(paddle.to_tensor(inputs)).numpy()
            trained.hits += num_hits(logits, labels)
            trained.num_images += len(inputs)
            trained.variances.append(float(logits.var()))
            for name, session in sessions.items():
                tallies[name].add(session.run(inputs)[0], logits, labels)
            if from_pixels is not None:
                found = np.concatenate([from_pixels.outputs(one[None])[0].copy_to_cpu() for one in pixels])
                tallies[PIXELS_FILE].add(found, to_probabilities(logits, card.activation), labels)
            bar.update(len(inputs))
    spread = float(np.sqrt(np.mean(trained.variances)))
    return {
        name: Comparison(
            num_images=trained.num_images,
            largest_difference=tally.largest,
            bound=PIXELS_BOUND if name == PIXELS_FILE else BOUNDS[precision_of(name, card)].of_logits(spread),
            same_class=100.0 * tally.same / trained.num_images,
            top1_trained=100.0 * trained.hits / trained.num_images,
            top1_exported=100.0 * tally.hits / trained.num_images,
        )
        for name, tally in tallies.items()
    }


def read(
    images: ImageDataset, chosen: np.ndarray, card: ModelSpec
) -> Iterator[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]]:
    """A batch at a time: the model's inputs, the pixels that they are of, and the labels."""
    preprocess = Preprocessor(card.preprocessing, len(os.sched_getaffinity(0)))

    def one(number: int) -> tuple[np.ndarray, np.ndarray]:
        encoded, labels = images.read(number)
        return read_pixels(io.BytesIO(encoded.tobytes()), images.name(number)), labels

    with ThreadPoolExecutor(_NUM_THREADS) as readers:
        for numbers in np.array_split(chosen, max(-(-len(chosen) // _BATCH_SIZE), 1)):
            pixels, labels = zip(*readers.map(one, numbers.tolist()), strict=True)
            yield preprocess(pixels), list(pixels), list(labels)
