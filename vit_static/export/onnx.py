"""Conversion of an exported program to ONNX by paddle2onnx, and int8 quantisation by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vit_static.common.errors import UserError
from vit_static.inference.artifact import MODEL_FILE, WEIGHTS_FILE

INT8_WEIGHT_BITS: Literal[7] = 7
OPSET = 17  # the first with LayerNormalization
_OUTPUT_NAMES = ("logits", "features")
_MAX_BYTES = 2**31  # limit of a protobuf message, which an ONNX file is


def check_installed() -> None:
    """Raise UserError if a package is missing."""
    try:
        import ml_dtypes  # noqa: F401 - imported by ONNX Runtime's quantiser
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import paddle2onnx  # noqa: F401
    except ImportError as error:
        if error.name == "paddle2onnx" and sys.version_info >= (3, 13):
            raise UserError(
                "ONNX and int8: paddle2onnx has no build for Python {}.{}; export with Python 3.10, 3.11 or 3.12 "
                "(a newer one runs the result)".format(*sys.version_info)
            ) from None
        raise UserError(
            f"ONNX export: {error.name} is not installed; './run.sh setup' installs it, and so does 'pip install "
            "paddle2onnx onnx onnxruntime ml_dtypes'"
        ) from None


def write_onnx(folder: Path, path: Path, gelu: Literal["erf", "tanh", "quick"]) -> None:
    """Convert the float32 program in `folder` to an ONNX file: images [batch, 3, height, width] to logits and features.

    `gelu` is the model's activation. Raises UserError for weights of more than 2 GB, the limit of an ONNX file.
    """
    import onnx

    size = (folder / WEIGHTS_FILE).stat().st_size
    if size > _MAX_BYTES:
        raise UserError(f"{path}: an ONNX file holds 2 GB, and the weights have {size / 1e9:.1f} GB; leave --onnx out")
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "converted.onnx"
        _convert(folder, converted)
        model = onnx.load(str(converted))
    if gelu == "tanh":
        _approximate_gelu(model)
    _name_outputs(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _convert(folder: Path, path: Path) -> None:
    import paddle2onnx

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            # The default of optimize_tool would install packages into this environment.
            paddle2onnx.export(
                str(folder / MODEL_FILE),
                str(folder / WEIGHTS_FILE),
                str(path),
                opset_version=OPSET,
                auto_upgrade_opset=False,
                optimize_tool="None",
            )
    except Exception as error:  # its message doesn't give the reason, but its output does
        raise RuntimeError(f"paddle2onnx can't convert {folder / MODEL_FILE}:\n{output.getvalue()[-4000:]}") from error


def _approximate_gelu(model: Any) -> None:
    """Replace erf(x / sqrt(2)) by tanh(sqrt(2 / pi) (x + 0.044715 x^3)), in place (arXiv 1606.08415, section 2).

    paddle2onnx 2.1.0 writes the exact GELU, x / 2 (1 + erf(x / sqrt(2))), for the approximate one too, without a word:
    up to 4.7e-4 away from it. Opset 17 has no operator for either.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    if not any(node.op_type == "Erf" for node in graph.node):  # a gated MLP has no GELU
        return
    constants = {}
    for suffix, value in (("cubic", 0.044715), ("linear", 1.0), ("scale", math.sqrt(2.0 / math.pi))):
        constants[suffix] = f"gelu.{suffix}"
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), constants[suffix]))
    sources = {output: node for node in graph.node for output in node.output}
    nodes = []
    for node in graph.node:
        if node.op_type != "Erf":
            nodes.append(node)
            continue
        division = sources[node.input[0]]
        assert division.op_type == "Div", "the exact GELU as paddle2onnx 2.1.0 writes it"
        x, result = division.input[0], node.output[0]
        square, cubic, factor, scaled, inner = (
            f"{result}.{name}" for name in ("xx", "cubic", "factor", "scaled", "inner")
        )
        nodes += [
            helper.make_node("Mul", [x, x], [square]),
            helper.make_node("Mul", [square, constants["cubic"]], [cubic]),
            helper.make_node("Add", [cubic, constants["linear"]], [factor]),
            helper.make_node("Mul", [x, constants["scale"]], [scaled]),
            helper.make_node("Mul", [scaled, factor], [inner]),
            helper.make_node("Tanh", [inner], [result]),
        ]
    for _ in range(2):  # the divisions, then their constants
        used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
        nodes = [node for node in nodes if used.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(nodes)


def _name_outputs(model: Any) -> None:
    """Name the outputs `logits` and `features`, or `features` alone, and the first axis of all `batch`."""
    graph = model.graph
    names = {output.name: name for output, name in zip(graph.output, _OUTPUT_NAMES[-len(graph.output) :], strict=True)}
    for node in graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = names.get(name, name)
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for output in graph.output:
        output.name = names[output.name]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def quantize(source: Path, path: Path, batches: Iterable[np.ndarray]) -> None:
    """Quantise the linear layers of a float32 ONNX file to int8, weights and inputs, in QDQ format.

    A weight has one scale per column. An input has one scale, from its range over `batches` of preprocessed images
    [B, 3, height, width] float32.

    Weights have 7 bits (INT8_WEIGHT_BITS), from -64 to 64. On a CPU without VNNI, ONNX Runtime adds two products of an
    unsigned 8-bit input and a signed weight in 16 bits, which saturate at 32,767. With 7-bit weights the sum is at most
    2 * 255 * 64 = 32,640, so the products are exact on every CPU, whatever the options of ONNX Runtime.

    The products inside attention stay float32: they are a tenth of the work, and int8 is too coarse for attention
    weights.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class BatchReader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(self._batches, None)
            return None if images is None else {"images": images}

    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(prepared)).graph
        weights = {initializer.name for initializer in graph.initializer}
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        quantize_static(
            str(prepared),
            str(path),
            BatchReader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_quantize=[node.name for node in products if node.input[1] in weights],
        )
