"""Sessions that run an exported program in Paddle Inference, ONNX Runtime or OpenVINO."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import paddle
from paddle import inference

from vit_static.common import cpu
from vit_static.common.errors import PredictError, truncate
from vit_static.common.library_output import hidden_library_output
from vit_static.common.text import counted
from vit_static.config.schema import InferencePrecision
from vit_static.inference.artifact import MODEL_FILE, ONNX_FILE, REMEDY, WEIGHTS_FILE, ModelSpec, read_spec
from vit_static.program.cpu import custom_ops

Backend = Literal["paddle", "onnxruntime", "openvino"]
BACKEND_TITLES: dict[Backend, str] = {
    "paddle": "Paddle Inference",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
_GPU_POOL_MB = 256
# The precisions in which a program can run, by the precision of its export. A low-precision program has fixed weights
# and casts.
RUNS_IN: dict[InferencePrecision, tuple[InferencePrecision, ...]] = {
    "float32": ("float32", "bfloat16", "float16"),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
    "int8": ("int8",),
}


def is_installed(backend: Backend) -> bool:
    """Return whether a backend's package is installed, without importing it."""
    return importlib.util.find_spec(backend) is not None


def has_gpu() -> bool:
    """Return whether this build of Paddle can use a GPU and there is one."""
    return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


def check_machine(precision: InferencePrecision) -> None:
    """Raise PredictError for a precision that this machine can't run."""
    if precision == "float16" and not has_gpu():
        raise PredictError("float16: needs a GPU and the GPU build of Paddle; use float32 or bfloat16")
    if precision == "bfloat16" and not has_gpu() and not cpu.cpu_has_bfloat16():
        raise PredictError("bfloat16: this CPU has no instructions for it; use float32")


class Session(Protocol):
    """An opened program, for one thread at a time."""

    place: str  # the device and library that run it, for messages

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Return logits [B, num_classes] and, with `with_features`, features [B, C], both float32.

        `images` are preprocessed, [B, 3, height, width] float32. Without a head, the logits are [B, 0]. Raises
        ValueError or RuntimeError if the program takes images of another size.
        """
        ...


class PaddleSession:
    """A program in Paddle Inference: on a GPU if `has_gpu`, else on the CPU."""

    def __init__(
        self,
        program: Path,
        weights: Path,
        num_threads: int,
        *,
        onednn: bool = True,
        precision: InferencePrecision = "float32",
        as_exported: bool = True,
    ) -> None:
        """Open the program, which was exported in `precision` or, without `as_exported`, in float32.

        Raises PredictError for a precision that this machine can't run.
        """
        if custom_ops.has_custom_ops():
            raise PredictError(f"{program}: can't be opened in a process that has trained; open it in another process")
        config = inference.Config(str(program), str(weights))
        config.disable_glog_info()
        if has_gpu():
            types = inference.PrecisionType
            target = {"float16": types.Half, "bfloat16": types.Bfloat16}.get(precision, types.Float32)
            config.enable_use_gpu(_GPU_POOL_MB, 0, types.Float32 if as_exported else target)
            self.place = "GPU 0"
        else:
            check_machine(precision)
            if precision == "bfloat16" and not onednn:
                raise PredictError("bfloat16: on a CPU it needs oneDNN; leave oneDNN on, or use float32")
            config.set_cpu_math_library_num_threads(num_threads)
            if onednn:
                config.enable_mkldnn()
                # By default oneDNN caches a copy of the weights for each of the last ten batch shapes.
                config.set_mkldnn_cache_capacity(0)
            else:
                config.disable_mkldnn()
            if precision == "bfloat16" and not as_exported:
                config.enable_mkldnn_bfloat16()
            self.place = f"the CPU, {'oneDNN' if onednn else 'no oneDNN'}, {counted(num_threads, 'thread')}"
        self._predictor: Any = inference.create_predictor(config)
        self._has_run = False

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        *logits, features = self.outputs(images)
        return (
            logits[0].copy_to_cpu() if logits else np.zeros((len(images), 0), np.float32),
            features.copy_to_cpu() if with_features else None,
        )

    def outputs(self, batch: np.ndarray) -> list[Any]:
        """Run a batch in the program's input dtype; the handles of the outputs are valid until the next call."""
        handle = self._predictor.get_input_handle(self._predictor.get_input_names()[0])
        handle.reshape(batch.shape)
        handle.copy_from_cpu(np.ascontiguousarray(batch))
        # The first run prints the name of an oneDNN pass, whatever the log level.
        with nullcontext() if self._has_run else hidden_library_output():
            self._predictor.run()
        self._has_run = True
        return [self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()]


