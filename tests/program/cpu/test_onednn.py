"""The oneDNN kernels against NumPy in float64, at odd sizes and with odd strides; the check of their version."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from helpers.kernel_operands import DTYPES, address, close, empty, loaded, normal_values, stored

from vit_static.program.cpu import gelu, onednn, primitives
from vit_static.program.cpu.column_sum import column_sum
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.swiglu import swiglu, swiglu_grad

pytestmark = pytest.mark.cpu_isa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_product_with_bias_factor_and_residual(dtype: str, transposed: bool) -> None:
    a_memory, a = normal_values(dtype, 13, 7)
    b_memory, b = normal_values(dtype, *((5, 7) if transposed else (7, 5)))
    (bias_memory, bias), (residual_memory, residual) = normal_values("float32", 1, 5), normal_values("float32", 13, 5)
    out = empty("float32", 13, 5)
    a_layout, b_layout, out_layout = dense(dtype, 13, 7), dense(dtype, *b_memory.shape), dense("float32", 13, 5)
    product = primitives.matmul(
        a_layout,
        b_layout.transposed if transposed else b_layout,
        out_layout,
        dense("float32", 1, 5),
        out_layout,
        factor=0.25,
    )
    product(*map(address, (a_memory, b_memory, bias_memory, residual_memory, out)))
    close(out, (a @ (b.T if transposed else b) + bias) * 0.25 + residual, dtype)


def test_products_of_length_one() -> None:
    """In a new process: oneDNN caches the kernels that it has chosen."""
    script = """
