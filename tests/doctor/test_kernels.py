"""The checks of single kernels: right ones pass in every precision, and wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.doctor import make_subject

from vit_static.doctor import gpu_kernels, kernels
from vit_static.doctor.check import Result, perform
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.kernels import bound, relative_error
from vit_static.doctor.subject import Subject
from vit_static.model.attention import attention_by_matmul
from vit_static.model.layers import Dropout
from vit_static.program.cpu import attention, primitives
from vit_static.program.cpu.swiglu import swiglu
from vit_static.program.precision import Precision


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return paddle.to_tensor(values).astype(dtype).astype("float32").numpy()


# -- the bounds ------------------------------------------------------------------------------------------------------


def emulated_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, dtype: str, scale: float
) -> dict[str, np.ndarray]:
    """FlashAttention 2 (arXiv 2307.08691, algorithms 1 and 2) on [N, d]: float32 sums, operands and results rounded."""
    scores = scale * (q @ k.T)
    unnormalized = np.exp(scores - scores.max(axis=1, keepdims=True))
    row_sums = unnormalized.sum(axis=1, keepdims=True)
    out = rounded(rounded(unnormalized, dtype) @ v / row_sums, dtype)
    weights = unnormalized / row_sums
    differences = (g * out).sum(axis=1, keepdims=True)
    scores_grad = rounded(weights * (g @ v.T - differences), dtype)
    return {
        "out": out,
        "q": rounded(scale * (scores_grad @ k), dtype),
        "k": rounded(scale * (scores_grad.T @ q), dtype),
        "v": rounded(rounded(weights, dtype).T @ g, dtype),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(17, 32), (197, 64), (577, 80)])
def test_roundings_stay_within_half_of_the_bound_and_faults_do_not(dtype: str, num_tokens: int, head_dim: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [rounded(rng.standard_normal((num_tokens, head_dim)).astype(np.float32), dtype) for _ in range(4)]
    exact = {
        name: tensor.numpy()[0, :, 0]
        for name, tensor in zip(("out", "q", "k", "v"), plain_attention(arrays), strict=True)
    }
    limit = bound(dtype, num_tokens + head_dim)

    def worst(scale: float, drops_last: bool = False) -> float:
        q, k, v, g = arrays
        if drops_last:  # a tile's edge is left out
            v = np.concatenate([v[:-1], np.zeros_like(v[:1])])
        computed = emulated_attention(q, k, v, g, dtype, scale)
        return max(relative_error(computed[name], exact[name]) for name in exact)

    assert worst(head_dim**-0.5) < limit / 2
    assert worst((head_dim + 8) ** -0.5) > limit  # the head is padded to a multiple of 8 or more, and the scale with it
    assert worst(head_dim**-0.5, drops_last=True) > limit


def plain_attention(arrays: list[np.ndarray]) -> list[paddle.Tensor]:
    q, k, v, g = (paddle.to_tensor(array[None, :, None]) for array in arrays)
    for tensor in (q, k, v):
        tensor.stop_gradient = False
    out = attention_by_matmul(q, k, v, Dropout(0.0))
    out.backward(g)
    return [out, q.grad, k.grad, v.grad]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_rounded_once_is_within_the_bound_and_one_accumulated_in_half_precision_is_not(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = (rounded(rng.standard_normal((64, 1024)).astype(np.float32), dtype) for _ in "xw")
    exact, sums = x @ w.T, np.zeros((64, 64), np.float32)
    for column in range(x.shape[1]):
        sums = rounded(sums + x[:, column : column + 1] * w[:, column : column + 1].T, dtype)
    assert relative_error(rounded(exact, dtype), exact) < bound(dtype, x.shape[1]) / 8
    assert relative_error(sums, exact) > bound(dtype, x.shape[1])


# -- oneDNN's kernels ------------------------------------------------------------------------------------------------


def check(subject: Subject, name: str) -> Result:
    return perform(BY_NAME[name], subject)


@pytest.mark.parametrize("name", ["attention", "linear", "elementwise"])
@pytest.mark.parametrize(
    "precision", ["O0", pytest.param("O1", marks=pytest.mark.needs_bfloat16)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.width=48", "model.num_heads=3", "model.num_classes=21", "model.gelu=tanh"),
        ("model.mlp=swiglu",),
    ],
)
def test_the_cpus_kernels_pass(tmp_path: Path, name: str, precision: str, overrides: tuple[str, ...]) -> None:
    result = check(make_subject(tmp_path, f"amp.level={precision}", *overrides), name)
    assert result.status == "ok", result


MATMUL, GELU, LAYER_NORM = primitives.matmul, primitives.gelu, primitives.layer_norm
FAULTS: dict[str, tuple[str, Any, str, Callable[..., Any], str]] = {
    "attention's scale": (
        "attention",
        kernels,
        "attention_grad",
        lambda inputs, grads, factors: attention.attention_grad(inputs, grads, (1.0, *factors[1:])),
        "the gradient of q",
    ),
    "a product's factor": (
        "linear",
        primitives,
        "matmul",
        lambda a, b, out, **named: MATMUL(a, b, out, **named, factor=1.001),
        "is off by",
    ),
    "another GELU": (
        "elementwise",
        primitives,
        "gelu",
        lambda x, out, approximate: GELU(x, out, not approximate),
        "the result of the GELU",
    ),
    "SwiGLU's halves": (
        "elementwise",
        kernels,
        "swiglu",
        lambda layout: lambda gate, x, out: swiglu(layout)(x, gate, out),
        "the result of the SwiGLU",
    ),
    "LayerNorm's epsilon": (
        "elementwise",
        primitives,
        "layer_norm",
        lambda x, out, epsilon: LAYER_NORM(x, out, 1e-3),
        "of the LayerNorm",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_wrong_kernel_is_named_with_the_switch_that_avoids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, module, function, broken, message = FAULTS[fault]
    monkeypatch.setattr(module, function, broken)
    mlp = "swiglu" if "SwiGLU" in fault else "gelu"
    result = check(make_subject(tmp_path, f"model.mlp={mlp}"), name)
    assert result.status == "failed" and message in result.message, result
    assert result.remedy == "set -o kernels.onednn=false"


def test_kernels_that_are_switched_off_are_not_checked(tmp_path: Path) -> None:
    subject = make_subject(tmp_path, "kernels.onednn=false")
    for name in ("attention", "linear", "elementwise"):
        assert check(subject, name) == Result("skipped", "kernels.onednn=false")


# -- a GPU's fused kernels, emulated on the CPU: the checks around them are real ---------------------------------------


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in float32 and round the result, as a kernel in half precision does."""
    return lambda *tensors: function(*(tensor.astype("float32") for tensor in tensors)).astype(tensors[0].dtype)


