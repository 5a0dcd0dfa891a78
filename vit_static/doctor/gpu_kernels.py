"""Calls that only a GPU supports: the fused kernels by themselves, and work that keeps the GPU busy."""

from __future__ import annotations

import time
from typing import Any

import paddle
from paddle.incubate.nn import functional as fused

from vit_static.model.attention import flash_attention
from vit_static.model.layers import Dropout

_BUSY_SIZE = 8192  # rows and columns of the products that keep a GPU busy: tens of milliseconds each
_MAX_PRODUCTS = 100


def attention(query: Any, key: Any, value: Any) -> Any:
    """Return the model's fused attention, [B, N, H, d] in and out."""
    return flash_attention(query, key, value, Dropout(0.0))


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """Return x @ weight + bias by cuBLASLt's epilogue, as the pass `fused linear layers` has it."""
    return fused.fused_linear(x, weight, bias)


def dropout_add(x: Any, residual: Any, p: float) -> Any:
    """Return dropout(x) + residual in one kernel, as the pass `fused dropout` has it."""
    return fused.fused_dropout_add(x, residual, p=p, training=True)


def wait() -> None:
    """Wait until the GPU has done all that was started."""
    paddle.device.synchronize()


def keep_busy(seconds: float) -> None:
    """Start products that take the GPU about this long, without waiting for them."""
    values = paddle.ones([_BUSY_SIZE, _BUSY_SIZE], "float32")
    paddle.matmul(values, values)  # the first call creates cuBLAS's handle
    wait()
    started = time.perf_counter()
    paddle.matmul(values, values)
    wait()
    per_product = max(time.perf_counter() - started, 1e-5)
    for _ in range(min(int(seconds / per_product) + 1, _MAX_PRODUCTS)):
        paddle.matmul(values, values)
