"""Every operator of the interpreter's table against Paddle's CPU kernel, its automatic differentiation, or NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from gpu_program import layer_operators
from gpu_program.operators import OPERATORS
from vit_static.model.attention import attention_by_matmul

_ops = paddle._C_ops
_rng = np.random.default_rng(0)
SEED = 1234  # of dropout masks


def normal(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X, Y, ROW, COLUMN = normal(3, 4, 5), normal(3, 4, 5), normal(5), normal(4, 1)
POSITIVE, WEIGHT = np.abs(X) + 0.1, normal(5, 7)
BOOL = X > 0
WITH_NAN = np.where(BOOL, X, np.float32("nan"))
QUERY, KEY, VALUE = normal(2, 6, 3, 8), normal(2, 6, 3, 8), normal(2, 6, 3, 8)  # [B, N, H, d]


def run_operator(name: str, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
    """Return the results of an operator of the table."""
    function = OPERATORS[f"pd_op.{name}"].function
    results = function(*inputs, **attributes)
    return results if isinstance(results, tuple) else (results,)


def tensors(values: Sequence[Any], differentiable: bool = False) -> list[Any]:
    """Convert arrays, also in lists, to Paddle's tensors."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return tensors(value, differentiable)
        is_float = isinstance(value, np.ndarray) and value.dtype == np.float32
        return paddle.to_tensor(value, stop_gradient=not (differentiable and is_float))

    return [convert(value) for value in values]


def assert_equal(actual: Any, expected: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Compare results with tensors, arrays or lists of them; None isn't compared."""
    if expected is None:
        return
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other, rtol, atol)
    else:
        expected = np.asarray(expected)
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol, atol)