def dropout_add(x: Any, residual: Any, p: float, scale: float | None = None, residual_grad: float = 1.0) -> Any:
    mask = (paddle.rand(x.shape) >= p).astype("float32")
    scaled = x.astype("float32") * mask * (1.0 / (1.0 - p) if scale is None else scale)
    return (scaled + residual_grad * residual.astype("float32")).astype(x.dtype)


EMULATED = {
    "attention": in_float32(lambda q, k, v: attention_by_matmul(q, k, v, Dropout(0.0))),
    "linear": in_float32(lambda x, w, b: paddle.matmul(x, w) + b),
    "dropout_add": dropout_add,
}


@pytest.fixture
def gpu_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    """Return make(dtype, *overrides): a subject on a GPU whose kernels are emulated."""
    for function, emulated in EMULATED.items():
        monkeypatch.setattr(gpu_kernels, function, emulated)

    def make(dtype: str, *overrides: str) -> Subject:
        subject = make_subject(
            tmp_path, "model.width=48", "model.num_heads=3", "model.dropout=0.1", *overrides, device="gpu"
        )
        subject.precision = Precision("O2", dtype)
        return subject

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["attention", "linear", "dropout"])
def test_a_gpus_kernels_pass(gpu_subject: Callable[..., Subject], name: str, dtype: str) -> None:
    result = check(gpu_subject(dtype), name)
    assert result.status == "ok", result


