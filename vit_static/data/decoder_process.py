"""Decoding of untrusted images in a child process, whose death or hang is a finding about an image.

Decoders are native code: a damaged file can end their process by a signal, or keep it busy forever. `data check` reads
every file this way, and a run whose batch can't be decoded finds the image this way. Training itself decodes once, on
DALI's threads.
"""

from __future__ import annotations

import io
import os
import re
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkServerProcess
from types import TracebackType
from typing import IO, Any

import numpy as np
from PIL import Image

from vit_static.common.errors import DataError, RunFailed, escape, truncate
from vit_static.data import fork_server
from vit_static.data.image_formats import PILLOW_FORMATS
from vit_static.data.image_pixels import DecodeOptions, decode, prepare_for_dali

DALI_MODULE = "vit_static.data.dali_pipeline"  # takes two seconds to import; only the child needs it
DECODING_BATCH_SIZE = 32
TIME_LIMIT_S = 120.0  # for a batch; a single image of MAX_PIXELS takes a few seconds
_START_LIMIT_S = 300.0  # for the imports, on a busy machine
_READY = "ready"
_UNSUPPORTED = "Pillow can read it, training's decoder cannot: save it as PNG or JPEG"
_OPTIONS = DecodeOptions("apply", None)  # which images can be decoded doesn't depend on them
_SIGNS_OF_AN_END = re.compile(
    r"truncated|unexpected end|premature end of (jpeg|input|image)|ends? early|read error", re.I
)
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What libraries print before the reason: nvImageCodec's '[ERROR] [decoder] Could not decode ... stream - ', OpenCV's
# '[ERROR:0@1.2] ...: error: (-2:Unspecified error) '
_PRINTED_PREFIX = re.compile(r"^\[ERROR\] \[\w+\] (Could not \w+.*? - )?|^\[ERROR:.*?error: \([^)]*\) ")


@dataclass(frozen=True)
class Fault:
    """Why training can't use an image: a kind of `data check`, and the reason in words."""

    kind: str  # truncated, unreadable, unsupported or too_large
    reason: str


@dataclass(frozen=True)
class ImageHeader:
    """Format and mode, as Pillow names them, size in pixels, and whether a channel has more than 8 bits."""

    format: str
    mode: str
    width: int
    height: int
    is_deep: bool


@dataclass(frozen=True)
class ImageReport:
    """The fault of an image, None if training can decode it, and its header, None if it can't be read."""

    fault: Fault | None
    header: ImageHeader | None


