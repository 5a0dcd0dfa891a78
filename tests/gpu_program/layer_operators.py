"""Operators of compiled programs: products, normalization, activations, attention, dropout.

operators.py explains how an operator is written. Shapes: B images, N tokens, H heads with d channels each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import paddle

from gpu_program.array_operators import Array, sum_to

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_erf = np.vectorize(math.erf, otypes=[np.float32])


# Matrix products


def _transposed(x: Array, is_transposed: bool) -> Array:
    return np.swapaxes(x, -1, -2) if is_transposed else x


def matmul(x: Array, y: Array, *, transpose_x: bool, transpose_y: bool) -> Array:
    """Return x y, either of which may be transposed: [..., M, K] and [..., K, N] to [..., M, N]."""
    return np.matmul(_transposed(x, transpose_x), _transposed(y, transpose_y))


def matmul_grad(x: Array, y: Array, grad: Array, *, transpose_x: bool, transpose_y: bool) -> tuple[Array, Array]:
    """Return the gradients of x and y. For z = x y they are z' y^T and x^T z'."""
    left, right = _transposed(x, transpose_x), _transposed(y, transpose_y)
    left_grad = np.matmul(grad, _transposed(right, True))
    if y.ndim == 2:  # one product over all rows, as cuBLAS computes it
        right_grad = np.matmul(left.reshape(-1, left.shape[-1]).T, grad.reshape(-1, grad.shape[-1]))
    else:
        right_grad = np.matmul(_transposed(left, True), grad)
    return (
        sum_to(_transposed(left_grad, transpose_x), x.shape).copy(),
        sum_to(_transposed(right_grad, transpose_y), y.shape).copy(),
    )


def fused_gemm_epilogue(
    x: Array, y: Array, bias: Array, *, trans_x: bool, trans_y: bool, activation: str
) -> tuple[Array, Array | None]:
    """Return activation(x y + bias), and for GELU the input of the activation, which its gradient needs.

    cuBLASLt computes GELU by its tanh approximation.
    """
    out = matmul(x, y, transpose_x=trans_x, transpose_y=trans_y) + bias
    if activation == "none":
        return out, None
    assert activation == "gelu", activation
    return gelu(out, approximate=True), out


def fused_gemm_epilogue_grad(
    x: Array,
    y: Array,
    activation_input: Array | None,
    grad: Array,
    *,
    trans_x: bool,
    trans_y: bool,
    activation_grad: str,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, y and the bias, of x y + bias.

    With `activation_grad`, x is the result of a GELU with this input, and its gradient is that of the input.
    """
    x_grad, y_grad = matmul_grad(x, y, grad, transpose_x=trans_x, transpose_y=trans_y)
    if activation_grad != "none":
        assert activation_grad == "gelu_grad", activation_grad
        x_grad = gelu_grad(activation_input, x_grad, approximate=True)
    return x_grad, y_grad, grad.reshape(-1, grad.shape[-1]).sum(0)


# Normalization and activations


def layer_norm(
    x: Array, weight: Array, bias: Array, *, epsilon: float, begin_norm_axis: int
) -> tuple[Array, Array, Array]:
    """Normalize the last axis (arXiv 1607.06450). Returns also the mean and the variance, [...] float32."""
    assert begin_norm_axis == x.ndim - 1, begin_norm_axis
    average = x.mean(-1, keepdims=True)
    variance = np.square(x - average).mean(-1, keepdims=True)
    normalized = (x - average) / np.sqrt(variance + np.float32(epsilon))
    return normalized * weight + bias, average[..., 0], variance[..., 0]