import numpy as np
from vit_static.common.startup import prepare_process
prepare_process(verbose=True)
from vit_static.program.cpu import onednn, primitives
from vit_static.program.cpu.onednn import dense
for rows, columns in ((3, 24), (16, 384), (1, 5)):
    a, b = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    out = np.full((rows, columns), np.nan, np.float32)
    product = primitives.matmul(
        dense("float32", rows, 1), dense("float32", columns, 1).transposed, dense("float32", rows, columns)
    )
    product(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    np.testing.assert_allclose(out, np.outer(a[:rows], b[:columns]), rtol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_gradient(dtype: str) -> None:
    (x_memory, x), (grad_memory, grad) = normal_values(dtype, 9, 31), normal_values(dtype, 9, 31)
    out, x_grad, layout = empty(dtype, 9, 31), empty(dtype, 9, 31), dense(dtype, 9, 31)
    primitives.gelu(layout, layout)(address(x_memory), address(out))
    primitives.gelu_grad(layout, layout, layout)(address(x_memory), address(grad_memory), address(x_grad))
    normal = 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    close(out, x * normal, dtype)
    close(x_grad, grad * (normal + x * np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_chain", [False, True], ids=["one primitive", "chains of sigmoids"])
def test_tanh_gelu_and_its_gradient(monkeypatch: pytest.MonkeyPatch, dtype: str, is_chain: bool) -> None:
    """As chains only in float32, in blocks of 100 and 79 elements."""
    (x_memory, x), (grad_memory, grad) = normal_values(dtype, 9, 31), normal_values(dtype, 9, 31)
    out, x_grad, layout = empty(dtype, 9, 31), empty(dtype, 9, 31), dense(dtype, 9, 31)
    forward, backward = primitives.gelu(layout, layout, True), primitives.gelu_grad(layout, layout, layout, True)
    if is_chain and dtype == "float32":
        monkeypatch.setattr(gelu, "_BLOCK", 100)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        forward, backward = gelu.tanh_gelu(9 * 31), gelu.tanh_gelu_grad(9 * 31)
    forward(address(x_memory), address(out))
    backward(address(x_memory), address(grad_memory), address(x_grad))
    factor = math.sqrt(2.0 / math.pi)
    tanh = np.tanh(factor * (x + 0.044715 * x**3))
    close(out, 0.5 * x * (1.0 + tanh), dtype)
    slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * factor * (1.0 + 3.0 * 0.044715 * x**2)
    close(x_grad, grad * slope, dtype)


def test_tanh_gelu_of_large_values() -> None:
    x = np.array([-1e6, -100.0, -9.0, 9.0, 100.0, 1e6], np.float32)
    out, x_grad, ones = empty("float32", 6), empty("float32", 6), np.ones(6, np.float32)
    gelu.tanh_gelu(6)(address(x), address(out))
    gelu.tanh_gelu_grad(6)(address(x), address(ones), address(x_grad))
    np.testing.assert_allclose(out, np.maximum(x, 0.0), atol=1e-25)
    np.testing.assert_allclose(x_grad, x > 0.0, atol=1e-25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(301, 17), (1, 5), (7, 1), (3152, 384)], ids=str)
def test_column_sums(dtype: str, shape: tuple[int, int]) -> None:
    memory, values = normal_values(dtype, *shape)
    out = empty("float32", shape[1])
    column_sum(dense(dtype, *shape))(address(memory), address(out))
    close(out, values.sum(axis=0), "float32")


def test_silu_sigmoid_swiglu_and_their_gradients() -> None:
    """In float32, the only dtype for which they are used."""
    shape, layout = (9, 31), dense("float32", 9, 31)
    gate, x, grad = (normal_values("float32", *shape)[1] for _ in range(3))
    g_memory, x_memory, grad_memory = (np.ascontiguousarray(values, np.float32) for values in (gate, x, grad))
    out, first, second = (empty("float32", *shape) for _ in range(3))
    sigmoid = 1.0 / (1.0 + np.exp(-gate))
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))  # of SiLU
    primitives.silu(layout)(address(g_memory), address(out))
    close(out, gate * sigmoid, "float32")
    primitives.silu_grad(layout)(address(g_memory), address(grad_memory), address(first))
    close(first, grad * slope, "float32")
    primitives.sigmoid(layout)(address(g_memory), address(out))
    close(out, sigmoid, "float32")
    primitives.sigmoid_grad(layout)(address(out), address(grad_memory), address(first))
    close(first, grad * sigmoid * (1.0 - sigmoid), "float32")
    swiglu(layout)(address(g_memory), address(x_memory), address(out))
    close(out, gate * sigmoid * x, "float32")
    swiglu_grad(layout)(*map(address, (g_memory, x_memory, grad_memory, first, second)))
    close(first, grad * x * slope, "float32")
    close(second, grad * gate * sigmoid, "float32")


@pytest.mark.parametrize("factor", [(9, 31), (1, 31), (9, 1)])
@pytest.mark.parametrize("adds", [False, True])
def test_product_with_a_broadcast_factor(factor: tuple[int, int], adds: bool) -> None:
    layout, out = dense("float32", 9, 31), empty("float32", 9, 31)
    (x_memory, x), (f_memory, f), (a_memory, a) = (normal_values("float32", *s) for s in ((9, 31), factor, (9, 31)))
    product = primitives.multiply(layout, dense("float32", *factor), layout, layout if adds else None)
    product(address(x_memory), address(f_memory), *([address(a_memory)] if adds else []), address(out))
    close(out, x * f + (a if adds else 0.0), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_and_its_gradients(dtype: str) -> None:
    """Inputs are float32; the output and its gradient have either dtype."""
    (x_memory, x), (grad_memory, grad) = normal_values("float32", 11, 24), normal_values(dtype, 11, 24)
    (scale_memory, scale), (shift_memory, shift) = normal_values("float32", 24), normal_values("float32", 24)
    mean, variance, out = empty("float32", 11), empty("float32", 11), empty(dtype, 11, 24)
    x_grad, scale_grad, shift_grad = empty("float32", 11, 24), empty("float32", 24), empty("float32", 24)
    x_layout, out_layout = dense("float32", 11, 24), dense(dtype, 11, 24)
    inputs = (x_memory, scale_memory, shift_memory)
    primitives.layer_norm(x_layout, out_layout, 1e-6)(*map(address, (*inputs, out, mean, variance)))
    backward = primitives.layer_norm_grad(x_layout, out_layout, x_layout, 1e-6)
    backward(*map(address, (*inputs, mean, variance, grad_memory, x_grad, scale_grad, shift_grad)))
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    normal = (x - x.mean(axis=1, keepdims=True)) / deviation
    close(out, normal * scale + shift, dtype)
    scaled = grad * scale
    centred = scaled - scaled.mean(axis=1, keepdims=True) - normal * (scaled * normal).mean(axis=1, keepdims=True)
    close(x_grad, centred / deviation, "float32")
    close(scale_grad, (grad * normal).sum(axis=0), "float32")
    close(shift_grad, grad.sum(axis=0), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_its_gradient(dtype: str) -> None:
    (x_memory, x), (grad_memory, grad) = normal_values("float32", 6, 19), normal_values(dtype, 6, 19)
    out, x_grad = empty(dtype, 6, 19), empty(dtype, 6, 19)
    layout = dense(dtype, 6, 19)
    primitives.softmax(dense("float32", 6, 19), layout)(address(x_memory), address(out))
    primitives.softmax_grad(layout, layout, layout)(address(out), address(grad_memory), address(x_grad))
    expected = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    close(out, expected, dtype)
    close(x_grad, expected * (grad - (expected * grad).sum(axis=1, keepdims=True)), dtype)


def test_conversion_rounds_to_the_nearest() -> None:
    memory, values = normal_values("float32", 101)
    low, back = empty("bfloat16", 101), empty("float32", 101)
    primitives.convert(dense("float32", 101), dense("bfloat16", 101))(address(memory), address(low))
    primitives.convert(dense("bfloat16", 101), dense("float32", 101))(address(low), address(back))
    np.testing.assert_array_equal(low, stored(values, "bfloat16"))
    np.testing.assert_array_equal(loaded(back), loaded(low))


def test_reshaping_is_none_where_no_strides_describe_it() -> None:
    layout = dense("float32", 2, 3, 4)
    assert layout.reshaped((6, 4)) == dense("float32", 6, 4)
    assert layout.permuted((1, 0, 2)).reshaped((6, 4)) is None
    assert layout.permuted((1, 0, 2)) == Layout("float32", (3, 2, 4), (4, 12, 1))
    assert layout.first(1, 2).shape == (1, 2, 4) and layout.offset(1, 2) == 4 * (12 + 2 * 4)


def test_the_wheels_version_is_supported() -> None:
    version = onednn.library_version()
    assert version is not None and version[:2] == (3, 6)
    assert onednn.why_unsupported(version) is None
    assert onednn.is_supported()


@pytest.mark.parametrize("version", [(3, 5, 9), (3, 7, 0), (4, 6, 0), (2, 6, 2)])
def test_another_version_is_unsupported_with_a_reason(version: tuple[int, int, int]) -> None:
    reason = onednn.why_unsupported(version)
    assert reason is not None
    assert ".".join(map(str, version)) in reason and "need 3.6" in reason


def test_without_the_library_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("libdnnl.so.3: cannot open shared object file")

    monkeypatch.setattr(onednn, "_load", fail)
    assert onednn.library_version() is None
    assert "no oneDNN 3 in Paddle's wheel" in str(onednn.why_unsupported(None))


def test_a_patch_release_is_supported() -> None:
    assert onednn.why_unsupported((3, 6, 99)) is None


WITH_ANOTHER_VERSION = """
from vit_static.common.startup import prepare_process
prepare_process()
import numpy as np
import paddle
from vit_static.program.cpu import onednn, primitives
onednn._SUPPORTED_VERSION = (9, 8)

from vit_static.common.errors import ConfigError
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import AmpConfig, Config, DataConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import MeshShape, start_mesh
from vit_static.program.precision import choose_precision
from vit_static.program.program import Program

model = ModelConfig(variant="Ti/16", image_size=8, patch_size=4, width=12, depth=1, num_heads=2, num_classes=3)
config = Config(name="version", model=model, data=DataConfig(global_batch_size=2))
mesh = start_mesh(MeshShape(1, 1, 1), "cpu")
precision = choose_precision(config.amp, "cpu", config.kernels, config.parallel, cpu_has_bfloat16=True)
assert precision.level == "O0", precision
try:
    choose_precision(AmpConfig(level="O1"), "cpu", config.kernels, config.parallel, cpu_has_bfloat16=True)
except ConfigError as error:
    assert str(error).endswith("set amp.level=O0 (or auto)"), error
else:
    raise AssertionError("O1 needs the kernels")
network = VisionTransformer(model, attention_by_matmul)
program = Program.for_training(config, network, mesh, precision, learning_rate=lambda step: 1e-3, eval_batch_size=2)
images, labels = paddle.rand([2, 3, 8, 8]), paddle.to_tensor(np.array([0, 2]))
assert np.isfinite(program.loss_value(program.train_step(images, labels, 0)))
names = {op.name() for op in program.compiled("train").global_block().ops}
assert "pd_op.matmul" in names and not any("vit_static" in name for name in names), names
"""


def test_with_another_version_paddles_kernels_run_and_one_line_says_so() -> None:
    """In a process where the kernels are written for a version that the library doesn't have."""
    command = [sys.executable, "-c", WITH_ANOTHER_VERSION]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "oneDNN" in line]
    assert len(lines) == 1 and lines[0].startswith("vit_static: oneDNN 3.6."), done.stderr
    assert "need 9.8, so Paddle's own kernels run" in lines[0]
