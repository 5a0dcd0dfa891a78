"""The exported model at work: images in, classes and features out, through Paddle Inference; and the verb `predict`.

    from vit_static import predict

    model = predict.load("exported")
    model(["cat.jpg", Image.open("dog.png"), frame])  # a Prediction each; the arrays [height, width, 3] uint8, RGB
    model.features(paths)  # [B, width]
    for prediction in model.stream(many_paths):  # reads ahead, a batch at a time, and goes on after a bad image
        ...

A Predictor is for any number of threads at once. It runs in the precision that the export was made and checked in: on
a card if there is one, else on the CPU with oneDNN, and in int8 with ONNX Runtime. OpenVINO's engine in Paddle's wheel
is of no use here: it takes programs of Paddle's old format alone, and given ours says that it is on and isn't loaded
(3.3.1: the same bits at the same speed). Nor is TensorRT offered: of programs of the new format Paddle makes its
engines in a step of its own (paddle.tensorrt), which needs TensorRT and a card.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from queue import LifoQueue
from typing import Any, BinaryIO, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import paddle
from PIL import Image, UnidentifiedImageError

from vit_static import model as model_module
from vit_static import runtime
from vit_static.config import DataConfig, InferencePrecision, shortened
from vit_static.data.images import IMAGE_SUFFIXES, MOST_PIXELS
from vit_static.data.pipeline import pixels_pipeline
from vit_static.files import write_atomically
from vit_static.formats import split_qkv
from vit_static.model_folder import CARD_FILE, MODEL_FILE, REMEDY, PredictError, Preprocessing, read_card
from vit_static.sessions import Session, open_session

# A file, a picture, or decoded pixels [height, width, 3] uint8, RGB
Picture = str | os.PathLike[str] | Image.Image | np.ndarray
OutputFormat = Literal["json", "csv", "table"]

_BATCH_SIZE = 32
_LONGEST_NAME = 24  # in the table
# Of the largest logit: what the order of float32's additions may change, and a card of another model does not.
_LARGEST_DIFFERENCE = 1e-3
# How many threads are at the model, or at the preprocessing, at once: one of them has all cores already, a second one
# does its copying meanwhile. Each has the weights for itself.
_NUM_SIDE_BY_SIDE = 2


@dataclass(frozen=True)
class Prediction:
    """An image's likeliest classes, the likeliest first; `features` [width] where they were asked for."""

    classes: list[int]
    names: list[str]
    probabilities: list[float]
    features: np.ndarray | None = None

    def top(self) -> list[dict[str, Any]]:
        """As `predict` and `serve` write it in JSON."""
        found = zip(self.classes, self.names, self.probabilities, strict=True)
        return [{"class": number, "name": name, "probability": round(share, 6)} for number, name, share in found]


_T = TypeVar("_T")


class _Pool(Generic[_T]):
    """Up to `size` of what one thread can use at a time, made when they are first needed."""

    def __init__(self, size: int, make: Callable[[], _T]) -> None:
        self._make = make
        self._free: LifoQueue[_T | None] = LifoQueue()  # the last one given back first, and None where one may be made
        for _ in range(size):
            self._free.put(None)

    @contextmanager
    def borrow(self) -> Iterator[_T]:
        """One of them, for this thread alone; waits for it. Where it fails another is made in its place."""
        one = self._free.get()
        try:
            one = self._make() if one is None else one
            yield one
        except BaseException:
            one = None
            raise
        finally:
            self._free.put(one)


