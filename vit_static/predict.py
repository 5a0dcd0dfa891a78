"""The exported model at work: images in, classes and features out, through Paddle Inference; and the verb `predict`.

    from vit_static import predict

    model = predict.load("exported")
    model(["cat.jpg", Image.open("dog.png"), frame])  # a Prediction each; the arrays [height, width, 3] uint8, RGB
    model.features(paths)  # [B, width]
    for prediction in model.stream(many_paths):  # reads ahead, a batch at a time, and goes on after a bad image
        ...

A Predictor is for any number of threads at once. It runs in the precision that the export was made and checked in, on
the CPU with oneDNN. OpenVINO's engine in Paddle's wheel is of no use here: it takes programs of Paddle's old format
alone, and given ours says that it is on and isn't loaded (3.3.1: the same bits at the same speed).
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
from paddle import inference
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from vit_static import cpu_kernels, runtime
from vit_static import model as model_module
from vit_static.config import DataConfig, EvalConfig, ImageSize, InferencePrecision, ModelConfig, Section, UserError
from vit_static.data.images import IMAGE_SUFFIXES
from vit_static.data.pipeline import pixels_pipeline
from vit_static.files import write_atomically

# A file, a picture, or decoded pixels [height, width, 3] uint8, RGB
Picture = str | os.PathLike[str] | Image.Image | np.ndarray
OutputFormat = Literal["json", "csv", "table"]

_GPU_POOL_MB = 256
_BATCH_SIZE = 32
_LONGEST_NAME = 24  # in the table
# Resized so that the short side fits, a line of pixels would be a picture of gigabytes.
_LARGEST_ASPECT = 100
# How many threads are at the model, or at the preprocessing, at once: one of them has all cores already, a second one
# does its copying meanwhile. Each has the weights for itself.
# Of the largest logit: what the order of float32's additions may change, and a card of another model does not.
_LARGEST_DIFFERENCE = 1e-3
_NUM_SIDE_BY_SIDE = 2
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

    def as_evaluation(self) -> EvalConfig:
        return EvalConfig(
            resize=self.resize,
            crop_ratio=self.crop_ratio,
            interpolation=self.interpolation,
            antialias=self.antialias,
        )


class Card(Section):
    """The small file beside the exported model: what its input and its classes are."""

    class_names: list[str]
    preprocessing: Preprocessing
    activation: str
    model: ModelConfig
    precision: InferencePrecision = "float32"


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
        self._sessions = _Pool(_NUM_SIDE_BY_SIDE, lambda: open_session(folder, threads, onednn, chosen))
        self._preprocessors = _Pool(_NUM_SIDE_BY_SIDE, lambda: Preprocessor(self.card.preprocessing, threads))
        with self._sessions.borrow() as session:  # so that it fails here, if it does
            self.has_features = len(session.get_output_names()) > 1
        why = "as exported" if chosen == self.card.precision else f"exported for {self.card.precision}"
        place = (
            "card 0" if chosen == "float16" else f"the CPU, {'oneDNN' if onednn else 'no oneDNN'}, {threads} threads"
        )
        self.description = f"{chosen} ({why}) on {place}"

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
        if with_features:
            self.check_features()
        for inputs, problems in batches(images, batch_size, self.preprocess):
            rows: Iterator[Prediction] = iter(())
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
        2 * width of cls_gap). Raises PredictError as a call does, and for an export without them."""
        self.check_features()
        found = self._all(images, with_features=True)[1]
        assert found is not None
        return found

    def predictions(self, logits: np.ndarray, top_k: int, features: np.ndarray | None = None) -> list[Prediction]:
        """What `logits` [B, num_classes] say, with the rows of `features` if there are any."""
        found = []
        for number, row in enumerate(probabilities_of(logits, self.card.activation)):
            classes = np.argsort(-row, kind="stable")[:top_k].tolist()
            names = [self.card.class_names[one] for one in classes]
            own = None if features is None else features[number]
            found.append(Prediction(classes, names, row[classes].tolist(), own))
        return found

    def check_features(self) -> None:
        if not self.has_features:
            raise PredictError("the model was exported without features, by an earlier version; export it again")

    def preprocess(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays [height, width, 3] uint8, each of its own size, to the model's input [B, 3, height, width]."""
        with self._preprocessors.borrow() as preprocessor:
            return preprocessor(pixels)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """The model's input [B, 3, height, width] float32 to logits [B, num_classes], for any B."""
        return self.run(inputs)[0]

    def run(self, inputs: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """The model's input to logits and, asked for, features [B, width]; both float32."""
        with self._sessions.borrow() as session:
            logits = run_session(session, inputs)
            return logits, read_output(session, 1) if with_features else None

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
    config = read_card(folder).model
    model = model_module.build(config, attention)
    program = paddle.jit.load(str(folder / "model"))
    # Paddle puts a number behind each name that it loads.
    loaded = program.parameters()
    found = {parameter.name.rpartition("_")[0]: parameter for parameter in loaded}
    for name, parameter in model.named_parameters():
        if name not in found or found[name].shape != parameter.shape:
            raise PredictError(f"{folder}: has no parameter {name} {list(parameter.shape)}; export the model again")
        parameter.set_value(found[name])
    model.eval()
    program.eval()
    noise = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 3, *config.image_size)).astype(np.float32))
    with paddle.no_grad():
        ours, theirs = model(noise).numpy(), program(noise)[0].numpy()
    if not np.abs(ours - theirs).max() <= _LARGEST_DIFFERENCE * np.abs(theirs).max():
        raise PredictError(f"{folder}: its program doesn't compute what its card says; export the model again")
    return model


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
    if cpu_kernels.has_operators():
        raise PredictError(f"{folder}: can't be opened in a process that has trained; open it in one of its own")
    config = inference.Config(str(folder / MODEL_FILE), str(folder / WEIGHTS_FILE))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(num_threads)
    if precision == "float16":
        if not paddle.is_compiled_with_cuda():
            raise PredictError("float16: needs a card and the GPU build of Paddle; --precision float32 does without")
        config.enable_use_gpu(_GPU_POOL_MB, 0, inference.PrecisionType.Half)
    elif onednn:
        config.enable_mkldnn()
    else:
        config.disable_mkldnn()
    if precision == "bfloat16":
        if not runtime.cpu_has_bfloat16():
            raise PredictError("bfloat16: this CPU doesn't multiply it; --precision float32 does without")
        config.enable_mkldnn_bfloat16()
    return inference.create_predictor(config)


