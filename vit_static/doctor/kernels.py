"""Checks of single kernels, forward and backward, against Paddle's plain operators in float32.

On a GPU these are the fused kernels, on a CPU oneDNN's. The operands have the sizes of the config's model and are
rounded to its precision; both sides get the same rounded operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from vit_static.doctor import gpu_kernels
from vit_static.doctor.check import Result, failed, ok, skipped
from vit_static.doctor.subject import Subject
from vit_static.model.attention import attention_by_matmul
from vit_static.model.layers import Dropout
from vit_static.program.cpu import onednn, primitives
from vit_static.program.cpu.attention import attention, attention_grad
from vit_static.program.cpu.attention_float32 import is_supported
from vit_static.program.cpu.column_sum import column_sum
from vit_static.program.cpu.gelu import gelu, gelu_grad
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.swiglu import swiglu, swiglu_grad
from vit_static.program.passes import is_fused_linear
from vit_static.program.precision import uses_flash_attention

NUM_IMAGES = 4  # in the operands
_UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
Arrays = Mapping[str, Any]


def bound(dtype: str, length: int) -> float:
    """Return the allowed error of a kernel, as a share of the result's norm, for sums of `length` products.

    A sum of n rounded terms has a relative error of about sqrt(n) u in float32 arithmetic (Higham and Mary, A New
    Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019, theorem 3.1 with a small
    lambda: here 4). A kernel in half precision also rounds its result and up to three intermediate values, such as the
    attention weights, with unit roundoff u each: 8 u, twice their number. tests/doctor/test_kernels.py emulates these
    roundings.
    """
    of_sums = 4.0 * math.sqrt(length) * _UNIT_ROUNDOFF["float32"]
    return of_sums if dtype == "float32" else of_sums + 8.0 * _UNIT_ROUNDOFF[dtype]


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference as a share of the norm of `expected`; infinity if a value isn't finite."""
    if not np.isfinite(value).all():
        return math.inf
    difference = np.linalg.norm((value.astype(np.float64) - expected).ravel())
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64).ravel())), 1e-30))


def why_no_flash_attention(subject: Subject) -> str | None:
    """Return why the config's program has no fused attention on a GPU, or None if it has."""
    config = subject.config
    if uses_flash_attention(config.model, subject.precision, config.parallel, config.kernels, "gpu"):
        return None
    return "this config computes attention by plain products"


def why_no_onednn(subject: Subject) -> str | None:
    """Return why the config's program has no kernels of ours on a CPU, or None if it has."""
    if not subject.config.kernels.onednn:
        return "kernels.onednn=false"
    return onednn.why_unsupported(onednn.library_version())


def check_attention(subject: Subject) -> Result:
    """Attention and its gradients, at the config's head_dim and number of tokens."""
    variant = subject.variant
    num_heads = variant.num_heads // subject.mesh_shape.mp
    shape = (NUM_IMAGES, subject.num_tokens, num_heads, subject.head_dim)
    dtype, inputs = subject.compute_dtype, _random(subject, "qkv", shape)
    out_grad = _random(subject, "g", shape)["g"]
    compute = _fused_attention if subject.on_gpu else _onednn_attention
    expected = _plain(lambda q, k, v: attention_by_matmul(q, k, v, Dropout(0.0)), inputs, out_grad)
    errors = _errors(compute(inputs, out_grad, dtype), expected)
    length = subject.num_tokens + subject.head_dim
    case = f"{num_heads} heads of {subject.head_dim}, {subject.num_tokens} tokens, {dtype}"
    return _compared(case, {"": errors}, {"": bound(dtype, length)})


