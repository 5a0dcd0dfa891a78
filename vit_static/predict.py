"""The exported model at work: images in, classes out, through Paddle Inference; and the verb `predict`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import paddle
from paddle import inference
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from vit_static import runtime
from vit_static.config import DataConfig, EvalConfig, ImageSize, InferencePrecision, ModelConfig, Section, UserError
from vit_static.data.images import IMAGE_SUFFIXES
from vit_static.data.pipeline import pixels_pipeline

_GPU_POOL_MB = 256
MODEL_FILE, WEIGHTS_FILE, CARD_FILE = "model.json", "model.pdiparams", "vit_static.json"


class PredictError(UserError):
    """A model folder that can't be used, or an image that can't be read."""


class Preprocessing(Section):
    """How a decoded image becomes the model's input; `eval` and `data` say what the keys mean."""

    image_size: ImageSize
    resize: Literal["short", "direct"]
    crop_ratio: float
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Card(Section):
    """The small file beside the exported model: what its input and its classes are."""

    class_names: list[str]
    preprocessing: Preprocessing
    activation: str
    model: ModelConfig
    precision: InferencePrecision = "float32"


class Predictor:
    """An exported model and its preprocessing. Not for use from several threads at once."""

    def __init__(
        self,
        folder: Path,
        num_threads: int | None = None,
        onednn: bool = True,
        precision: InferencePrecision | None = None,
    ) -> None:
        """Raises PredictError where `folder` is not what `export` wrote. `precision` None: that of the export."""
        self.card = read_card(folder)
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._session = open_session(folder, self._num_threads, onednn, precision or self.card.precision)
        self._pipelines: dict[int, Any] = {}

    def preprocess(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays [height, width, 3] uint8, each of its own size, to the model's input [B, 3, height, width]."""
        if len(pixels) not in self._pipelines:
            self._pipelines = {len(pixels): self._pipeline(len(pixels))}
        (images,) = self._pipelines[len(pixels)].run(pixels=list(pixels))
        return np.asarray(images.as_tensor())

    def logits(self, images: np.ndarray) -> np.ndarray:
        """The model's input [B, 3, height, width] float32 to logits [B, num_classes], for any B."""
        return run_session(self._session, images)

    def probabilities(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays [height, width, 3] uint8 to probabilities [B, num_classes]: softmax, or sigmoid for that loss."""
        return probabilities_of(self.logits(self.preprocess(pixels)), self.card.activation)

    def _pipeline(self, batch_size: int) -> Any:
        return preprocessing_pipeline(self.card.preprocessing, batch_size, self._num_threads)


def probabilities_of(logits: np.ndarray, activation: str) -> np.ndarray:
    """Logits [B, num_classes] to probabilities, float64: softmax, or sigmoid for that loss."""
    logits = logits.astype(np.float64)
    if activation in ("sigmoid", "bce"):
        return 1.0 / (1.0 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def preprocessing_pipeline(asked: Preprocessing, batch_size: int, num_threads: int) -> Any:
    """DALI's pipeline of up to `batch_size` images that are decoded already (`pixels_pipeline`)."""
    evaluation = EvalConfig(
        resize=asked.resize,
        crop_ratio=asked.crop_ratio,
        interpolation=asked.interpolation,
        antialias=asked.antialias,
    )
    data = DataConfig(mean=asked.mean, std=asked.std)
    return pixels_pipeline(batch_size, num_threads, asked.image_size, data, evaluation)


def read_card(folder: Path) -> Card:
    """Raises PredictError where a file is missing or isn't what `export` writes."""
    for name in (MODEL_FILE, WEIGHTS_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise PredictError(f"{folder / name}: no such file; --model takes a folder that './run.sh export' wrote")
    try:
        return Card.model_validate_json((folder / CARD_FILE).read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise PredictError(f"{folder / CARD_FILE}: is not a card of an exported model ({first_line})") from None


def open_session(folder: Path, num_threads: int, onednn: bool = True, precision: InferencePrecision = "float32") -> Any:
    """A Paddle Inference predictor of the folder's model: on the CPU, in float16 on a card.

    Inputs, outputs and the files' weights are float32 in every precision, which is what operators compute in. Raises
    PredictError for a precision that this machine has not.
    """
    config = inference.Config(str(folder / MODEL_FILE), str(folder / WEIGHTS_FILE))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(num_threads)
    if precision == "float16":
        if not paddle.is_compiled_with_cuda():
            raise PredictError("float16: needs a card and the GPU build of Paddle; set export.precision=bfloat16")
        config.enable_use_gpu(_GPU_POOL_MB, 0, inference.PrecisionType.Half)
    elif onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()
    if precision == "bfloat16":
        if not runtime.cpu_has_bfloat16():
            raise PredictError("bfloat16: this CPU doesn't multiply it; set export.precision=float32")
        config.enable_mkldnn_bfloat16()
    return inference.create_predictor(config)


def run_session(session: Any, images: np.ndarray) -> np.ndarray:
    """One batch through a Paddle Inference predictor."""
    handle = session.get_input_handle(session.get_input_names()[0])
    handle.reshape(images.shape)
    handle.copy_from_cpu(np.ascontiguousarray(images, np.float32))
    session.run()
    return session.get_output_handle(session.get_output_names()[0]).copy_to_cpu()


def read_pixels(source: Path | BinaryIO, name: str = "") -> np.ndarray:
    """An image file as [height, width, 3] uint8, RGB. Raises PredictError, with its path or its `name`, where it can't
    be read.

    Grey, palette and CMYK are converted; transparency is left out, as the training's decoder does; 16-bit grey is
    scaled to 8. The orientation in a photo's EXIF data is not applied, as in training.
    """
    try:
        with Image.open(source) as image:
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.float64) / 257.0).clip(0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise PredictError(f"{name or source}: can't be read as an image ({error})") from None


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files, and those in the folders (by name, with all folders in them). Raises PredictError for none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise PredictError(f"{path}: has no images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise PredictError(f"{path}: no such file or folder")
    return found


def run(folder: Path, paths: Sequence[Path], top_k: int, batch_size: int) -> int:
    """The verb: a JSON line an image on stdout. An image that can't be read gets a line with `error` and exit code 2
    at the end; the others are still done."""
    if top_k < 1 or batch_size < 1:
        raise PredictError("--top-k and --batch-size must be at least 1")
    predictor = Predictor(folder)
    names = predictor.card.class_names
    num_failed = 0
    for batch in read_ahead(find_images(paths), batch_size):
        good = [(path, pixels) for path, pixels in batch if isinstance(pixels, np.ndarray)]
        rows = iter(predictor.probabilities([pixels for _, pixels in good])) if good else iter(())
        for path, pixels in batch:
            if isinstance(pixels, PredictError):
                num_failed += 1
                print(json.dumps({"path": str(path), "error": str(pixels)}))
                continue
            row = next(rows)
            best = np.argsort(-row, kind="stable")[:top_k]
            classes = [
                {"class": int(number), "name": names[number], "probability": round(float(row[number]), 6)}
                for number in best
            ]
            print(json.dumps({"path": str(path), "top": classes}, ensure_ascii=False))
    sys.stdout.flush()
    if num_failed:
        print(f"vit_static: {num_failed} images could not be read; their lines say why", file=sys.stderr)
    return 2 if num_failed else 0


def read_ahead(paths: Sequence[Path], batch_size: int) -> Iterator[list[tuple[Path, np.ndarray | PredictError]]]:
    """Batches of files with their pixels, or why there are none; the next batch is read while one is used."""

    def read(path: Path) -> tuple[Path, np.ndarray | PredictError]:
        try:
            return path, read_pixels(path)
        except PredictError as error:
            return path, error

    remaining = iter(paths)
    with ThreadPoolExecutor() as readers:
        coming = [readers.submit(read, path) for path in islice(remaining, batch_size)]
        while coming:
            following = [readers.submit(read, path) for path in islice(remaining, batch_size)]
            yield [future.result() for future in coming]
            coming = following
