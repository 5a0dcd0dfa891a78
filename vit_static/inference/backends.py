"""Exported programs at work: images in, logits and features out, through Paddle Inference or ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import inference

from vit_static.common import cpu
from vit_static.common.cpu import cpu_has_bfloat16
from vit_static.common.errors import PredictError
from vit_static.config.schema import InferencePrecision
from vit_static.inference.artifact import MODEL_FILE, ONNX_FILE, REMEDY, WEIGHTS_FILE, read_spec
from vit_static.program.cpu import lowering

_GPU_POOL_MB = 256
# What a program of each precision can be run in. One of low precision has its casts and its weights in itself.
RUNS_IN: dict[InferencePrecision, tuple[InferencePrecision, ...]] = {
    "float32": ("float32", "bfloat16", "float16"),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
    "int8": ("int8",),
}


def has_gpu() -> bool:
    return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


def check_machine(precision: InferencePrecision) -> None:
    """Raises PredictError for a precision that this machine has not."""
    if precision == "float16" and not has_gpu():
        raise PredictError("float16: needs a GPU and the GPU build of Paddle; use float32 or bfloat16")
    if precision == "bfloat16" and not has_gpu() and not cpu_has_bfloat16():
        raise PredictError("bfloat16: this CPU has no instructions for it; use float32")


class Session(Protocol):
    """A program that one thread uses at a time."""

    place: str  # what runs it, for people

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Images [B, 3, height, width] float32 to logits [B, num_classes] and, asked for, features [B, C], float32.
        Raises ValueError or RuntimeError for images that the program doesn't take."""
        ...


class PaddleSession:
    """A program through Paddle Inference: on a card if there is one and this build of Paddle can, else on the CPU."""

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
        """`as_exported`: the program is of this precision itself; otherwise it is a float32 one. Raises PredictError
        for a precision that this machine has not."""
        if lowering.has_operators():
            raise PredictError(f"{program}: can't be opened in a process that has trained; open it in one of its own")
        config = inference.Config(str(program), str(weights))
        config.disable_glog_info()
        if has_gpu():
            kinds = inference.PrecisionType
            cast_to = {"float16": kinds.Half, "bfloat16": kinds.Bfloat16}.get(precision, kinds.Float32)
            config.enable_use_gpu(_GPU_POOL_MB, 0, kinds.Float32 if as_exported else cast_to)
            self.place = "GPU 0"
        else:
            check_machine(precision)
            if precision == "bfloat16" and not onednn:
                raise PredictError("bfloat16: only oneDNN multiplies it on a CPU; leave oneDNN on")
            config.set_cpu_math_library_num_threads(num_threads)
            if onednn:
                config.enable_mkldnn()
                # Else it keeps the weights once more for each of the last ten shapes of a batch.
                config.set_mkldnn_cache_capacity(0)
            else:
                config.disable_mkldnn()
            if precision == "bfloat16" and not as_exported:
                config.enable_mkldnn_bfloat16()
            self.place = f"the CPU, {'oneDNN' if onednn else 'no oneDNN'}, {num_threads} threads"
        self._predictor: Any = inference.create_predictor(config)

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        logits, features = self.outputs(images)
        return logits.copy_to_cpu(), features.copy_to_cpu() if with_features else None

    def outputs(self, batch: np.ndarray) -> list[Any]:
        """Of a batch of the dtype that the program takes: handles of what it gives, good until the next one."""
        handle = self._predictor.get_input_handle(self._predictor.get_input_names()[0])
        handle.reshape(batch.shape)
        handle.copy_from_cpu(np.ascontiguousarray(batch))
        self._predictor.run()
        return [self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()]


class OnnxSession:
    """A program through ONNX Runtime, on the CPU."""

    def __init__(self, program: Path, num_threads: int) -> None:
        """Raises PredictError where the package is missing."""
        try:
            import onnxruntime
        except ImportError:
            raise PredictError(f"{program}: is run by ONNX Runtime; 'pip install onnxruntime' first") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        self.place = f"the CPU, ONNX Runtime {onnxruntime.__version__}, {num_threads} threads"
        self._session = onnxruntime.InferenceSession(str(program), options, providers=["CPUExecutionProvider"])

    def run(self, images: np.ndarray, *, with_features: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        names = ["logits", "features"] if with_features else ["logits"]
        logits, *features = self._session.run(names, {"images": images})
        return logits, features[0] if features else None


def open_session(
    folder: Path, num_threads: int, *, onednn: bool = True, precision: InferencePrecision | None = None
) -> Session:
    """The program of a folder that `export` wrote; `precision` None: that of the export.

    Inputs and outputs are float32 in every precision, which is what operators compute in. Raises PredictError for a
    folder that is none, and a precision that its program or this machine has not.
    """
    spec = read_spec(folder)
    exported = spec.precision
    wanted = precision or exported
    if wanted not in RUNS_IN[exported]:
        raise PredictError(
            f"{folder}: was exported for {exported}, and does not run in {wanted}; "
            f"export it again with -o export.precision={wanted}"
        )
    if wanted == "int8":
        if spec.int8_weight_bits is None and not cpu.cpu_has_vnni():
            raise PredictError(
                f"{folder}: an earlier version exported it with 8-bit weights, which give wrong results on this CPU "
                f"(no VNNI, no AMX); {REMEDY} with -o export.precision=int8"
            )
        return OnnxSession(folder / ONNX_FILE, num_threads)
    return PaddleSession(
        folder / MODEL_FILE,
        folder / WEIGHTS_FILE,
        num_threads,
        onednn=onednn,
        precision=wanted,
        as_exported=wanted == exported,
    )
