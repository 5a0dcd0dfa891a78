"""Prediction with an exported model: images to classes and features, from any number of threads.

    import vit_static

    model = vit_static.load("exported")  # a folder that `export` wrote
    model(["cat.jpg", Image.open("dog.png"), frame])  # one Prediction per image; `frame` is [height, width, 3] uint8
    model.features(paths)  # [B, width]
    for prediction in model.stream(many_paths):  # reads ahead by one batch and continues after a bad image
        ...

A model runs in the precision for which it was exported and checked: on a GPU if there is one, else on the CPU with
oneDNN, and int8 with ONNX Runtime. An export with an ONNX file runs in whichever of Paddle Inference, ONNX Runtime and
OpenVINO is fastest on this machine (choose_backend.py). Two engines of Paddle Inference 3.3.1 are not offered. Its
OpenVINO takes only programs of Paddle's old format; for a new one it reports that it is on, but it isn't loaded (same
bits, same speed). TensorRT needs a separate conversion of new programs (paddle.tensorrt), TensorRT and a GPU.
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
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import PredictError, require_argument, truncate
from vit_static.common.installation import localize
from vit_static.config.data_schema import DataConfig
from vit_static.config.schema import BackendChoice, InferencePrecision
from vit_static.data.dali_pipeline import preprocessing_pipeline
from vit_static.data.image_pixels import DecodeOptions
from vit_static.inference.artifact import REMEDY, SPEC_FILE, Preprocessing, read_spec
from vit_static.inference.backends import Session
from vit_static.inference.choose_backend import MEASURED_BATCH_SIZE, choose_backend
from vit_static.inference.image_io import ImageLike, require_several, to_pixels
from vit_static.inference.probabilities import named_classes, to_probabilities

_BATCH_SIZE = 32
# Threads that use the model, or the preprocessing, at once. One of them already uses all cores; a second one copies
# its data meanwhile. Each has its own copy of the weights.
_NUM_PARALLEL = 2


@dataclass(frozen=True)
class Prediction:
    """Classes of an image, the most likely first; `features` [width] if they were requested."""

    classes: list[int]
    names: list[str]
    probabilities: list[float]
    features: np.ndarray | None = None

    def top(self) -> list[dict[str, Any]]:
        """Return the classes as `predict` and `serve` write them in JSON."""
        rows = zip(self.classes, self.names, self.probabilities, strict=True)
        return [
            {"class": label, "name": name, "probability": round(probability, 6)} for label, name, probability in rows
        ]


_T = TypeVar("_T")


class Pool(Generic[_T]):
    """Up to `size` objects that one thread can use at a time, each created when it is first needed."""

    def __init__(self, size: int, create: Callable[[], _T]) -> None:
        self._create = create
        self._free: LifoQueue[_T | None] = LifoQueue()  # None: one more may be created
        for _ in range(size):
            self._free.put(None)

    @contextmanager
    def borrow(self) -> Iterator[_T]:
        """Lend an object to this thread alone, waiting for a free one; after an exception it is replaced."""
        item = self._free.get()
        try:
            item = self._create() if item is None else item
            yield item
        except BaseException:
            item = None
            raise
        finally:
            self._free.put(item)


class Preprocessor:
    """DALI pipeline from decoded pixels to the model's input, rebuilt when a batch is larger than all before it."""

    def __init__(self, preprocessing: Preprocessing, num_threads: int) -> None:
        self._image_size, self._num_threads = preprocessing.image_size, num_threads
        self._data_config = DataConfig(mean=preprocessing.mean, std=preprocessing.std)
        self._eval_config = preprocessing.to_eval_config()
        self._max_batch_size = 0

    def __call__(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Preprocess arrays [height, width, 3] uint8, each of its own size, to [B, 3, height, width] float32."""
        if len(pixels) > self._max_batch_size:
            self._max_batch_size = len(pixels)
            self._pipeline = preprocessing_pipeline(
                self._max_batch_size, self._num_threads, self._image_size, self._data_config, self._eval_config
            )
        (images,) = self._pipeline.run(pixels=list(pixels))
        return np.array(images.as_tensor())  # a copy, because the next run writes to the same memory


class Predictor:
    """An exported model with its preprocessing; any number of threads may use it at once."""

    def __init__(
        self,
        folder: Path,
        num_threads: int | None = None,
        onednn: bool = True,
        precision: InferencePrecision | None = None,
        backend: BackendChoice = "auto",
        usual_batch_size: int = MEASURED_BATCH_SIZE,
    ) -> None:
        """Open the model in `folder`; without `precision`, in the one of the export.

        `usual_batch_size`: for which the fastest backend is chosen. Raises PredictError if `export` didn't write the
        folder, or if this machine can't run the precision or the backend.
        """
        self.spec = read_spec(folder)
        self._decode_options = self.spec.preprocessing.to_decode_options()
        threads = num_threads or len(os.sched_getaffinity(0))
        choice = choose_backend(
            folder, self.spec, backend, precision, threads, onednn=onednn, batch_size=usual_batch_size
        )
        self.backend = choice.backend
        self._sessions: Pool[Session] = Pool(_NUM_PARALLEL, choice.open_session)
        self._preprocessors = Pool(_NUM_PARALLEL, lambda: Preprocessor(self.spec.preprocessing, threads))
        with self._sessions.borrow() as session:  # opens the first session, so that a failure is raised here
            place = session.place
        exported = self.spec.precision
        chosen = precision or exported
        reason = "as exported" if chosen == exported else f"exported for {exported}"
        self.description = f"{chosen} ({reason}) on {place}"
        if choice.reason:
            self.description += f" ({choice.reason})"
        if chosen == "float32" and cpu_has_bfloat16() and place.startswith("the CPU"):
            self.description += "; this CPU is faster in bfloat16: --precision bfloat16"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raise AttributeError; for what only TrainedModel has, it says so."""
            if name in ("attention", "draw_attention", "layer"):
                raise AttributeError(
                    localize(
                        f"an exported model has no {name}; vit_static.load_weights(RUN).{name} has it: see "
                        "configs/PYTHON.md"
                    )
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(self, images: Sequence[ImageLike], top_k: int | None = None) -> list[Prediction]:
        """Return the `top_k` most likely classes of each image.

        Without `top_k` they are all classes that reach their threshold, which may be none, and five where the export
        has no thresholds. Raises PredictError, with the image's path, for one that can't be read.
        """
        predictions = []
        for prediction in self.stream(images, top_k):
            if isinstance(prediction, PredictError):
                raise prediction
            predictions.append(prediction)
        return predictions

    def stream(
        self,
        images: Iterable[ImageLike],
        top_k: int | None = None,
        batch_size: int = _BATCH_SIZE,
        *,
        with_features: bool = False,
    ) -> Iterator[Prediction | PredictError]:
        """Yield a prediction per image, in their order, and a PredictError for each image that can't be read.

        The next batch is read and preprocessed while the model runs.
        """
        require_several(images)
        is_number = top_k is None or (type(top_k) is int and top_k > 0)
        require_argument(is_number, "top_k", top_k, "None or a whole number above 0")
        for inputs, errors in prefetch_batches(images, batch_size, self._decode_options, self.preprocess):
            predictions: Iterator[Prediction | PredictError] = iter(())
            if len(inputs):
                logits, features = self.run(inputs, with_features=with_features)
                predictions = iter(self.top_predictions(logits, top_k, features))
            for error in errors:
                yield next(predictions) if error is None else error

    def probabilities(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Return [B, num_classes] float64: softmax, or sigmoid for a model trained with a sigmoid loss.

        Raises PredictError, with the image's path, for one that can't be read.
        """
        return to_probabilities(self._run_all(images, with_features=False)[0], self.spec.activation)

    def features(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Return [B, width] float32, the pooled state after the last norm (`VisionTransformer.features`).

        With pool cls_gap it is 2 * width wide. Raises PredictError, with the image's path, for one that can't be read.
        """
        features = self._run_all(images, with_features=True)[1]
        assert features is not None
        return features

    def top_predictions(
        self, logits: np.ndarray, top_k: int | None, features: np.ndarray | None = None
    ) -> list[Prediction | PredictError]:
        """Return the classes of each row of `logits` [B, num_classes], with the row of `features` [B, width].

        Without `top_k` they are as in `__call__`. For a row with NaN or infinite values it is a PredictError. Without a
        head there are no classes.
        """
        if not logits.shape[1]:
            return [Prediction([], [], [], row) for row in ([None] * len(logits) if features is None else features)]
        predictions: list[Prediction | PredictError] = []
        for index, row in enumerate(to_probabilities(logits, self.spec.activation)):
            if not np.isfinite(row).all():
                predictions.append(
                    PredictError("the model's output has NaN or infinite values; check it with './run.sh eval'")
                )
                continue
            classes = named_classes(row, top_k, self.spec.thresholds)
            names = [self.spec.class_names[label] for label in classes]
            image_features = None if features is None else features[index]
            predictions.append(Prediction(classes, names, row[classes].tolist(), image_features))
        return predictions

    def preprocess(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Preprocess arrays [height, width, 3] uint8, each of its own size, to [B, 3, height, width] float32."""
        with self._preprocessors.borrow() as preprocessor:
            return preprocessor(pixels)

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Return logits [B, num_classes] for preprocessed images [B, 3, height, width] float32."""
        return self.run(inputs)[0]

    def run(self, inputs: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits [B, num_classes] and, with `with_features`, features [B, width], both float32.

        `inputs` are preprocessed images [B, 3, height, width]. Raises PredictError if the program doesn't match the
        folder's description.
        """
        with self._sessions.borrow() as session:
            try:
                logits, features = session.run(np.asarray(inputs, np.float32), with_features=with_features)
            except (ValueError, RuntimeError) as error:
                lines = [line.strip() for line in str(error).splitlines() if "Error" in line] or [str(error)]
                raise PredictError(
                    f"the model can't run on images of {inputs.shape[2]}x{inputs.shape[3]}, the size in {SPEC_FILE} "
                    f"({truncate(lines[0])}); {REMEDY}"
                ) from None
            if logits.shape != (len(inputs), len(self.spec.class_names)):
                raise PredictError(
                    f"the model's output is {list(logits.shape)}, and {SPEC_FILE} has {len(self.spec.class_names)} "
                    f"classes; {REMEDY}"
                )
            return logits, features

    def _run_all(self, images: Sequence[ImageLike], *, with_features: bool) -> tuple[np.ndarray, np.ndarray | None]:
        require_several(images)
        batches = []
        for inputs, errors in prefetch_batches(images, _BATCH_SIZE, self._decode_options, self.preprocess):
            for error in errors:
                if error is not None:
                    raise error
            batches.append(self.run(inputs, with_features=with_features))
        if not batches:
            raise PredictError("no images to predict; pass at least one")
        logits, features = zip(*batches, strict=True)
        return np.concatenate(logits), np.concatenate(features) if with_features else None


def prefetch_batches(
    images: Iterable[ImageLike],
    batch_size: int,
    options: DecodeOptions,
    preprocess: Callable[[Sequence[np.ndarray]], np.ndarray],
) -> Iterator[tuple[np.ndarray, list[PredictError | None]]]:
    """Yield batches of preprocessed images [B, 3, height, width], preparing each while the previous one is used.

    B counts only the images that can be read. The list has an entry per image: None, or why it can't be read.
    """

    def read(image: ImageLike) -> np.ndarray | PredictError:
        try:
            return to_pixels(image, options)
        except PredictError as error:
            return error

    def prepare(batch: list[ImageLike]) -> tuple[np.ndarray, list[PredictError | None]]:
        results = list(readers.map(read, batch))
        readable = [pixels for pixels in results if isinstance(pixels, np.ndarray)]
        inputs = preprocess(readable) if readable else np.empty(0, np.float32)
        return inputs, [result if isinstance(result, PredictError) else None for result in results]

    remaining = iter(images)
    with ThreadPoolExecutor(1) as preparer, ThreadPoolExecutor() as readers:
        current: Future[tuple[np.ndarray, list[PredictError | None]]] | None = None
        while batch := list(islice(remaining, batch_size)):
            following = preparer.submit(prepare, batch)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()


def load_predictor(
    folder: str | os.PathLike[str],
    *,
    precision: InferencePrecision | None = None,
    num_threads: int | None = None,
    backend: BackendChoice = "auto",
    usual_batch_size: int = MEASURED_BATCH_SIZE,
) -> Predictor:
    """Open an exported model; its `description` gives the chosen precision, device and backend.

    By default it runs in the precision of the export, on all cores that this process may use, in the backend that runs
    `usual_batch_size` images fastest. Raises PredictError if `export` didn't write the folder, or if this machine can't
    run the precision or the backend.
    """
    return Predictor(Path(folder), num_threads, precision=precision, backend=backend, usual_batch_size=usual_batch_size)