def layer_norm_grad(
    x: Array,
    weight: Array,
    bias: Array,
    average: Array,
    variance: Array,
    grad: Array,
    *,
    epsilon: float,
    begin_norm_axis: int,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, weight and bias.

    With n = (x - mean) / deviation and g the gradient of n, that of x is (g - mean(g) - n mean(g n)) / deviation.
    """
    deviation = np.sqrt(variance + np.float32(epsilon))[..., np.newaxis]
    normalized = (x - average[..., np.newaxis]) / deviation
    normalized_grad = grad * weight
    x_grad = normalized_grad - normalized_grad.mean(-1, keepdims=True)
    x_grad -= normalized * (normalized_grad * normalized).mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return x_grad / deviation, (grad * normalized).sum(rows), grad.sum(rows)


def gelu(x: Array, *, approximate: bool) -> Array:
    """Return x P(X <= x) for a normally distributed X (arXiv 1606.08415), exactly or by the tanh approximation."""
    if approximate:
        return 0.5 * x * (1 + np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2.0)))


def gelu_grad(x: Array, grad: Array, *, approximate: bool) -> Array:
    """Return the gradient of GELU's input: of x P, grad (P + x P')."""
    if approximate:
        tanh = np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3))
        slope = 0.5 * (1 - tanh * tanh) * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
        return grad * (0.5 * (1 + tanh) + x * slope)
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return grad * (0.5 * (1 + _erf(x / math.sqrt(2.0))) + x * density)


def softmax(x: Array, *, axis: int) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def softmax_grad(out: Array, grad: Array, *, axis: int) -> Array:
    return out * (grad - (grad * out).sum(axis, keepdims=True))


def log_softmax(x: Array, *, axis: int) -> Array:
    shifted = x - x.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


def log_softmax_grad(out: Array, grad: Array, *, axis: int) -> Array:
    return grad - np.exp(out) * grad.sum(axis, keepdims=True)


# Dropout. `new_seed` returns the next number of the rank's random generator.

Seeds = Callable[[], int]


def keep_mask(shape: tuple[int, ...], p: float, seed: int) -> Array:
    """Return 1 where an element is kept, with probability 1 - p, and 0 elsewhere, uint8, as a function of the seed.

    These are the masks of Paddle's CPU kernel, with which a program is compared. A GPU draws others from the same seed.
    """
    dropped_ones = paddle._C_ops.dropout(paddle.ones(shape), None, p, False, "upscale_in_train", seed, True)
    return (dropped_ones.numpy() != 0).astype(np.uint8)


def _drop(x: Array, mask: Array, p: float) -> Array:
    return x * mask / np.float32(1 - p)


def dropout(
    x: Array,
    seed_tensor: Array | None,
    p: Array,
    *,
    is_test: bool,
    mode: str,
    seed: int,
    fix_seed: bool,
    new_seed: Seeds,
) -> tuple[Array, Array]:
    """Set elements to 0 with probability p [1], and divide the others by 1 - p. Returns also the mask, uint8.

    Without a `seed_tensor` [1], the mask comes from the rank's generator.
    """
    assert (is_test, mode, seed, fix_seed) == (False, "upscale_in_train", 0, False)
    mask = keep_mask(x.shape, p.item(), new_seed() if seed_tensor is None else int(seed_tensor.item()))
    return _drop(x, mask, p.item()), mask


def dropout_grad(mask: Array, grad: Array, p: Array, *, is_test: bool, mode: str) -> Array:
    assert (is_test, mode) == (False, "upscale_in_train")
    return _drop(grad, mask, p.item())


def fused_dropout_add(
    x: Array,
    y: Array,
    seed_tensor: Array | None,
    *,
    p: float,
    is_test: bool,
    mode: str,
    seed: int,
    fix_seed: bool,
    new_seed: Seeds,
) -> tuple[Array, Array]:
    """Return dropout(x) + y, and [2] int64, from which the gradient draws the mask again."""
    assert (is_test, mode, seed, fix_seed) == (False, "upscale_in_train", 0, False)
    mask_seed = new_seed() if seed_tensor is None else int(seed_tensor.item())
    return _drop(x, keep_mask(x.shape, p, mask_seed), p) + y, np.array([mask_seed, 0], np.int64)


def fused_dropout_add_grad(
    seed_offset: Array, grad: Array, *, p: float, is_test: bool, mode: str, fix_seed: bool
) -> tuple[Array, Array]:
    """Return the gradients of x and y."""
    assert (is_test, mode, fix_seed) == (False, "upscale_in_train", False)
    return _drop(grad, keep_mask(grad.shape, p, int(seed_offset[0])), p), grad.copy()


# Attention. `rounded` rounds to the dtype of the inputs, as the kernel does with the weights before their product.


def _heads_first(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3)


def flash_attn(
    q: Array,
    k: Array,
    v: Array,
    fixed_seed_offset: Array | None,
    attn_mask: Array | None,
    *,
    dropout: float,
    causal: bool,
    return_softmax: bool,
    is_test: bool,
    rng_name: str,
    rounded: Callable[[Array], Array],
    new_seed: Seeds,
) -> tuple[Array, None, Array, Array]:
    """Return softmax(q k^T / sqrt(d)) v, [B, N, H, d] like the inputs (FlashAttention-2, arXiv 2307.08691).

    Returns also the logarithm of the softmax's denominators, [B, H, N] float32 whatever the program declares, and the
    seed of dropout, [2] int64. The weights, relative to the largest, are rounded before they are multiplied by v, and
    the result is divided by their sum afterwards.
    """
    assert (fixed_seed_offset, attn_mask, causal, return_softmax, rng_name) == (None, None, False, False, "")
    q, k, v = (_heads_first(x) for x in (q, k, v))  # [B, H, N, d]
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * np.float32(q.shape[-1] ** -0.5)  # [B, H, N, N]
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    seed = 0
    if dropout > 0.0 and not is_test:
        seed = new_seed()
        weights = _drop(weights, keep_mask(weights.shape, dropout, seed), dropout)
    out = np.matmul(rounded(weights), v) / total
    return _heads_first(out), None, (largest + np.log(total))[..., 0], np.array([seed, 0], np.int64)


def flash_attn_grad(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    log_sum: Array,
    seed_offset: Array,
    attn_mask: Array | None,
    grad: Array,
    *,
    dropout: float,
    causal: bool,
    rounded: Callable[[Array], Array],
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v, from weights that are computed again. `log_sum`: of the forward operator.

    With P the weights and O the result: P' = O' v^T, and the scores' gradient is P (P' - sum(O' O)).
    """
    assert attn_mask is None and not causal
    scale = np.float32(q.shape[-1] ** -0.5)
    q, k, v, out, grad = (_heads_first(x) for x in (q, k, v, out, grad))  # [B, H, N, d]
    weights = np.exp(np.matmul(q, np.swapaxes(k, -1, -2)) * scale - log_sum[..., np.newaxis])  # [B, H, N, N]
    dropped, weights_grad = weights, np.matmul(grad, np.swapaxes(v, -1, -2))
    if dropout > 0.0:
        mask = keep_mask(weights.shape, dropout, int(seed_offset[0]))
        dropped, weights_grad = _drop(weights, mask, dropout), _drop(weights_grad, mask, dropout)
    v_grad = np.matmul(np.swapaxes(rounded(dropped), -1, -2), grad)
    scores_grad = rounded(weights * (weights_grad - (grad * out).sum(-1, keepdims=True)))
    q_grad = np.matmul(scores_grad, k) * scale
    k_grad = np.matmul(np.swapaxes(scores_grad, -1, -2), q) * scale
    return _heads_first(q_grad), _heads_first(k_grad), _heads_first(v_grad)