# Forward operators: inputs, attributes, and Paddle's function of the same inputs.
Forward = tuple[list[Any], dict[str, Any], Callable[..., Any]]
FORWARD: dict[str, list[Forward]] = {
    "add": [([X, ROW], {}, paddle.add)],
    "add_": [([X, Y], {}, paddle.add)],
    "add_n": [([[X, Y, X]], {}, paddle.add_n)],
    "arange": [
        ([np.array([0.0]), np.array([5.0]), np.array([1.0])], {"dtype": None}, lambda *_: paddle.arange(0, 5, 1))
    ],
    "argmax": [([X, ints(-1)], {"keepdims": False, "flatten": False, "dtype": None}, lambda x, _: x.argmax(-1))],
    "assign": [([X], {}, paddle.assign)],
    "assign_out_": [([X, Y], {}, lambda x, y: paddle.assign(x, y))],
    "bitwise_and": [([BOOL, Y > 0], {}, paddle.bitwise_and)],
    "bitwise_or": [([BOOL, Y > 0], {}, paddle.bitwise_or)],
    "cast": [([X], {"dtype": None}, lambda x: x.astype("float64"))],
    "clip": [([X, np.float32([-0.5]), np.float32([0.5])], {}, lambda x, low, high: paddle.clip(x, -0.5, 0.5))],
    "concat": [([[X, Y], ints(1)], {}, lambda xs, _: paddle.concat(xs, 1))],
    "divide": [([X, POSITIVE], {}, paddle.divide)],
    "equal": [([X, np.where(BOOL, X, Y)], {}, paddle.equal)],
    "expand": [([ROW, ints(4, -1)], {}, lambda x, _: x.expand([4, 5]))],
    "flatten": [([X], {"start_axis": 1, "stop_axis": 2}, lambda x: x.flatten(1, 2))],
    "full": [([], {"shape": [2, 3], "value": 0.5, "dtype": None}, lambda: paddle.full([2, 3], 0.5))],
    "full_int_array": [([], {"value": [4, -1], "dtype": None}, lambda: paddle.to_tensor([4, -1]))],
    "full_like": [([X, np.float32([2.0])], {"dtype": None}, lambda x, _: paddle.full_like(x, 2.0))],
    "gelu": [([X], {"approximate": exact}, partial(F.gelu, approximate=exact)) for exact in (False, True)],
    "greater_equal": [([X, ROW], {}, paddle.greater_equal)],
    "greater_than": [([X, ROW], {}, paddle.greater_than)],
    "isfinite": [([WITH_NAN], {}, paddle.isfinite)],
    "isnan": [([WITH_NAN], {}, paddle.isnan)],
    "layer_norm": [
        (
            [X, ROW, normal(5)],
            {"epsilon": 1e-6, "begin_norm_axis": 2},
            lambda x, weight, bias: (F.layer_norm(x, 5, weight, bias, 1e-6), x.mean(-1), x.var(-1, unbiased=False)),
        )
    ],
    "less_than": [([X, ROW], {}, paddle.less_than)],
    "log_softmax": [([X], {"axis": -1}, F.log_softmax)],
    "logical_or": [([BOOL, Y > 0], {}, paddle.logical_or)],
    "matmul": [
        (
            [np.swapaxes(X, -1, -2) if left else X, WEIGHT.T if right else WEIGHT],
            {"transpose_x": left, "transpose_y": right},
            partial(paddle.matmul, transpose_x=left, transpose_y=right),
        )
        for left in (False, True)
        for right in (False, True)
    ],
    "max": [([X, ints(1)], {"keepdim": True}, lambda x, _: x.max(1, keepdim=True))],
    "maximum": [([X, Y], {}, paddle.maximum)],
    "minimum": [([X, Y], {}, paddle.minimum)],
    "mean": [([X, ints()], {"keepdim": False}, lambda x, _: x.mean())],
    "multiply": [([X, COLUMN], {}, paddle.multiply)],
    "one_hot": [([ints(2, 0, 4), ints(5)], {}, lambda x, _: F.one_hot(x, 5))],
    "reshape": [([X, ints(0, -1)], {}, lambda x, _: x.reshape([0, -1]))],
    "rsqrt": [([POSITIVE], {}, paddle.rsqrt)],
    "scale": [
        (
            [X, np.float32([3.0])],
            {"bias": 0.5, "bias_after_scale": after},
            lambda x, _, after=after: paddle.scale(x, 3.0, 0.5, after),
        )
        for after in (False, True)
    ],
    "set_value_with_tensor_": [
        (
            [X, np.float32([0.0]), ints(), ints(), ints()],
            {"axes": [], "decrease_axes": [], "none_axes": []},
            lambda x, *_: paddle.zeros_like(x),
        )
    ],
    "sign": [([X], {}, paddle.sign)],
    "slice": [
        (
            [X, ints(0, 2), ints(1, 4)],
            {"axes": [0, 2], "infer_flags": [1, 1], "decrease_axis": [0]},
            lambda x, *_: x[0, :, 2:4],
        )
    ],
    "softmax": [([X], {"axis": -1}, F.softmax)],
    "split": [([X, ints(1, 3), ints(1)], {}, lambda x, *_: paddle.split(x, [1, 3], 1))],
    "split_with_num": [([X, ints(1)], {"num": 2}, lambda x, _: paddle.split(x, 2, 1))],
    "sqrt": [([POSITIVE], {}, paddle.sqrt)],
    "exp": [([X], {}, paddle.exp)],
    "log": [([POSITIVE], {}, paddle.log)],
    "squared_l2_norm": [([X], {}, _ops.squared_l2_norm)],
    "stack": [([[X, Y]], {"axis": 1}, lambda xs: paddle.stack(xs, 1))],
    "subtract": [([X, ROW], {}, paddle.subtract)],
    "sum": [
        ([X, ints(*axes)], {"keepdim": keep, "dtype": None}, lambda x, _, a=axes, k=keep: x.sum(a or None, keepdim=k))
        for axes in ([], [0, 2])
        for keep in (False, True)
    ],
    "take_along_axis": [([X[0], ints(1, 0, 2, 4)[:, None]], {"axis": 1}, lambda x, i: x.take_along_axis(i, 1))],
    "tanh": [([X], {}, paddle.tanh)],
    "transpose": [([X], {"perm": [2, 0, 1]}, lambda x: x.transpose([2, 0, 1]))],
    "unsqueeze": [([X, ints(0, 2)], {}, lambda x, _: x.unsqueeze([0, 2]))],
    "where": [([BOOL, X, Y], {}, paddle.where)],
}


@pytest.mark.parametrize("name", FORWARD)
def test_a_forward_operator_equals_paddles(name):
    for inputs, attributes, reference in FORWARD[name]:
        expected = reference(*tensors(inputs))
        results = run_operator(name, *inputs, **attributes)
        if len(results) == 1:
            (results,) = results
        assert_equal(results, expected)