class OnnxSession:
    """A program in ONNX Runtime, on the CPU."""

    def __init__(self, program: Path, num_threads: int) -> None:
        """Open the program. Raises PredictError if ONNX Runtime is not installed."""
        try:
            import onnxruntime
        except ImportError:
            raise PredictError(f"{program}: needs ONNX Runtime; install it with 'pip install onnxruntime'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        self.place = f"the CPU, ONNX Runtime {onnxruntime.__version__}, {counted(num_threads, 'thread')}"
        self._session = onnxruntime.InferenceSession(str(program), options, providers=["CPUExecutionProvider"])

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        has_logits = len(self._session.get_outputs()) > 1
        names = [*(["logits"] if has_logits else []), *(["features"] if with_features or not has_logits else [])]
        outputs = self._session.run(names, {"images": images})
        logits = outputs[0] if has_logits else np.zeros((len(images), 0), np.float32)
        return logits, outputs[-1] if with_features else None


class OpenVinoSession:
    """A program in OpenVINO, on the CPU. Sessions of one `OpenVinoProgram` share its weights."""

    def __init__(self, program: OpenVinoProgram) -> None:
        self.place = program.place
        self._request = program.compiled.create_infer_request()
        self._has_logits = len(program.compiled.outputs) > 1

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        results = self._request.infer({"images": np.ascontiguousarray(images)})
        # Copies: the next run writes to the same memory.
        logits = results["logits"].copy() if self._has_logits else np.zeros((len(images), 0), np.float32)
        return logits, results["features"].copy() if with_features else None


class OpenVinoProgram:
    """A program compiled by OpenVINO, for any number of sessions."""

    def __init__(self, program: Path, num_threads: int) -> None:
        """Compile the program. Raises PredictError if OpenVINO is not installed, or can't read the program."""
        try:
            import openvino
        except ImportError:
            raise PredictError(f"{program}: needs OpenVINO; install it with 'pip install openvino'") from None
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads,
            # By default it rounds to bfloat16 on a CPU that multiplies bfloat16.
            "INFERENCE_PRECISION_HINT": "f32",
            # By default each process and session pins its threads to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            self.compiled = openvino.Core().compile_model(str(program), "CPU", properties)
        except RuntimeError as error:
            raise PredictError(f"{program}: OpenVINO can't run it ({truncate(str(error))})") from None
        version = openvino.__version__.split("-")[0]
        self.place = f"the CPU, OpenVINO {version}, {counted(num_threads, 'thread')}"


def open_session(
    folder: Path, num_threads: int, *, onednn: bool = True, precision: InferencePrecision | None = None
) -> Session:
    """Open the program of a folder that `export` wrote, in the backend that every export has.

    The arguments and errors are those of `session_factory`.
    """
    spec = read_spec(folder)
    chosen = checked_precision(spec, folder, precision)
    return session_factory(folder, spec, default_backend(chosen), chosen, num_threads, onednn=onednn)()


def checked_precision(spec: ModelSpec, folder: Path, precision: InferencePrecision | None = None) -> InferencePrecision:
    """Return the precision to run in; without `precision`, the one of the export.

    Raises PredictError if the exported program doesn't run in it, or not on this CPU.
    """
    exported = spec.precision
    chosen = precision or exported
    if chosen not in RUNS_IN[exported]:
        raise PredictError(
            f"{folder}: was exported for {exported}, and does not run in {chosen}; "
            f"export it again with -o export.precision={chosen}"
        )
    if chosen == "int8" and spec.int8_weight_bits is None and not cpu.cpu_has_vnni():
        raise PredictError(
            f"{folder}: an earlier version exported it with 8-bit weights, which give wrong results on this CPU "
            f"(no VNNI, no AMX); {REMEDY} with -o export.precision=int8"
        )
    return chosen


def default_backend(precision: InferencePrecision) -> Backend:
    """Return the backend that runs every export in a precision, and has passed the export's check in it."""
    return "onnxruntime" if precision == "int8" else "paddle"


def session_factory(
    folder: Path,
    spec: ModelSpec,
    backend: Backend,
    precision: InferencePrecision,
    num_threads: int,
    *,
    onednn: bool = True,
) -> Callable[[], Session]:
    """Return a function that opens the program of an export in a backend; sessions may share their weights.

    Inputs and outputs are float32 in every precision, which is one that `checked_precision` returned. Raises
    PredictError if the backend isn't installed or this machine can't run the precision.
    """
    if backend == "openvino":
        program = OpenVinoProgram(folder / ONNX_FILE, num_threads)
        return lambda: OpenVinoSession(program)
    if backend == "onnxruntime":
        return lambda: OnnxSession(folder / ONNX_FILE, num_threads)
    return lambda: PaddleSession(
        folder / MODEL_FILE,
        folder / WEIGHTS_FILE,
        num_threads,
        onednn=onednn,
        precision=precision,
        as_exported=precision == spec.precision,
    )
