"""The exported model at work: images in, classes out, through Paddle Inference; and the verb `predict`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import paddle
from paddle import inference
from PIL import Image
from pydantic import Field, ValidationError, model_validator

from vit_static import runtime
from vit_static.config import (
    CropRatio,
    DataConfig,
    EvalConfig,
    ImageSize,
    InferencePrecision,
    ModelConfig,
    Positive,
    Section,
    UserError,
    shortened,
)
from vit_static.data.images import IMAGE_SUFFIXES, MOST_PIXELS
from vit_static.data.pipeline import pixels_pipeline

_GPU_POOL_MB = 256
MODEL_FILE, WEIGHTS_FILE, CARD_FILE = "model.json", "model.pdiparams", "vit_static.json"


class PredictError(UserError):
    """A model folder that can't be used, or an image that can't be read."""


class Preprocessing(Section):
    """How a decoded image becomes the model's input; `eval` and `data` say what the keys mean."""

    image_size: ImageSize
    resize: Literal["short", "direct"]
    crop_ratio: CropRatio
    interpolation: Literal["bilinear", "bicubic"]
    antialias: bool
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class FileRecord(Section):
    """What a file is known by."""

    size: Annotated[int, Field(ge=0)]  # bytes
    sha256: str


class Card(Section):
    """The small file beside the exported model: what its input and its classes are, and what its files are known by.

    Paddle Inference trusts its files, and dies of a damaged one: none is given to it that isn't what was written.
    """

    class_names: list[str]
    preprocessing: Preprocessing
    activation: Literal["softmax", "sigmoid", "bce"]
    model: ModelConfig
    precision: InferencePrecision = "float32"
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _of_one_model(self) -> Card:
        if self.preprocessing.image_size != self.model.image_size:
            raise ValueError("its preprocessing and its model have other image sizes")
        if math.prod(self.model.image_size) > MOST_PIXELS:
            raise ValueError(f"its images have more than {MOST_PIXELS} pixels")
        if len(self.class_names) != self.model.num_classes:
            raise ValueError(f"it names {len(self.class_names)} classes, and its model has {self.model.num_classes}")
        return self


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
        try:
            logits = run_session(self._session, images)
        except (ValueError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "Error" in line] or [str(error)]
            raise PredictError(
                f"the model can't be run on images of {images.shape[2]}x{images.shape[3]}, which {CARD_FILE} has "
                f"({shortened(lines[0])}); {_REMEDY}"
            ) from None
        if logits.shape != (len(images), len(self.card.class_names)):
            raise PredictError(
                f"the model gives {list(logits.shape)} where its card, {CARD_FILE}, has {len(self.card.class_names)} "
                f"classes; {_REMEDY}"
            )
        return logits

    def probabilities(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays [height, width, 3] uint8 to probabilities [B, num_classes]: softmax, or sigmoid for that loss."""
        logits = self.logits(self.preprocess(pixels)).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number stays none
            if self.card.activation in ("sigmoid", "bce"):
                return 1.0 / (1.0 + np.exp(-logits))
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            return powers / powers.sum(axis=1, keepdims=True)

    def _pipeline(self, batch_size: int) -> Any:
        asked = self.card.preprocessing
        evaluation = EvalConfig(
            resize=asked.resize,
            crop_ratio=asked.crop_ratio,
            interpolation=asked.interpolation,
            antialias=asked.antialias,
        )
        data = DataConfig(mean=asked.mean, std=asked.std)
        return pixels_pipeline(batch_size, self._num_threads, asked.image_size, data, evaluation)


_REMEDY = "export it again: './run.sh export --checkpoint RUN --out DIR'"


def manifest(folder: Path) -> dict[str, FileRecord]:
    """What the files of an exported model are known by, for its card."""
    return {name: _record(folder / name) for name in (MODEL_FILE, WEIGHTS_FILE)}


def _record(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())


def read_card(folder: Path) -> Card:
    """Raises PredictError where a file is missing, isn't what `export` writes, or isn't what it wrote."""
    for name in (MODEL_FILE, WEIGHTS_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise PredictError(f"{folder / name}: no such file; --model takes a folder that './run.sh export' wrote")
    path = folder / CARD_FILE
    try:
        card = Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        if mistake["loc"] == ("files",) and mistake["type"] == "missing":
            raise PredictError(
                f"{path}: is of an older version's export, without the sizes and digests of its files; {_REMEDY}"
            ) from None
        place = shortened(".".join(map(str, mistake["loc"]))) or "it"
        said = shortened(mistake["msg"].removeprefix("Value error, "))
        raise PredictError(f"{path}: is not a card of an exported model ({place}: {said}); {_REMEDY}") from None
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if name not in card.files:
            raise PredictError(f"{path}: has no record of {name}; {_REMEDY}")
        if _record(folder / name) != card.files[name]:
            raise PredictError(
                f"{folder / name}: is damaged, or of another export than {CARD_FILE} beside it; copy the folder again, "
                f"or {_REMEDY}"
            )
    return card


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


# Pillow's others have no place in training, and one of them (EPS) starts a program.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")


def read_pixels(source: Path | BinaryIO, name: str = "") -> np.ndarray:
    """An image file as [height, width, 3] uint8, RGB. Raises PredictError, with its path or its `name`, where it can't
    be read.

    Grey, palette and CMYK are converted; transparency is left out, as the training's decoder does; 16-bit grey is
    scaled to 8, and fractions to 0-255. The orientation in a photo's EXIF data is not applied, as in training.
    """
    name = name or str(source)
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise PredictError(f"{name}: is no file")
        with Image.open(source, formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise PredictError(f"{name}: has {image.width}x{image.height} pixels, of {MOST_PIXELS} at most")
            if image.mode == "F":  # 0 to 1, as training's decoder takes it
                image = _grey(image, 255.0)
            elif image.mode.startswith("I"):
                image = _grey(image, 1.0 / 257.0)
            return np.asarray(image.convert("RGB"))
    except PredictError:
        raise
    except Exception as error:  # a broken image can raise anything
        reason = shortened(str(error), 150).removesuffix(f" {str(source)!r}") or type(error).__name__
        raise PredictError(f"{name}: can't be read as an image ({reason})") from None


def _grey(image: Image.Image, times: float) -> Image.Image:
    """In 8 bits, of other numbers; what is no number is black."""
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64) * times)
    return Image.fromarray(levels.clip(0.0, 255.0).round().astype(np.uint8))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files, and those in the folders (by name, with all folders in them). Raises PredictError for none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            named = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            inside = sorted(file for file in named if not file.is_dir())
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
    for batch in _read_ahead(find_images(paths), batch_size):
        good = [(path, pixels) for path, pixels in batch if isinstance(pixels, np.ndarray)]
        rows = iter(predictor.probabilities([pixels for _, pixels in good])) if good else iter(())
        for path, pixels in batch:
            if isinstance(pixels, PredictError):
                num_failed += 1
                print_line({"path": str(path), "error": str(pixels)})
                continue
            row = next(rows)
            if not np.isfinite(row).all():
                num_failed += 1
                said = f"{path}: the model gives no numbers for it; evaluate what was exported ('./run.sh eval')"
                print_line({"path": str(path), "error": said})
                continue
            best = np.argsort(-row, kind="stable")[:top_k]
            classes = [
                {"class": int(number), "name": names[number], "probability": round(float(row[number]), 6)}
                for number in best
            ]
            print_line({"path": str(path), "top": classes})
    sys.stdout.flush()
    if num_failed:
        print(f"vit_static: {num_failed} images have no classes; their lines say why", file=sys.stderr)
    return 2 if num_failed else 0


def print_line(content: dict[str, Any]) -> None:
    """A line of JSON. A file's name that is no text, which UTF-8 has no place for, comes by JSON's own escapes."""
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"))


def _read_ahead(paths: Sequence[Path], batch_size: int) -> Iterator[list[tuple[Path, np.ndarray | PredictError]]]:
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