@dataclass
class Gradient:
    """How a gradient operator is called. `forward`: its forward operator, in Paddle, of differentiable `inputs`."""

    inputs: list[Any]
    forward: Callable[..., Any]
    arguments: Callable[[list[Any], Any, Any], Sequence[Any]]  # of the inputs, the result and its gradient
    attributes: dict[str, Any] = field(default_factory=dict)


def _input_and_grad(inputs: list[Any], out: Any, grad: Any) -> list[Any]:
    return [*inputs, grad]


def _out_and_grad(inputs: list[Any], out: Any, grad: Any) -> list[Any]:
    return [out, grad]


def _grad(inputs: list[Any], out: Any, grad: Any) -> list[Any]:
    return [grad]


_REDUCED = {"keepdim": False, "reduce_all": False}
GRADIENTS: dict[str, list[Gradient]] = {
    "add_grad": [Gradient([X, ROW], paddle.add, _input_and_grad, {"axis": -1})],
    "concat_grad": [Gradient([X, Y[:, :1]], lambda x, y: paddle.concat([x, y], 1), lambda i, o, g: (i, g, ints(1)))],
    "flatten_grad": [Gradient([X], lambda x: x.flatten(1), _input_and_grad)],
    "gelu_grad": [
        Gradient([X], partial(F.gelu, approximate=exact), _input_and_grad, {"approximate": exact})
        for exact in (False, True)
    ],
    "log_softmax_grad": [Gradient([X], F.log_softmax, _out_and_grad, {"axis": -1})],
    "matmul_grad": [
        Gradient(
            [np.swapaxes(x, -1, -2) if left else x, np.swapaxes(y, -1, -2) if right else y],
            partial(paddle.matmul, transpose_x=left, transpose_y=right),
            _input_and_grad,
            {"transpose_x": left, "transpose_y": right},
        )
        for left, right in ((False, False), (False, True), (True, False), (True, True))
        for x, y in ((X, WEIGHT), (X, normal(3, 5, 2)))
    ],
    "mean_grad": [
        Gradient([X], lambda x, a=axes: x.mean(a or None), lambda i, o, g, a=axes: (*i, g, ints(*a)), _REDUCED)
        for axes in ([], [1])
    ],
    "multiply_grad": [
        Gradient([X, y], paddle.multiply, _input_and_grad, {"axis": -1})
        for y in (ROW, COLUMN, np.array(2.0, np.float32))
    ],
    "reshape_grad": [Gradient([X], lambda x: x.reshape([12, 5]), _input_and_grad)],
    "slice_grad": [
        Gradient(
            [X],
            lambda x: x[:, 1],
            lambda i, o, g: (*i, g, ints(1), ints(2)),
            {"axes": [1], "infer_flags": [1], "decrease_axis": [1]},
        )
    ],
    "softmax_grad": [Gradient([X], F.softmax, _out_and_grad, {"axis": -1})],
    "stack_grad": [Gradient([X, Y], lambda x, y: paddle.stack([x, y], 1), lambda i, o, g: (i, g), {"axis": 1})],
    "sum_grad": [
        Gradient([X], lambda x, a=axes: x.sum(a or None), lambda i, o, g, a=axes: (*i, g, ints(*a)), _REDUCED)
        for axes in ([], [0, 2])
    ],
    "tanh_grad": [Gradient([X], paddle.tanh, _out_and_grad)],
    "transpose_grad": [Gradient([X], lambda x: x.transpose([2, 0, 1]), _grad, {"perm": [2, 0, 1]})],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_operator_equals_automatic_differentiation(name):
    for case in GRADIENTS[name]:
        results, expected = differentiate(name, case)
        assert_equal(results, expected)


def differentiate(name: str, case: Gradient) -> tuple[list[Any], list[Any]]:
    """Return the gradients of the operator, and those of its forward operator in Paddle."""
    inputs = tensors(case.inputs, differentiable=True)
    out = case.forward(*inputs)
    grad = _rng.standard_normal(out.shape).astype(np.float32)
    expected = paddle.grad([out], inputs, [paddle.to_tensor(grad)])
    results = run_operator(name, *case.arguments(case.inputs, out.numpy(), grad), **case.attributes)
    return list(results[0] if isinstance(results[0], list) else results), expected


# Normalization and fused products


def test_layer_norm_grad_equals_automatic_differentiation():
    bias, attributes = normal(5), {"epsilon": 1e-6, "begin_norm_axis": 2}
    _, average, variance = run_operator("layer_norm", X, ROW, bias, **attributes)
    case = Gradient(
        [X, ROW, bias],
        lambda x, weight, bias: F.layer_norm(x, 5, weight, bias, 1e-6),
        lambda i, o, g: (*i, average, variance, g),
        attributes,
    )
    assert_equal(*differentiate("layer_norm_grad", case))


@pytest.mark.parametrize("trans_y", [False, True])
def test_fused_gemm_epilogue_equals_product_bias_and_activation(trans_y):
    weight, bias = WEIGHT.T.copy() if trans_y else WEIGHT, normal(7)
    attributes = {"trans_x": False, "trans_y": trans_y}

    def linear(x, weight, bias):
        return paddle.matmul(x, weight, transpose_y=trans_y) + bias

    def linear_of_gelu(x, weight, bias):
        return linear(F.gelu(x, approximate=True), weight, bias)

    expected = linear(*tensors([X, weight, bias]))
    out, reserved = run_operator("fused_gemm_epilogue", X, weight, bias, activation="none", **attributes)
    assert reserved is None
    assert_equal(out, expected)
    out, reserved = run_operator("fused_gemm_epilogue", X, weight, bias, activation="gelu", **attributes)
    assert_equal([out, reserved], [F.gelu(expected, approximate=True), expected])

    plain = Gradient([X, weight, bias], linear, lambda i, o, g: (X, weight, None, g), {"activation_grad": "none"})
    activated = np.asarray(F.gelu(paddle.to_tensor(X), approximate=True))
    after_gelu = Gradient(
        [X, weight, bias],
        linear_of_gelu,
        lambda i, o, g: (activated, weight, X, g),
        {"activation_grad": "gelu_grad"},
    )
    for case in (plain, after_gelu):
        case.attributes |= attributes
        assert_equal(*differentiate("fused_gemm_epilogue_grad", case))


# Dropout


_TRAINING = {"is_test": False, "mode": "upscale_in_train"}
_UNSEEDED = {"seed": 0, "fix_seed": False}


def test_dropout_equals_paddles_with_the_same_seed():
    seed, p = np.array([SEED], np.int32), np.float32([0.4])
    out, mask = run_operator("dropout", X, seed, p, new_seed=None, **_TRAINING, **_UNSEEDED)
    expected = _ops.dropout(*tensors([X, seed]), 0.4, False, "upscale_in_train", 0, False)
    assert_equal(out, expected)
    assert 0 < mask.mean() < 1
    grad = run_operator("dropout_grad", mask, Y, p, **_TRAINING)[0]
    np.testing.assert_allclose(grad, np.where(out == 0, 0, Y / 0.6), 1e-6)


def test_dropout_without_a_seed_draws_another_mask_each_time():
    seeds = iter([1, 2])
    draw = partial(run_operator, "dropout", X, None, np.float32([0.5]), new_seed=lambda: next(seeds))
    (_, first), (_, second) = (draw(**_TRAINING, **_UNSEEDED) for _ in range(2))
    assert np.any(first != second)


def test_fused_dropout_add_equals_dropout_and_addition():
    seed = np.array([SEED], np.int32)
    out, seed_offset = run_operator("fused_dropout_add", X, Y, seed, p=0.4, new_seed=None, **_TRAINING, **_UNSEEDED)
    dropped = _ops.dropout(*tensors([X, seed]), 0.4, False, "upscale_in_train", 0, False).numpy()
    assert_equal(out, dropped + Y)
    grad = normal(3, 4, 5)
    x_grad, y_grad = run_operator("fused_dropout_add_grad", seed_offset, grad, p=0.4, fix_seed=False, **_TRAINING)
    assert_equal([x_grad, y_grad], [np.where(dropped == 0, 0, grad / 0.6), grad])


# Attention


def attention(query: Any, key: Any, value: Any, mask: np.ndarray | None = None) -> Any:
    """Attention by plain products, as the model computes it on a CPU."""
    factor = None if mask is None else paddle.to_tensor(mask)
    return attention_by_matmul(query, key, value, lambda weights: weights if factor is None else weights * factor)


def flash(dropout: float, rounded: Callable[[Any], Any] = lambda x: x) -> tuple[Any, ...]:
    return run_operator(
        "flash_attn",
        *(QUERY, KEY, VALUE, None, None),
        **{"dropout": dropout, "causal": False, "return_softmax": False, "is_test": False, "rng_name": ""},
        rounded=rounded,
        new_seed=lambda: SEED,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_flash_attention_equals_plain_products(dropout):
    mask = layer_operators.keep_mask((2, 3, 6, 6), dropout, SEED) / np.float32(1 - dropout) if dropout else None
    out, _, log_sum, seed_offset = flash(dropout)
    inputs = tensors([QUERY, KEY, VALUE], differentiable=True)
    assert_equal(out, attention(*inputs, mask))
    scores = np.einsum("bnhd,bmhd->bhnm", QUERY, KEY) / np.sqrt(8)
    assert_equal(log_sum, np.log(np.exp(scores).sum(-1)))
    case = Gradient(
        [QUERY, KEY, VALUE],
        lambda *inputs: attention(*inputs, mask),
        lambda i, o, g: (*i, out, log_sum, seed_offset, None, g),
        {"dropout": dropout, "causal": False, "rounded": lambda x: x},
    )
    assert_equal(*differentiate("flash_attn_grad", case))


def test_flash_attention_rounds_the_weights_before_their_product():
    exact, rounded = flash(0.0)[0], flash(0.0, lambda x: x.astype(np.float16).astype(np.float32))[0]
    assert 0 < np.abs(exact - rounded).max() < 2**-11 * np.abs(VALUE).max()


# The update


_ADAMW = {
    **{"lr_ratio": 1.0, "with_decay": True, "lazy_mode": False, "use_global_beta_pow": False, "amsgrad": False},
    **{"coeff": 0.1, "min_row_size_to_use_multithread": 1000},
}


def adamw(param, grad, moment1, moment2, master=None) -> tuple[Any, ...]:
    numbers = [np.float32([value]) for value in (0.01, 0.9**3, 0.999**3, 0.9, 0.999, 1e-8)]
    rate, beta1_pow, beta2_pow, beta1, beta2, epsilon = numbers
    inputs = (param, grad, rate, moment1, moment2, None, beta1_pow, beta2_pow, master, None, beta1, beta2, epsilon)
    return run_operator("adamw_", *inputs, **_ADAMW, multi_precision=master is not None)


def test_adamw_equals_paddles():
    values = (X, Y, 0.1 * normal(3, 4, 5), POSITIVE)
    param, grad, moment1, moment2 = tensors(values)
    rate, beta1_pow, beta2_pow = tensors([np.float32([value]) for value in (0.01, 0.9**3, 0.999**3)])
    expected = _ops.adamw_(
        *(param, grad, rate, moment1, moment2, None, beta1_pow, beta2_pow, None, None),
        *(0.9, 0.999, 1e-8, 1.0, 0.1, True, False, 1000, False, False, False),
    )
    results = adamw(*values)
    assert_equal([results[index] for index in (0, 1, 2, 4, 5)], [expected[index] for index in (0, 1, 2, 4, 5)])


def test_adamw_updates_the_master_copy_and_rounds_the_weight():
    moments = 0.1 * normal(3, 4, 5), POSITIVE
    in_float32, with_master = adamw(X, Y, *moments), adamw(X.astype(np.float16).astype(np.float32), Y, *moments, X)
    assert_equal([with_master[0], with_master[6]], [in_float32[0], in_float32[0]])


def test_every_operator_of_the_table_is_tested():
    in_their_own_tests = {
        *("layer_norm_grad", "fused_gemm_epilogue", "fused_gemm_epilogue_grad", "dropout", "dropout_grad"),
        *("fused_dropout_add", "fused_dropout_add_grad", "flash_attn", "flash_attn_grad", "adamw_"),
    }
    tested = {*FORWARD, *GRADIENTS, *in_their_own_tests}
    assert {f"pd_op.{name}" for name in tested} == set(OPERATORS)


@pytest.mark.parametrize("name", sorted(set(FORWARD) | set(GRADIENTS)))
def test_results_share_no_memory_with_inputs(name):
    if name in FORWARD:
        inputs, attributes, _ = FORWARD[name][0]
    else:
        case = GRADIENTS[name][0]
        out = case.forward(*tensors(case.inputs)).numpy()
        inputs, attributes = case.arguments(case.inputs, out, np.ones_like(out)), case.attributes
    arrays = [value for one in inputs for value in (one if isinstance(one, list) else [one])]
    for result in run_operator(name, *inputs, **attributes):
        for part in result if isinstance(result, list) else [result]:
            assert not any(np.shares_memory(part, array) for array in arrays)
