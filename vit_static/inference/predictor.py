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

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import LifoQueue
from typing import Any, Generic, TypeVar

import numpy as np

from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import PredictError, truncate
from vit_static.config.schema import DataConfig, InferencePrecision
from vit_static.data.dali_pipeline import preprocessing_pipeline
from vit_static.inference.artifact import REMEDY, SPEC_FILE, Preprocessing, read_spec
from vit_static.inference.backends import Session, open_session
from vit_static.inference.image_io import ImageLike, to_pixels

_BATCH_SIZE = 32
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
            self._pipeline = preprocessing_pipeline(*arguments)
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
        self.card = read_spec(folder)
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
        if chosen == "float32" and cpu_has_bfloat16() and place.startswith("the CPU"):
            self.description += "; bfloat16, which this CPU multiplies, is quicker: --precision bfloat16"

    def __call__(self, images: Sequence[ImageLike], top_k: int = 5) -> list[Prediction]:
        """The `top_k` likeliest classes of each image. Raises PredictError, with its name, for one that can't be
        read."""
        found = []
        for prediction in self.stream(images, top_k):
            if isinstance(prediction, PredictError):
                raise prediction
            found.append(prediction)
        return found

    def stream(
        self, images: Iterable[ImageLike], top_k: int = 5, batch_size: int = _BATCH_SIZE, *, with_features: bool = False
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

    def probabilities(self, images: Sequence[ImageLike]) -> np.ndarray:
        """[B, num_classes] float64: softmax, or sigmoid for that loss. Raises PredictError as a call does."""
        return probabilities_of(self._all(images, with_features=False)[0], self.card.activation)

    def features(self, images: Sequence[ImageLike]) -> np.ndarray:
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
                    f"the model can't be run on images of {inputs.shape[2]}x{inputs.shape[3]}, which {SPEC_FILE} has "
                    f"({truncate(lines[0])}); {REMEDY}"
                ) from None
            if logits.shape != (len(inputs), len(self.card.class_names)):
                raise PredictError(
                    f"the model gives {list(logits.shape)} where its card, {SPEC_FILE}, has "
                    f"{len(self.card.class_names)} classes; {REMEDY}"
                )
            return logits, features

    def _all(self, images: Sequence[ImageLike], *, with_features: bool) -> tuple[np.ndarray, np.ndarray | None]:
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
    images: Iterable[ImageLike], batch_size: int, preprocess: Callable[[Sequence[np.ndarray]], np.ndarray]
) -> Iterator[tuple[np.ndarray, list[PredictError | None]]]:
    """Inputs [B, 3, height, width] of the images that can be read, and of each image why it can't; the next batch
    ahead."""

    def read(image: ImageLike) -> np.ndarray | PredictError:
        try:
            return to_pixels(image)
        except PredictError as error:
            return error

    def prepare(batch: list[ImageLike]) -> tuple[np.ndarray, list[PredictError | None]]:
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


def load_predictor(
    folder: str | os.PathLike[str], *, precision: InferencePrecision | None = None, num_threads: int | None = None
) -> Predictor:
    """The model in a folder that `export` wrote, in the precision that it was exported for, on all cores that this
    process may use, unless others are asked for; `description` says what was chosen. Raises PredictError for another
    folder, or a precision that this machine has not."""
    return Predictor(Path(folder), num_threads, precision=precision)