class Preprocessor:
    """DALI's pipeline of one thread, made anew for a batch larger than any before."""

    def __init__(self, asked: Preprocessing, num_threads: int) -> None:
        self._image_size, self._num_threads = asked.image_size, num_threads
        self._data = DataConfig(mean=asked.mean, std=asked.std)
        self._evaluation = asked.as_evaluation()
        self._largest = 0

    def __call__(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        if len(pixels) > self._largest:
            self._largest = len(pixels)
            arguments = self._largest, self._num_threads, self._image_size, self._data, self._evaluation
            self._pipeline = pixels_pipeline(*arguments)
        (images,) = self._pipeline.run(pixels=list(pixels))
        return np.array(images.as_tensor())  # a copy: the next run writes in the same place


class Predictor:
    """An exported model and its preprocessing, for any number of threads at once."""

    def __init__(
        self,
        folder: Path,
        num_threads: int | None = None,
        onednn: bool = True,
        precision: InferencePrecision | None = None,
    ) -> None:
        """Raises PredictError where `folder` is not what `export` wrote. `precision` None: that of the export."""
        self.card = read_card(folder)
        threads = num_threads or len(os.sched_getaffinity(0))
        chosen = precision or self.card.precision
        self._sessions: _Pool[Session] = _Pool(
            _NUM_SIDE_BY_SIDE, lambda: open_session(folder, threads, onednn=onednn, precision=precision)
        )
        self._preprocessors = _Pool(_NUM_SIDE_BY_SIDE, lambda: Preprocessor(self.card.preprocessing, threads))
        with self._sessions.borrow() as session:  # so that it fails here, if it does
            place = session.place
        why = "as exported" if chosen == self.card.precision else f"exported for {self.card.precision}"
        self.description = f"{chosen} ({why}) on {place}"
        if chosen == "float32" and runtime.cpu_has_bfloat16() and place.startswith("the CPU"):
            self.description += "; bfloat16, which this CPU multiplies, is quicker: --precision bfloat16"

    def __call__(self, images: Sequence[Picture], top_k: int = 5) -> list[Prediction]:
        """The `top_k` likeliest classes of each image. Raises PredictError, with its name, for one that can't be
        read."""
        found = []
        for prediction in self.stream(images, top_k):
            if isinstance(prediction, PredictError):
                raise prediction
            found.append(prediction)
        return found

    def stream(
        self, images: Iterable[Picture], top_k: int = 5, batch_size: int = _BATCH_SIZE, *, with_features: bool = False
    ) -> Iterator[Prediction | PredictError]:
        """The same of any number of images, in their order; of one that can't be read the reason. The next batch is
        read and preprocessed while one is predicted."""
        for inputs, problems in batches(images, batch_size, self.preprocess):
            rows: Iterator[Prediction | PredictError] = iter(())
            if len(inputs):
                logits, features = self.run(inputs, with_features=with_features)
                rows = iter(self.predictions(logits, top_k, features))
            for problem in problems:
                yield next(rows) if problem is None else problem

    def probabilities(self, images: Sequence[Picture]) -> np.ndarray:
        """[B, num_classes] float64: softmax, or sigmoid for that loss. Raises PredictError as a call does."""
        return probabilities_of(self._all(images, with_features=False)[0], self.card.activation)

    def features(self, images: Sequence[Picture]) -> np.ndarray:
        """[B, width] float32: the pooled state after the last norm, which the head reads (`VisionTransformer.features`;
        2 * width of cls_gap). Raises PredictError as a call does."""
        found = self._all(images, with_features=True)[1]
        assert found is not None
        return found

    def predictions(
        self, logits: np.ndarray, top_k: int, features: np.ndarray | None = None
    ) -> list[Prediction | PredictError]:
        """What `logits` [B, num_classes] say, with the rows of `features` if there are any; of those that are no
        numbers, that."""
        found: list[Prediction | PredictError] = []
        for number, row in enumerate(probabilities_of(logits, self.card.activation)):
            if not np.isfinite(row).all():
                found.append(PredictError("the model gives no numbers; evaluate what was exported ('./run.sh eval')"))
                continue
            classes = np.argsort(-row, kind="stable")[:top_k].tolist()
            names = [self.card.class_names[one] for one in classes]
            own = None if features is None else features[number]
            found.append(Prediction(classes, names, row[classes].tolist(), own))
        return found

    def preprocess(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays [height, width, 3] uint8, each of its own size, to the model's input [B, 3, height, width]."""
        with self._preprocessors.borrow() as preprocessor:
            return preprocessor(pixels)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """The model's input [B, 3, height, width] float32 to logits [B, num_classes], for any B."""
        return self.run(inputs)[0]

    def run(self, inputs: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """The model's input to logits and, asked for, features [B, width]; both float32. Raises PredictError where the
        program isn't what its card says."""
        with self._sessions.borrow() as session:
            try:
                logits, features = session.run(np.asarray(inputs, np.float32), with_features=with_features)
            except (ValueError, RuntimeError) as error:
                lines = [line.strip() for line in str(error).splitlines() if "Error" in line] or [str(error)]
                raise PredictError(
                    f"the model can't be run on images of {inputs.shape[2]}x{inputs.shape[3]}, which {CARD_FILE} has "
                    f"({shortened(lines[0])}); {REMEDY}"
                ) from None
            if logits.shape != (len(inputs), len(self.card.class_names)):
                raise PredictError(
                    f"the model gives {list(logits.shape)} where its card, {CARD_FILE}, has "
                    f"{len(self.card.class_names)} classes; {REMEDY}"
                )
            return logits, features

    def _all(self, images: Sequence[Picture], *, with_features: bool) -> tuple[np.ndarray, np.ndarray | None]:
        parts = []
        for inputs, problems in batches(images, _BATCH_SIZE, self.preprocess):
            for problem in problems:
                if problem is not None:
                    raise problem
            parts.append(self.run(inputs, with_features=with_features))
        if not parts:
            raise PredictError("no images were given")
        logits, features = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(features) if with_features else None


def batches(
    images: Iterable[Picture], batch_size: int, preprocess: Callable[[Sequence[np.ndarray]], np.ndarray]
) -> Iterator[tuple[np.ndarray, list[PredictError | None]]]:
    """Inputs [B, 3, height, width] of the images that can be read, and of each image why it can't; the next batch
    ahead."""

    def read(image: Picture) -> np.ndarray | PredictError:
        try:
            return to_pixels(image)
        except PredictError as error:
            return error

    def prepare(batch: list[Picture]) -> tuple[np.ndarray, list[PredictError | None]]:
        found = list(readers.map(read, batch))
        good = [pixels for pixels in found if isinstance(pixels, np.ndarray)]
        inputs = preprocess(good) if good else np.empty(0, np.float32)
        return inputs, [one if isinstance(one, PredictError) else None for one in found]

    remaining = iter(images)
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor() as readers:
        coming: Future[tuple[np.ndarray, list[PredictError | None]]] | None = None
        while batch := list(islice(remaining, batch_size)):
            following = ahead.submit(prepare, batch)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def probabilities_of(logits: np.ndarray, activation: str) -> np.ndarray:
    """Logits [B, num_classes] to probabilities, float64: softmax, or sigmoid for that loss."""
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number stays none
        if activation in ("sigmoid", "bce"):
            return 1.0 / (1.0 + np.exp(-logits))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def load(
    folder: str | os.PathLike[str], *, precision: InferencePrecision | None = None, num_threads: int | None = None
) -> Predictor:
    """The model in a folder that `export` wrote, in the precision that it was exported for, on all cores that this
    process may use, unless others are asked for; `description` says what was chosen. Raises PredictError for another
    folder, or a precision that this machine has not."""
    return Predictor(Path(folder), num_threads, precision=precision)


def load_model(
    folder: Path, attention: model_module.AttentionFunction = model_module.flash_attention
) -> model_module.VisionTransformer:
    """The exported model as a layer of Paddle's, in float32, to look into. Raises PredictError for a folder that an
    earlier version exported, whose parameters have no names."""
    card = read_card(folder)
    if card.precision == "int8":
        raise PredictError(f"{folder}: int8 can't be looked into; use the run that it is of, or a float32 export")
    model = model_module.build(card.model, attention)
    # Paddle puts a number behind each name that it loads.
    program = paddle.jit.load(str(folder / MODEL_FILE.removesuffix(".json")))
    found = {one.name.rpartition("_")[0]: one.astype("float32").numpy() for one in program.parameters()}
    state = split_qkv(found)
    for name, parameter in model.named_parameters():
        if name not in state or list(state[name].shape) != parameter.shape:
            raise PredictError(f"{folder}: has no parameter {name} {parameter.shape}; export the model again")
        parameter.set_value(state[name])
    model.eval()
    if card.precision != "float32":  # whose program this process may not be able to run
        return model
    program.eval()
    size = card.model.image_size
    noise = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32))
    with paddle.no_grad():
        ours, theirs = model(noise).numpy(), program(noise)[0].numpy()
    if not np.abs(ours - theirs).max() <= _LARGEST_DIFFERENCE * np.abs(theirs).max():
        raise PredictError(f"{folder}: its program doesn't compute what its card says; export the model again")
    return model


def to_pixels(image: Picture) -> np.ndarray:
    """Any picture as [height, width, 3] uint8, RGB. Raises PredictError, with its name, for one that is none."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PredictError(f"an array of {image.dtype} {list(image.shape)}: must be uint8 [height, width, 3]")
        return np.ascontiguousarray(image)  # DALI takes no part of another array
    return _rgb(image) if isinstance(image, Image.Image) else read_pixels(Path(image))


# Pillow's others have no place in training, and one of them (EPS) starts a program.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")


def read_pixels(
    source: Path | BinaryIO, name: str = "", *, formats: tuple[str, ...] = _FORMATS, max_pixels: int = MOST_PIXELS
) -> np.ndarray:
    """An image file as [height, width, 3] uint8, RGB. Raises PredictError, with its path or its `name`, where it can't
    be read, is of none of Pillow's `formats` (None: any), or has more than `max_pixels`.

    Grey, palette and CMYK are converted; transparency is left out, as the training's decoder does; 16-bit grey is
    scaled to 8, and fractions to 0-255. The orientation in a photo's EXIF data is not applied, as in training.
    """
    name = name or str(source)
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise PredictError(f"{name}: is no file")
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:  # before they are decoded
                raise PredictError(f"{name}: has {image.width}x{image.height} pixels, of {max_pixels} at most")
            return _rgb(image)
    except PredictError:
        raise
    except UnidentifiedImageError:
        raise PredictError(f"{name}: can't be read as an image (of no known format)") from None
    except Exception as error:  # a broken image can raise anything
        reason = shortened(str(error), 150).removesuffix(f" {str(source)!r}") or type(error).__name__
        raise PredictError(f"{name}: can't be read as an image ({reason})") from None


def _grey(image: Image.Image, times: float) -> Image.Image:
    """In 8 bits, of other numbers; what is no number is black."""
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.nan_to_num(np.asarray(image).astype(np.float64) * times)
    return Image.fromarray(levels.clip(0.0, 255.0).round().astype(np.uint8))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":  # 0 to 1, as training's decoder takes it
        image = _grey(image, 255.0)
    elif image.mode.startswith("I"):
        image = _grey(image, 1.0 / 257.0)
    return np.asarray(image.convert("RGB"))


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


def listed_on(stream: BinaryIO) -> Iterator[Path]:
    """Paths from a stream, one a line; blank lines are passed over."""
    for line in stream:
        path = line.rstrip(b"\r\n")
        if path.strip():
            yield Path(os.fsdecode(path))


def run(
    folder: Path,
    paths: Sequence[Path],
    top_k: int,
    batch_size: int,
    output_format: OutputFormat = "json",
    features: Path | None = None,
    precision: InferencePrecision | None = None,
) -> int:
    """The verb: a line an image on stdout; `-` among the paths stands for a list of paths on stdin.

    An image that can't be read gets a line that says why, and exit code 2 at the end; the others are still done.
    `features`: a .npy file to write, [number of lines, width] float32, whose rows are NaN where the line has an error.
    """
    if top_k < 1 or batch_size < 1:
        raise PredictError("--top-k and --batch-size must be at least 1")
    predictor = load(folder, precision=precision)
    top_k = min(top_k, len(predictor.card.class_names))
    given = [listed_on(sys.stdin.buffer) if path == Path("-") else iter(find_images([path])) for path in paths]
    say(f"{folder}: {predictor.description}")
    # A path that is no UTF-8 has a surrogate; in JSON it is then its escape, too.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if output_format == "csv":
        print(
            _csv_row(
                "path", "error", *(f"{key}_{k + 1}" for k in range(top_k) for key in ("class", "name", "probability"))
            )
        )
    to_line = _LINES[output_format]
    columns = _Columns(top_k, min(max(map(len, predictor.card.class_names)), _LONGEST_NAME))
    num_failed = 0
    for path, prediction in _predicted(predictor, chain.from_iterable(given), top_k, batch_size, features):
        num_failed += isinstance(prediction, PredictError)
        print(to_line(str(path), prediction, columns))
    sys.stdout.flush()
    if num_failed:
        nan = f", their rows in {features} are NaN" if features else ""
        say(f"{num_failed} images have no classes; their lines say why{nan}")
    return 2 if num_failed else 0


def say(text: str) -> None:
    """On stderr, beside the answers."""
    print(f"vit_static: {text}", file=sys.stderr, flush=True)


def _predicted(
    predictor: Predictor, paths: Iterator[Path], top_k: int, batch_size: int, features: Path | None
) -> Iterator[tuple[Path, Prediction | PredictError]]:
    """Each path and what is found of it; writes the features beside, a row each."""
    seen: deque[Path] = deque()

    def remembered() -> Iterator[Path]:
        for path in paths:
            seen.append(path)
            yield path

    found = predictor.stream(remembered(), top_k, batch_size, with_features=features is not None)
    if features is None:
        for prediction in found:
            yield seen.popleft(), prediction
        return
    shape = model_module.shape_of(predictor.card.model)
    width = shape.num_pooled * shape.width
    with append_rows(features, width) as write_row:
        for prediction in found:
            own = prediction.features if isinstance(prediction, Prediction) else None
            write_row(np.full(width, np.nan, np.float32) if own is None else own)
            yield seen.popleft(), prediction


@contextmanager
def append_rows(path: Path, width: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A .npy file [number of rows, `width`] float32, written a row at a time: none of it is held in memory."""
    num_rows = 0

    def header() -> bytes:
        written = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(written, shape)
        return written.getvalue()

    with write_atomically(path) as temporary, temporary.open("wb") as file:
        begin = header()  # NumPy leaves room in it for the first axis to grow

        def write_row(row: np.ndarray) -> None:
            nonlocal num_rows
            file.write(row.astype("<f4").tobytes())
            num_rows += 1

        file.write(begin)
        yield write_row
        file.seek(0)
        assert len(header()) == len(begin)
        file.write(header())


class _Columns(NamedTuple):
    """What the lines of a run have in common: classes an image, and the characters of a name in the table."""

    top_k: int
    name_width: int


def _json_line(path: str, found: Prediction | PredictError, columns: _Columns) -> str:
    if isinstance(found, PredictError):
        return json.dumps({"path": path, "error": str(found)}, ensure_ascii=False)
    return json.dumps({"path": path, "top": found.top()}, ensure_ascii=False)


def _csv_line(path: str, found: Prediction | PredictError, columns: _Columns) -> str:
    if isinstance(found, PredictError):
        return _csv_row(path, str(found), *[""] * (3 * columns.top_k))
    return _csv_row(path, "", *(value for entry in found.top() for value in entry.values()))


def _csv_row(*values: object) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="").writerow(values)
    return written.getvalue()


def _table_line(path: str, found: Prediction | PredictError, columns: _Columns) -> str:
    if isinstance(found, PredictError):
        return f"{'':7}  {found}"
    width = columns.name_width
    classes = [
        f"{share:7.2%}  {name if len(name) <= width else name[: width - 1] + '…':{width}}"
        for name, share in zip(found.names, found.probabilities, strict=True)
    ]
    return "  ".join([*classes, path])


_LINES: dict[OutputFormat, Callable[[str, Prediction | PredictError, _Columns], str]] = {
    "json": _json_line,
    "csv": _csv_line,
    "table": _table_line,
}
