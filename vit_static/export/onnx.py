"""An exported program as an ONNX file, in float32 by paddle2onnx, in int8 by ONNX Runtime's quantiser."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vit_static.common.errors import UserError
from vit_static.inference.artifact import MODEL_FILE, WEIGHTS_FILE

INT8_WEIGHT_BITS: Literal[7] = 7
OPSET = 17  # the first with LayerNormalization
_NAMES = ("logits", "features")
_MAX_BYTES = 2**31  # of a protobuf message, which an ONNX file is


def check_installed() -> None:
    """Raises UserError where a package is missing."""
    try:
        import ml_dtypes  # noqa: F401 - ONNX Runtime's quantiser imports it
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import paddle2onnx  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX: {error.name} is not installed; './run.sh setup' has it, or 'pip install paddle2onnx onnx "
            "onnxruntime ml_dtypes'"
        ) from None


def write_onnx(folder: Path, path: Path) -> None:
    """The float32 program in `folder` as an ONNX file: images [batch, 3, height, width] to logits and features.

    Raises UserError for weights of more than ONNX's 2 GB.
    """
    import onnx

    size = (folder / WEIGHTS_FILE).stat().st_size
    if size > _MAX_BYTES:
        raise UserError(f"{path}: an ONNX file holds 2 GB, and the weights have {size / 1e9:.1f}; leave --onnx out")
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw.onnx"
        _convert(folder, raw)
        model = onnx.load(str(raw))
    _rename(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _convert(folder: Path, path: Path) -> None:
    import paddle2onnx

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            # Its default tool would install packages into this environment.
            paddle2onnx.export(
                str(folder / MODEL_FILE),
                str(folder / WEIGHTS_FILE),
                str(path),
                opset_version=OPSET,
                auto_upgrade_opset=False,
                optimize_tool="None",
            )
    except Exception as error:  # what it says of it is no more than that it has failed
        raise RuntimeError(f"paddle2onnx can't convert {folder / MODEL_FILE}:\n{said.getvalue()[-4000:]}") from error


def _rename(model: Any) -> None:
    """The outputs to what they are, and the first axis to what it is."""
    graph = model.graph
    names = {old.name: new for old, new in zip(graph.output, _NAMES, strict=True)}
    for node in graph.node:
        for place, name in enumerate(node.output):
            node.output[place] = names.get(name, name)
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    for output in graph.output:
        output.name = names[output.name]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def quantize(source: Path, path: Path, batches: Iterable[np.ndarray]) -> None:
    """The float32 file with the weights of its linear layers and their inputs in int8 (QDQ; a scale a column of a
    weight, one an input, from its range over `batches` of images [B, 3, height, width] float32).

    Weights have 7 bits (INT8_WEIGHT_BITS), -64 to 64. On a CPU without VNNI, ONNX Runtime adds two products of an
    unsigned 8-bit input and a signed weight in 16 bits, which saturate at 32,767; with 7-bit weights the sum is at most
    2 * 255 * 64 = 32,640. So the products are exact on every CPU, whatever options ONNX Runtime is given.

    Attention's own products stay float32: they are a tenth of the work, and of softmax's shares int8 keeps little.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(self._batches, None)
            return None if images is None else {"images": images}

    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        constants = {constant.name for constant in graph.initializer}
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_quantize=[node.name for node in products if node.input[1] in constants],
        )