def test_only_layers_that_a_gpu_fuses_are_compared(gpu_subject: Callable[..., Subject]) -> None:
    """A head of 21,841 classes isn't: its kernel isn't used."""
    with_head = check(gpu_subject("float16", "model.num_classes=16"), "linear")
    assert with_head.status == "ok" and "to 16 classes" in with_head.message
    without_head = check(gpu_subject("float16", "model.num_classes=21841"), "linear")
    assert without_head.status == "ok" and "classes" not in without_head.message
    assert set(without_head.figures["errors"]) == {"first MLP layer", "second MLP layer"}


GPU_FAULTS: dict[str, tuple[str, str, Callable[..., Any], str, str]] = {
    "attention without its scale": (
        "attention",
        "attention",
        in_float32(lambda q, k, v: attention_by_matmul(4.0 * q, k, v, Dropout(0.0))),
        "is off by",
        "kernels.flash_attention=false",
    ),
    "attention without a gradient of v": (
        "attention",
        "attention",
        in_float32(lambda q, k, v: attention_by_matmul(q, k, v.detach() + 0.0 * v, Dropout(0.0))),
        "the gradient of v",
        "kernels.flash_attention=false",
    ),
    "a linear layer without its bias": (
        "linear",
        "linear",
        in_float32(lambda x, w, b: paddle.matmul(x, w) + 0.0 * b),
        "the gradient of b",
        "kernels.fused_linear=false",
    ),
    "a linear layer that overflows": (
        "linear",
        "linear",
        in_float32(lambda x, w, b: (paddle.matmul(x, w) + b) * float("inf")),
        "is off by inf",
        "kernels.fused_linear=false",
    ),
    "dropout at another rate": (
        "dropout",
        "dropout_add",
        lambda x, residual, p: dropout_add(x, residual, 0.2, 1.0 / (1.0 - p)),
        "of the elements are dropped instead of 0.1",
        "kernels.fused_dropout=false",
    ),
    "dropout without scaling": (
        "dropout",
        "dropout_add",
        lambda x, residual, p: dropout_add(x, residual, p, 1.0),
        "aren't scaled",
        "kernels.fused_dropout=false",
    ),
    "dropout without the residual's gradient": (
        "dropout",
        "dropout_add",
        lambda x, residual, p: dropout_add(x, residual, p, residual_grad=0.5),
        "the residual's gradient",
        "kernels.fused_dropout=false",
    ),
}


@pytest.mark.parametrize("fault", list(GPU_FAULTS))
def test_a_gpus_wrong_kernel_is_named_with_its_switch(
    gpu_subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    name, function, broken, message, switch = GPU_FAULTS[fault]
    monkeypatch.setattr(gpu_kernels, function, broken)
    result = check(gpu_subject("float16"), name)
    assert result.status == "failed" and message in result.message, result
    assert result.remedy == f"set -o {switch}"


def test_an_error_of_a_kernel_is_a_failure_with_its_first_line(
    gpu_subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError(
            "\n\n--------------------------------------\nC++ Traceback (most recent call last):\n0   paddle::run()\n"
            "----------------------\nError Message Summary:\n----------------------\n"
            "ExternalError: CUDA error(9), invalid configuration argument.\n  [Hint: try again]"
        )

    monkeypatch.setattr(gpu_kernels, "attention", fails)
    result = check(gpu_subject("bfloat16"), "attention")
    assert result.message == "RuntimeError: ExternalError: CUDA error(9), invalid configuration argument."


@pytest.mark.parametrize(
    ("name", "override", "reason"),
    [
        ("attention", "kernels.flash_attention=false", "this config computes attention by plain products"),
        ("attention", "model.num_heads=4", "this config computes attention by plain products"),  # of 12 channels
        ("linear", "kernels.fused_linear=false", "kernels.fused_linear=false"),
        ("dropout", "kernels.fused_dropout=false", "kernels.fused_dropout=false"),
        ("dropout", "model.dropout=0.0", "model.dropout is 0"),
        ("elementwise", "model.dropout=0.1", "only on a CPU"),
    ],
)
def test_kernels_that_a_gpus_program_lacks_are_not_checked(
    gpu_subject: Callable[..., Subject], name: str, override: str, reason: str
) -> None:
    assert check(gpu_subject("bfloat16", override), name) == Result("skipped", reason)
