"""oneDNN's kernels as they are called directly, against NumPy in float64 at odd sizes and with odd strides."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from vit_static.program.cpu import onednn
from vit_static.program.cpu.onednn import Layout, dense

BFLOAT16 = pytest.param("bfloat16", marks=pytest.mark.needs_bfloat16)
DTYPES = ["float32", BFLOAT16]
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # of the largest value
rng = np.random.default_rng(0)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as they lie in memory: bfloat16 as the upper halves of float32's bits, rounded to the nearest."""
    bits = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return bits.copy()
    as_integers = bits.view(np.uint32)
    return ((as_integers + 0x7FFF + ((as_integers >> 16) & 1)) >> 16).astype(np.uint16)


def loaded(memory: np.ndarray) -> np.ndarray:
    if memory.dtype == np.float32:
        return memory.astype(np.float64)
    return (memory.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def numbers(dtype: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Normally distributed values: as they lie in memory, and what a kernel must read there."""
    memory = stored(rng.standard_normal(shape), dtype)
    return memory, loaded(memory)


def empty(dtype: str, *shape: int) -> np.ndarray:
    return stored(np.full(shape, np.nan), dtype)


def close(memory: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(loaded(memory), expected, atol=TOLERANCE[dtype] * np.abs(expected).max(), rtol=0)


def address(memory: np.ndarray) -> int:
    return int(memory.ctypes.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_product_with_bias_factor_and_residual(dtype: str, transposed: bool) -> None:
    a_memory, a = numbers(dtype, 13, 7)
    b_memory, b = numbers(dtype, *((5, 7) if transposed else (7, 5)))
    (bias_memory, bias), (added_memory, added) = numbers("float32", 1, 5), numbers("float32", 13, 5)
    out = empty("float32", 13, 5)
    of_a, of_b, of_out = dense(dtype, 13, 7), dense(dtype, *b_memory.shape), dense("float32", 13, 5)
    product = onednn.matmul(
        of_a, of_b.transposed if transposed else of_b, of_out, dense("float32", 1, 5), of_out, factor=0.25
    )
    product(*map(address, (a_memory, b_memory, bias_memory, added_memory, out)))
    close(out, (a @ (b.T if transposed else b) + bias) * 0.25 + added, "float32" if dtype == "float32" else dtype)


def test_products_of_length_one() -> None:
    """In a process of its own: oneDNN keeps the kernels that it has once chosen."""
    script = """
import numpy as np
from vit_static.common.startup import prepare_process
prepare_process(verbose=True)
from vit_static import onednn
from vit_static.onednn import dense

pytestmark = pytest.mark.cpu_isa
for rows, columns in ((3, 24), (16, 384), (1, 5)):
    a, b = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    out = np.full((rows, columns), np.nan, np.float32)
    product = onednn.matmul(
        dense("float32", rows, 1), dense("float32", columns, 1).transposed, dense("float32", rows, columns)
    )
    product(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    np.testing.assert_allclose(out, np.outer(a[:rows], b[:columns]), rtol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_gradient(dtype: str) -> None:
    (x_memory, x), (grad_memory, grad) = numbers(dtype, 9, 31), numbers(dtype, 9, 31)
    out, x_grad, layout = empty(dtype, 9, 31), empty(dtype, 9, 31), dense(dtype, 9, 31)
    onednn.gelu(layout, layout)(address(x_memory), address(out))
    onednn.gelu_grad(layout, layout, layout)(address(x_memory), address(grad_memory), address(x_grad))
    normal = 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    close(out, x * normal, dtype)
    close(x_grad, grad * (normal + x * np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelus_approximation_and_its_gradient(dtype: str) -> None:
    (x_memory, x), (grad_memory, grad) = numbers(dtype, 9, 31), numbers(dtype, 9, 31)
    out, x_grad, layout = empty(dtype, 9, 31), empty(dtype, 9, 31), dense(dtype, 9, 31)
    onednn.gelu(layout, layout, True)(address(x_memory), address(out))
    onednn.gelu_grad(layout, layout, layout, True)(address(x_memory), address(grad_memory), address(x_grad))
    factor = math.sqrt(2.0 / math.pi)
    tanh = np.tanh(factor * (x + 0.044715 * x**3))
    close(out, 0.5 * x * (1.0 + tanh), dtype)
    slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * factor * (1.0 + 3.0 * 0.044715 * x**2)
    close(x_grad, grad * slope, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_and_its_gradients(dtype: str) -> None:
    """Inputs in float32, what it writes and the gradient that it gets in either dtype."""
    (x_memory, x), (grad_memory, grad) = numbers("float32", 11, 24), numbers(dtype, 11, 24)
    (scale_memory, scale), (shift_memory, shift) = numbers("float32", 24), numbers("float32", 24)
    mean, variance, out = empty("float32", 11), empty("float32", 11), empty(dtype, 11, 24)
    x_grad, scale_grad, shift_grad = empty("float32", 11, 24), empty("float32", 24), empty("float32", 24)
    of_x, of_out = dense("float32", 11, 24), dense(dtype, 11, 24)
    given = (x_memory, scale_memory, shift_memory)
    onednn.layer_norm(of_x, of_out, 1e-6)(*map(address, (*given, out, mean, variance)))
    backward = onednn.layer_norm_grad(of_x, of_out, of_x, 1e-6)
    backward(*map(address, (*given, mean, variance, grad_memory, x_grad, scale_grad, shift_grad)))
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    normal = (x - x.mean(axis=1, keepdims=True)) / deviation
    close(out, normal * scale + shift, dtype)
    scaled = grad * scale
    centred = scaled - scaled.mean(axis=1, keepdims=True) - normal * (scaled * normal).mean(axis=1, keepdims=True)
    close(x_grad, centred / deviation, "float32")
    close(scale_grad, (grad * normal).sum(axis=0), "float32")
    close(shift_grad, grad.sum(axis=0), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_bytes", [4 << 20, 4 * 2 * 17 * 17, 1], ids=["all at once", "two heads", "one head"])
def test_attention_and_its_gradients(monkeypatch, dtype: str, score_bytes: int) -> None:
    """Of tensors [B, N, H, d], read as [B, H, N, d], whatever the part of the batch that is done at a time."""
    monkeypatch.setattr(onednn, "_SCORE_BYTES", score_bytes)
    images, tokens, heads, channels = 3, 17, 4, 8
    layout = dense(dtype, images, tokens, heads, channels).permuted((0, 2, 1, 3))
    shape = (images, tokens, heads, channels)
    memories, values = zip(*(numbers(dtype, *shape) for _ in range(4)), strict=True)
    q, k, v, grad = (value.transpose(0, 2, 1, 3) for value in values)
    out, q_grad, k_grad, v_grad = (empty(dtype, *shape) for _ in range(4))
    onednn.Attention(layout, layout, layout, layout)(*map(address, (*memories[:3], out)))
    backward = onednn.AttentionGrad([layout] * 4, [layout] * 3, (0.5, 1.0, 1.0))
    backward(*map(address, (*memories, q_grad, k_grad, v_grad)))
    scores = q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    weights_grad = grad @ v.swapaxes(2, 3)
    scores_grad = weights * (weights_grad - (weights * weights_grad).sum(axis=3, keepdims=True))
    close(out, (weights @ v).transpose(0, 2, 1, 3), dtype)
    close(q_grad, 0.5 * (scores_grad @ k).transpose(0, 2, 1, 3), dtype)
    close(k_grad, (scores_grad.swapaxes(2, 3) @ q).transpose(0, 2, 1, 3), dtype)
    close(v_grad, (weights.swapaxes(2, 3) @ grad).transpose(0, 2, 1, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_its_gradient(dtype: str) -> None:
    (x_memory, x), (grad_memory, grad) = numbers("float32", 6, 19), numbers(dtype, 6, 19)
    out, x_grad = empty(dtype, 6, 19), empty(dtype, 6, 19)
    of_out = dense(dtype, 6, 19)
    onednn.softmax(dense("float32", 6, 19), of_out)(address(x_memory), address(out))
    onednn.softmax_grad(of_out, of_out, of_out)(address(out), address(grad_memory), address(x_grad))
    expected = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    close(out, expected, dtype)
    close(x_grad, expected * (grad - (expected * grad).sum(axis=1, keepdims=True)), dtype)


def test_conversion_rounds_to_the_nearest() -> None:
    memory, values = numbers("float32", 101)
    low, back = empty("bfloat16", 101), empty("float32", 101)
    onednn.convert(dense("float32", 101), dense("bfloat16", 101))(address(memory), address(low))
    onednn.convert(dense("bfloat16", 101), dense("float32", 101))(address(low), address(back))
    np.testing.assert_array_equal(low, stored(values, "bfloat16"))
    np.testing.assert_array_equal(loaded(back), loaded(low))


def test_layouts_that_no_strides_describe_are_none() -> None:
    layout = dense("float32", 2, 3, 4)
    assert layout.reshaped((6, 4)) == dense("float32", 6, 4)
    assert layout.permuted((1, 0, 2)).reshaped((6, 4)) is None
    assert layout.permuted((1, 0, 2)) == Layout("float32", (3, 2, 4), (4, 12, 1))
    assert layout.first(1, 2).shape == (1, 2, 4) and layout.offset(1, 2) == 4 * (12 + 2 * 4)