def check_linear(subject: Subject) -> Result:
    """Linear layers and their gradients: width to MLP size, MLP size to width, width to number of classes.

    On a GPU only those that the program fuses.
    """
    variant, dtype = subject.variant, subject.compute_dtype
    mp = subject.mesh_shape.mp
    num_rows = NUM_IMAGES * subject.num_tokens
    num_classes = subject.config.model.num_classes
    layers = {
        "first MLP layer": (num_rows, variant.width, variant.mlp_dim // mp),
        "second MLP layer": (num_rows, variant.mlp_dim // mp, variant.width),
        "head": (NUM_IMAGES * 4, variant.width, num_classes // mp if num_classes % mp == 0 else num_classes),
    }
    if subject.on_gpu:
        layers = {name: sizes for name, sizes in layers.items() if is_fused_linear(*sizes[1:])}
    if not layers:
        return skipped("no layer has sizes that are multiples of 8")
    compute = _fused_linear if subject.on_gpu else _onednn_linear
    errors: dict[str, dict[str, float]] = {}
    bounds: dict[str, float] = {}
    for name, (rows, columns_in, columns_out) in layers.items():
        inputs = {
            **_random(subject, "x", (rows, columns_in)),
            **_random(subject, "w", (columns_in, columns_out), scale=columns_in**-0.5),
            **_random(subject, "b", (columns_out,)),
        }
        out_grad = _random(subject, "g", (rows, columns_out))["g"]
        expected = _plain(lambda x, w, b: paddle.matmul(x, w) + b, inputs, out_grad)
        errors[name] = _errors(compute(inputs, out_grad, dtype), expected)
        bounds[name] = bound(dtype, max(rows, columns_in, columns_out))
    head = f", to {layers['head'][2]} classes" if "head" in layers else ""
    case = f"{variant.width} to {variant.mlp_dim // mp} and back{head}, {dtype}"
    return _compared(case, errors, bounds)


def check_elementwise(subject: Subject) -> Result:
    """GELU or SwiGLU, softmax and LayerNorm of oneDNN, and their gradients."""
    variant, dtype = subject.variant, subject.compute_dtype
    num_rows = NUM_IMAGES * subject.num_tokens
    approximate, epsilon = subject.config.model.gelu == "tanh", subject.config.model.layer_norm_epsilon
    functional = paddle.nn.functional
    hidden, tokens = (num_rows, variant.mlp_dim), (num_rows, subject.num_tokens)
    channels = _random(subject, "sb", (variant.width,))
    cases: dict[str, tuple[Callable[..., Any], Arrays, Callable[..., Arrays], str]] = {
        "GELU": (
            lambda x: functional.gelu(x, approximate),
            _random(subject, "x", hidden),
            lambda inputs, grad: _onednn_gelu(inputs, grad, dtype, approximate),
            dtype,
        ),
        "softmax": (
            lambda x: functional.softmax(x, -1),
            _random(subject, "x", tokens),
            lambda inputs, grad: _onednn_softmax(inputs, grad, dtype),
            dtype,
        ),
        "LayerNorm": (
            lambda x, s, b: functional.layer_norm(x, [variant.width], s, b, epsilon),
            {**_random(subject, "x", (num_rows, variant.width)), **channels},
            lambda inputs, grad: _onednn_layer_norm(inputs, grad, epsilon),
            "float32",
        ),
    }
    if subject.config.model.mlp == "swiglu":
        del cases["GELU"]
        if dtype == "float32":  # the only dtype with a kernel
            cases["SwiGLU"] = (functional.swiglu, _random(subject, "xh", hidden), _onednn_swiglu, dtype)
    errors, bounds = {}, {}
    for name, (plain, inputs, compute, computed_in) in cases.items():
        shape = inputs["x"].shape
        out_grad = _random(subject, "g", shape)["g"]
        errors[name] = _errors(compute(inputs, out_grad), _plain(plain, inputs, out_grad))
        bounds[name] = bound(computed_in, max(shape))
    case = ", ".join(f"{name} of {inputs['x'].shape[1]}" for name, (_, inputs, *_) in cases.items()) + f", {dtype}"
    return _compared(case, errors, bounds)


def check_dropout(subject: Subject) -> Result:
    """The fused dropout sets a share p of the elements to 0, scales the others, and uses the same mask backward."""
    p = subject.config.model.dropout
    shape = (NUM_IMAGES * subject.num_tokens, subject.variant.width)
    values = _random(subject, "x", shape)
    x = _tensor(np.abs(values["x"]) + 1.0, subject.compute_dtype)  # no element is 0 by itself
    residual = paddle.zeros(shape, subject.compute_dtype)
    x.stop_gradient = residual.stop_gradient = False
    out = gpu_kernels.dropout_add(x, residual, p)
    out.backward(paddle.ones_like(out))
    out, x_values, x_grad, residual_grad = (
        tensor.astype("float32").numpy() for tensor in (out, x, x.grad, residual.grad)
    )
    is_kept = out != 0.0
    limit = bound(subject.compute_dtype, 1)
    scaled = x_values / (1.0 - p)
    if relative_error(out, np.where(is_kept, scaled, 0.0)) > limit:
        return failed(f"elements that are kept aren't scaled by 1 / (1 - {p:g})")
    if relative_error(x_grad, np.where(is_kept, 1.0 / (1.0 - p), 0.0)) > limit:
        return failed("the gradient doesn't have the mask and scale of the forward pass")
    if not (residual_grad == 1.0).all():
        return failed("the residual's gradient isn't the result's")
    # The number of zeros is binomial; six standard deviations are exceeded once in 5e8 times.
    share, tolerance = 1.0 - float(is_kept.mean()), 6.0 * math.sqrt(p * (1.0 - p) / out.size)
    if abs(share - p) > tolerance:
        return failed(f"{share:.4f} of the elements are dropped instead of {p:g}")
    return ok(f"{share:.4f} of {out.size} elements dropped at rate {p:g}, the same backward", dropped=share)


# -- the kernels under test ------------------------------------------------------------------------------------------


def _fused_attention(inputs: Arrays, out_grad: np.ndarray, dtype: str) -> Arrays:
    return _backward(gpu_kernels.attention, inputs, out_grad, dtype)


def _fused_linear(inputs: Arrays, out_grad: np.ndarray, dtype: str) -> Arrays:
    return _backward(gpu_kernels.linear, inputs, out_grad, dtype)


def _onednn_attention(inputs: Arrays, out_grad: np.ndarray, dtype: str) -> Arrays:
    """Run the kernels that lowering.py puts in: they read heads in place from [B, N, H, d], with scaled queries."""
    batch, num_tokens, num_heads, head_dim = out_grad.shape
    layout = dense(dtype, batch, num_tokens, num_heads, head_dim).permuted((0, 2, 1, 3))
    scale = head_dim**-0.5
    q, k, v, g = (_tensor(values, dtype) for values in (inputs["q"] * scale, inputs["k"], inputs["v"], out_grad))
    results = {name: paddle.empty(out_grad.shape, dtype) for name in ("out", "q", "k", "v")}
    _call(attention(layout, layout, layout, layout), q, k, v, results["out"])
    outs = [results["out"]] if is_supported(layout, layout) else []
    backward = attention_grad([layout] * (4 + len(outs)), [layout] * 3, (scale, 1.0, 1.0))
    _call(backward, q, k, v, g, *outs, results["q"], results["k"], results["v"])
    return _as_arrays(results)


def _onednn_linear(inputs: Arrays, out_grad: np.ndarray, dtype: str) -> Arrays:
    """Run the products of a linear layer: the bias is added as the result is written; its gradient comes from ones."""
    (rows, columns_in), columns_out = inputs["x"].shape, out_grad.shape[1]
    x, w, g = (dense(dtype, *shape) for shape in ((rows, columns_in), (columns_in, columns_out), (rows, columns_out)))
    out, x_grad, w_grad, b_grad = (
        dense("float32", *shape)
        for shape in ((rows, columns_out), (rows, columns_in), (columns_in, columns_out), (1, columns_out))
    )
    values = [_tensor(inputs[name], "float32" if name == "b" else dtype) for name in "xwb"]
    grad = _tensor(out_grad, dtype)
    results = {
        name: paddle.empty(layout.shape) for name, layout in (("out", out), ("x", x_grad), ("w", w_grad), ("b", b_grad))
    }
    _call(primitives.matmul(x, w, out, bias=b_grad), *values, results["out"])
    _call(primitives.matmul(g, w.transposed, x_grad), grad, values[1], results["x"])
    _call(primitives.matmul(x.transposed, g, w_grad), values[0], grad, results["w"])
    _call(column_sum(g), grad, results["b"])
    return {**_as_arrays(results), "b": results["b"].numpy()[0]}


def _onednn_gelu(inputs: Arrays, out_grad: np.ndarray, dtype: str, approximate: bool) -> Arrays:
    layout, x, grad, results = _operands(inputs, out_grad, dtype)
    _call(gelu(layout, approximate), x, results["out"])
    _call(gelu_grad(layout, approximate), x, grad, results["x"])
    return _as_arrays(results)


def _onednn_swiglu(inputs: Arrays, out_grad: np.ndarray) -> Arrays:
    layout, gate, grad, results = _operands(inputs, out_grad, "float32")
    x = _tensor(inputs["h"], "float32")
    results["h"] = paddle.empty(out_grad.shape)
    _call(swiglu(layout), gate, x, results["out"])
    _call(swiglu_grad(layout), gate, x, grad, results["x"], results["h"])
    return _as_arrays(results)


def _onednn_softmax(inputs: Arrays, out_grad: np.ndarray, dtype: str) -> Arrays:
    layout, x, grad, results = _operands(inputs, out_grad, dtype)
    _call(primitives.softmax(layout, layout), x, results["out"])
    _call(primitives.softmax_grad(layout, layout, layout), results["out"], grad, results["x"])
    return _as_arrays(results)


def _onednn_layer_norm(inputs: Arrays, out_grad: np.ndarray, epsilon: float) -> Arrays:
    layout, x, grad, results = _operands(inputs, out_grad, "float32")
    scale, shift = (_tensor(inputs[name], "float32") for name in "sb")
    mean, variance = (paddle.empty([len(out_grad)]) for _ in range(2))
    results |= {name: paddle.empty(scale.shape) for name in "sb"}
    _call(primitives.layer_norm(layout, layout, epsilon), x, scale, shift, results["out"], mean, variance)
    backward = primitives.layer_norm_grad(layout, layout, layout, epsilon)
    _call(backward, x, scale, shift, mean, variance, grad, results["x"], results["s"], results["b"])
    return _as_arrays(results)


def _operands(inputs: Arrays, out_grad: np.ndarray, dtype: str) -> tuple[Layout, Any, Any, dict[str, Any]]:
    """Return the layout of x, x, the gradient, and memory for the results, all of one shape."""
    results = {name: paddle.empty(out_grad.shape, dtype) for name in ("out", "x")}
    return dense(dtype, *out_grad.shape), _tensor(inputs["x"], dtype), _tensor(out_grad, dtype), results


def _call(kernel: Callable[..., None], *tensors: Any) -> None:
    """Call a kernel with the addresses of its operands."""
    kernel(*(tensor.data_ptr() for tensor in tensors))


# -- operands and comparison -----------------------------------------------------------------------------------------


def _random(subject: Subject, names: str, shape: Sequence[int], scale: float = 1.0) -> dict[str, np.ndarray]:
    """Return normally distributed arrays, rounded to the config's precision, by their names of one letter."""
    rng = np.random.default_rng([subject.config.seed, *map(ord, names), *shape])
    dtype = subject.compute_dtype
    arrays = {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name in names}
    return {name: _tensor(values, dtype).astype("float32").numpy() for name, values in arrays.items()}


def _tensor(values: np.ndarray, dtype: str) -> Any:
    return paddle.to_tensor(np.ascontiguousarray(values)).astype(dtype)


def _plain(function: Callable[..., Any], inputs: Arrays, out_grad: np.ndarray) -> Arrays:
    """Return the result and the gradients of a function of Paddle's plain operators in float32."""
    return _backward(function, inputs, out_grad, "float32")


def _backward(function: Callable[..., Any], inputs: Arrays, out_grad: np.ndarray, dtype: str) -> Arrays:
    """Return a function's result under "out", and under each input's name its gradient, computed in `dtype`."""
    tensors = {name: _tensor(values, dtype) for name, values in inputs.items()}
    for tensor in tensors.values():
        tensor.stop_gradient = False
    out = function(*tensors.values())
    out.backward(_tensor(out_grad, dtype))
    return _as_arrays({"out": out, **{name: tensor.grad for name, tensor in tensors.items()}})


def _as_arrays(tensors: Arrays) -> Arrays:
    return {name: tensor.astype("float32").numpy() for name, tensor in tensors.items()}


def _errors(values: Arrays, expected: Arrays) -> dict[str, float]:
    return {name: relative_error(values[name], array) for name, array in expected.items()}


def _compared(case: str, errors: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]) -> Result:
    """Return the result of a comparison, by the part that is worst relative to its bound."""
    share = {(part, name): error / bounds[part] for part, by_name in errors.items() for name, error in by_name.items()}
    part, name = max(share, key=lambda key: share[key])
    error, figures = errors[part][name], {"errors": {part: dict(by_name) for part, by_name in errors.items()}}
    if share[part, name] > 1.0:
        wrong = "the result" if name == "out" else f"the gradient of {name}"
        of_part = f" of the {part}" if part else ""
        return failed(
            f"{case}: {wrong}{of_part} is off by {error:.1e} of its norm, and {bounds[part]:.1e} is allowed", **figures
        )
    return ok(f"{case}: errors of at most {error:.1e} of the norm, {bounds[part]:.1e} are allowed", **figures)
