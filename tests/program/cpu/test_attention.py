"""Attention kernels against NumPy in float64: odd sizes, fewer queries than keys, parts of a batch, large scores."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.kernel_operands import DTYPES, address, close, empty, loaded, normal_values, stored

from vit_static.program.cpu import attention, attention_float32
from vit_static.program.cpu.attention_float32 import Float32Attention, Float32AttentionGrad
from vit_static.program.cpu.onednn import Layout, dense

pytestmark = pytest.mark.cpu_isa

FACTORS = (0.5, 1.0, 2.0)  # of the gradients of q, k and v
USUAL_FACTORS = (0.125, 1.0, 1.0)


def by_head(dtype: str, *shape: int) -> Layout:
    """Return the layout of [B, N, H, d] as [B, H, N, d]."""
    return dense(dtype, *shape).permuted((0, 2, 1, 3))


def expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, grad: np.ndarray, factors: tuple[float, ...] = FACTORS
) -> list[np.ndarray]:
    """Return attention of [B, N, H, d] and the gradients of q, k and v, times these factors."""
    q, k, v, grad = (value.transpose(0, 2, 1, 3) for value in (q, k, v, grad))
    scores = q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    weights_grad = grad @ v.swapaxes(2, 3)
    scores_grad = weights * (weights_grad - (weights * weights_grad).sum(axis=3, keepdims=True))
    grads = (scores_grad @ k, scores_grad.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ grad)
    results = (weights @ v, *(factor * value for factor, value in zip(factors, grads, strict=True)))
    return [value.transpose(0, 2, 1, 3) for value in results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_bytes", [4 << 20, 4 * 2 * 17 * 17, 1], ids=["all images", "two heads", "one head"])
def test_attention_and_its_gradients(monkeypatch, dtype: str, score_bytes: int) -> None:
    """On tensors [B, N, H, d], read as [B, H, N, d], for each number of images and heads computed at a time."""
    monkeypatch.setattr(attention, "_SCORE_BYTES", score_bytes)
    shape = (3, 17, 4, 8)
    layout = by_head(dtype, *shape)
    memories, values = zip(*(normal_values(dtype, *shape) for _ in range(4)), strict=True)
    results = [empty(dtype, *shape) for _ in range(4)]
    attention.Attention(layout, layout, layout, layout)(*map(address, (*memories[:3], results[0])))
    backward = attention.AttentionGrad([layout] * 4, [layout] * 3, FACTORS)
    backward(*map(address, (*memories, *results[1:])))
    for memory, reference in zip(results, expected(*values), strict=True):
        close(memory, reference, dtype)


def check_float32(
    shape: tuple[int, int, int, int, int],
    scale: float = 1.0,
    padding: int = 0,
    factors: tuple[float, ...] = USUAL_FACTORS,
) -> None:
    """Compare the kernels for (images, queries, keys, heads, channels), with `scale` times the usual q.

    `padding`: q, k and v are parts of tensors with this many more channels, as if they were computed together.
    """
    images, num_queries, num_keys, heads, channels = shape
    queries, keys = (images, num_queries, heads, channels), (images, num_keys, heads, channels)
    layouts = [by_head("float32", *s) for s in (queries, keys, keys, queries)]
    rng = np.random.default_rng(num_queries)
    values = [rng.standard_normal(s) for s in (queries, keys, keys, queries)]
    values[0] *= scale / np.sqrt(channels)
    memories = [stored(value, "float32") for value in values]
    references = expected(*map(loaded, memories), factors=factors)
    rounding = scale * np.abs(loaded(memories[1])).max() * 2.0**-23  # of a large score, relative to its exponential
    padded = [np.pad(memory, [(0, 0)] * 3 + [(0, padding)]) for memory in memories[:3]]
    inputs = [
        Layout("float32", layout.shape, by_head("float32", *memory.shape).strides)
        for layout, memory in zip(layouts[:3], padded, strict=True)
    ]
    out = empty("float32", *queries)
    Float32Attention(*inputs, out=layouts[3])(*map(address, (*padded, out)))
    close(out, references[0], "float32", rounding)
    for read in ([], [out]):
        grads = [empty("float32", *s) for s in (queries, keys, keys)]
        kernel = Float32AttentionGrad([*inputs, layouts[3], *layouts[3:4] * len(read)], layouts[:3], factors)
        kernel(*map(address, (*padded, memories[3], *read, *grads)))
        for memory, reference in zip(grads, references[1:], strict=True):
            close(memory, reference, "float32", rounding, least_scale=1.0)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 32),
        (16, 5, 5, 3, 48),
        (16, 197, 197, 2, 64),
        (1, 577, 577, 3, 80),
        (1, 197, 197, 2, 128),
        (16, 1, 197, 3, 64),
        (2, 7, 577, 2, 32),
    ],
    ids=str,
)
def test_float32(shape: tuple[int, int, int, int, int]) -> None:
    check_float32(shape)


@pytest.mark.parametrize("factors", [FACTORS, USUAL_FACTORS])
@pytest.mark.parametrize("score_bytes", [1, 4 * 2 * 13 * 5, 4 * 2 * 13 * 11 * 2, 4 << 20])
def test_float32_by_parts(monkeypatch: pytest.MonkeyPatch, score_bytes: int, factors: tuple[float, ...]) -> None:
    """One query at a time; parts of an image's queries, the last one smaller; two images, of three; all at once."""
    monkeypatch.setattr(attention_float32, "_SCORE_BYTES", score_bytes)
    check_float32((3, 11, 13, 2, 8), factors=factors)


def test_float32_of_operands_within_larger_tensors() -> None:
    check_float32((2, 9, 9, 2, 8), padding=16)


@pytest.mark.parametrize("scale", [8.0, 20.0, 200.0])
def test_float32_of_large_scores(scale: float) -> None:
    """Their exponentials are large in the first case, in the second too large, in the third infinite."""
    check_float32((2, 31, 31, 2, 16), scale)


def test_float32_of_values_that_are_not_finite() -> None:
    """They stay not finite, so that training notices."""
    layout = by_head("float32", 1, 3, 1, 8)
    (q, _), (k, _), (v, _) = (normal_values("float32", 1, 3, 1, 8) for _ in range(3))
    q[0, 1, 0, 2] = np.nan
    out = empty("float32", 1, 3, 1, 8)
    Float32Attention(layout, layout, layout, layout)(*map(address, (q, k, v, out)))
    assert np.isnan(out[0, 1]).all() and np.isfinite(out[0, [0, 2]]).all()