class DecoderProcess:
    """Training's decoder in a child process, which is started when it is needed, and again after it has died.

    A context manager. `device_id` None: decoding on the CPU, else on that GPU. Not for use by several threads.
    """

    def __init__(self, num_threads: int, device_id: int | None = None, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._num_threads, self._device_id, self._time_limit_s = num_threads, device_id, time_limit_s
        self._process: ForkServerProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> DecoderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def reports(self, images: Sequence[np.ndarray]) -> list[ImageReport]:
        """Decode encoded images, each [num_bytes] uint8, and return a report for each.

        If the child dies or hangs, every image of the batch is decoded on its own. Raise RunFailed if it can't start.
        """
        reports: list[ImageReport] = []
        for start in range(0, len(images), DECODING_BATCH_SIZE):
            batch = list(images[start : start + DECODING_BATCH_SIZE])
            answer = self._ask(batch)
            if isinstance(answer, list):
                reports += answer
            else:
                reports += [self._report_on_one(image) for image in batch]
        return reports

    def close(self) -> None:
        """End the child."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _report_on_one(self, image: np.ndarray) -> ImageReport:
        answer = self._ask([image])
        return answer[0] if isinstance(answer, list) else ImageReport(Fault("unreadable", answer), None)

    def _ask(self, images: list[np.ndarray]) -> list[ImageReport] | str:
        """Return the child's reports, or how it failed."""
        connection = self._start() if self._connection is None else self._connection
        try:
            connection.send(images)
            if not connection.poll(self._time_limit_s):
                self.close()
                return f"the decoder doesn't finish within {self._time_limit_s:.0f} s"
            answer: list[ImageReport] | Exception = connection.recv()
        except (EOFError, OSError):  # also a broken pipe
            assert self._process is not None
            self._process.join()
            code = fork_server.exit_code(self._process)
            self.close()
            return f"makes the decoder crash ({signal_name(code or 0)})"
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        fork_server.preload(DALI_MODULE)
        try:
            self._process = fork_server.start_process(answer_batches, theirs, self._num_threads, self._device_id)
            theirs.close()
            self._connection = ours
            first = ours.recv() if ours.poll(_START_LIMIT_S) else f"nothing happened within {_START_LIMIT_S:.0f} s"
        except (EOFError, OSError) as error:
            first = str(error) or "it ended"
        if first != _READY:
            self.close()
            raise RunFailed(f"the process that decodes images can't start: {escape(first)}")
        return ours


def signal_name(exit_code: int) -> str:
    """Return the name of the signal that ended a process, or its exit code in words."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name


class _Decoder:
    """The decoder in the child. A pipeline can't be used after an error, and is then built again."""

    def __init__(self, num_threads: int, device_id: int | None, printed: IO[bytes]) -> None:
        self._make_pipeline: Callable[[int, int, int | None], Any] = import_module(DALI_MODULE).decoding_pipeline
        self._num_threads, self._device_id, self._printed = num_threads, device_id, printed
        self._pipelines: dict[int, Any] = {}  # by batch size
        self._threads = ThreadPoolExecutor(num_threads)

    def reports(self, images: list[np.ndarray]) -> list[ImageReport]:
        headers = list(self._threads.map(read_header, images))
        prepared = list(self._threads.map(prepare, images))
        faults = [result if isinstance(result, Fault) else None for result in prepared]
        to_decode = {n: result for n, result in enumerate(prepared) if not isinstance(result, Fault)}
        if to_decode and not self._decode(list(to_decode.values()), DECODING_BATCH_SIZE):
            for number, encoded in to_decode.items():
                if not self._decode([encoded], 1):
                    faults[number] = explain(images[number], self._first_printed())
        return [ImageReport(fault, header) for fault, header in zip(faults, headers, strict=True)]

    def _decode(self, images: list[np.ndarray], batch_size: int) -> bool:
        """Return whether all images can be decoded."""
        self._printed.seek(0)
        self._printed.truncate()
        if batch_size not in self._pipelines:
            self._pipelines[batch_size] = self._make_pipeline(batch_size, self._num_threads, self._device_id)
        try:
            self._pipelines[batch_size].run(encoded=images)
        except RuntimeError:
            del self._pipelines[batch_size]
            return False
        return True

    def _first_printed(self) -> str:
        """Return the first reason that a library has printed since the last call of `_decode`; may be empty."""
        self._printed.seek(0)
        text = _TERMINAL_COLOURS.sub("", self._printed.read(10_000).decode(errors="replace"))
        lines = (_PRINTED_PREFIX.sub("", line.strip()) for line in text.splitlines())
        return next((line for line in lines if line), "")


def prepare(encoded: np.ndarray) -> np.ndarray | Fault:
    """Return an image as training passes it to DALI, or the fault with which Pillow refuses it."""
    try:
        return prepare_for_dali(encoded, _OPTIONS)
    except DataError as error:
        if error.kind == "unreadable" and ends_early(encoded):
            return Fault("truncated", f"ends early: {error}")
        return Fault(error.kind, str(error))


def explain(encoded: np.ndarray, printed: str) -> Fault:
    """Return the fault of an image that DALI refuses, whose decoder `printed` the reason."""
    reason = truncate(printed, 150) or "its data is damaged"
    if ends_early(encoded) or _SIGNS_OF_AN_END.search(printed):
        return Fault("truncated", f"ends early ({reason})")
    try:
        decode(io.BytesIO(encoded.data), _OPTIONS)
    except DataError as error:
        return Fault(error.kind, str(error) if not printed else f"is damaged ({reason})")
    return Fault("unsupported", f"{_UNSUPPORTED} ({reason})")


def ends_early(encoded: np.ndarray) -> bool:
    """Return whether a JPEG or PNG lacks its end marker, or a WebP or BMP file is shorter than its header says."""
    start, end = encoded[:16].tobytes(), encoded[-4096:].tobytes()
    if start.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in end
    if start.startswith(b"\x89PNG"):
        return b"IEND" not in end
    if start.startswith(b"RIFF"):
        return int.from_bytes(start[4:8], "little") + 8 > len(encoded)
    return start.startswith(b"BM") and int.from_bytes(start[2:6], "little") > len(encoded)


def read_header(encoded: np.ndarray) -> ImageHeader | None:
    """Return the header of an image of any format without decoding its pixels; None if Pillow can't read it."""
    try:
        with Image.open(io.BytesIO(encoded.data), formats=PILLOW_FORMATS) as image:
            is_deep_png = image.format == "PNG" and bool(encoded[24] == 16)  # the bit depth in its header
            is_deep = is_deep_png or image.mode.startswith("I") or image.mode == "F"
            return ImageHeader(str(image.format), image.mode, image.width, image.height, is_deep)
    except Exception:  # a broken header can raise anything
        return None


def answer_batches(connection: Connection, num_threads: int, device_id: int | None) -> None:
    """Run the child: answer batches of images with their reports until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with tempfile.TemporaryFile(buffering=0) as printed:
        for descriptor in (1, 2):
            os.dup2(printed.fileno(), descriptor)
        try:
            decoder = _Decoder(num_threads, device_id, printed)
        except Exception as error:
            connection.send(str(error) or type(error).__name__)
            return
        connection.send(_READY)
        while True:
            try:
                images = connection.recv()
            except (EOFError, OSError):
                return
            try:
                connection.send(decoder.reports(images))
            except Exception as error:  # not about an image: those are in the reports
                connection.send(error)