def run_session(session: Any, images: np.ndarray) -> np.ndarray:
    """One batch through a Paddle Inference predictor: its first output."""
    handle = session.get_input_handle(session.get_input_names()[0])
    handle.reshape(images.shape)
    handle.copy_from_cpu(np.ascontiguousarray(images, np.float32))
    session.run()
    return read_output(session, 0)


def read_output(session: Any, number: int) -> np.ndarray:
    """Of what `run_session` has run."""
    return session.get_output_handle(session.get_output_names()[number]).copy_to_cpu()


def to_pixels(image: Picture) -> np.ndarray:
    """Any picture as [height, width, 3] uint8, RGB. Raises PredictError, with its name, for one that is none."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise PredictError(f"an array of {image.dtype} {list(image.shape)}: must be uint8 [height, width, 3]")
        pixels, name = image, "an array"
    elif isinstance(image, Image.Image):
        pixels, name = _rgb(image), "a picture"
    else:
        pixels, name = read_pixels(Path(image)), str(image)
    check_aspect(pixels, name)
    return pixels


def check_aspect(pixels: np.ndarray, name: str) -> None:
    """Raises PredictError for pixels that can't be resized in reasonable time and memory."""
    height, width = pixels.shape[:2]
    if min(height, width) < 1 or max(height, width) > _LARGEST_ASPECT * min(height, width):
        raise PredictError(f"{name}: {height} x {width} pixels, more than {_LARGEST_ASPECT} times as long as broad")


def read_pixels(
    source: Path | BinaryIO, name: str = "", *, formats: tuple[str, ...] | None = None, max_pixels: float = float("inf")
) -> np.ndarray:
    """An image file as [height, width, 3] uint8, RGB. Raises PredictError, with its path or its `name`, where it can't
    be read, is of none of Pillow's `formats` (None: any), or has more than `max_pixels`.

    Grey, palette and CMYK are converted; transparency is left out, as the training's decoder does; 16-bit grey is
    scaled to 8. The orientation in a photo's EXIF data is not applied, as in training.
    """
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:  # before they are decoded
                raise ValueError(f"{image.height} x {image.width} pixels are more than {max_pixels:.0f}")
            return _rgb(image)
    except UnidentifiedImageError:
        raise PredictError(f"{name or source}: can't be read as an image (of no known format)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PredictError(f"{name or source}: can't be read as an image ({error})") from None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float64) / 257.0).clip(0, 255).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


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
        say(f"{num_failed} images could not be read; their lines say why{nan}")
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
