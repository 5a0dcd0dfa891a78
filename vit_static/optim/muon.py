"""Muon: momentum whose matrices are orthogonalized by Newton-Schulz iterations, and AdamW for all other parameters.

Keller Jordan, https://kellerjordan.github.io/posts/muon/; the variants are those of timm's `Muon`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle

from vit_static.optim.param_groups import ParamGroup
from vit_static.optim.rule_optimizer import RuleOptimizer, Update
from vit_static.parallel.dist_values import gather, reshard

# The coefficients (a, b, c) of each iteration: X' = a X + (b A + c A A) X with A = X X^T.
COEFFICIENTS = {
    "original": ((3.4445, -4.7750, 2.0315),) * 5,
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
_MIN_NORM = 1e-7
# Attribute of the operators from the momentum to the orthogonalized matrix, which compute in Newton-Schulz's dtype.
NEWTON_SCHULZ = "vit_static_newton_schulz"


def orthogonalize(matrix: Any, coefficients: tuple[tuple[float, float, float], ...]) -> Any:
    """Return a matrix with about the same singular vectors, and with singular values near 1, in the same dtype.

    The norms are computed in float32. The iteration multiplies from the side of the shorter axis.
    """
    norm = paddle.sqrt(paddle._C_ops.squared_l2_norm(matrix.astype("float32")))
    x = (matrix.astype("float32") / paddle.clip(norm, min=_MIN_NORM)).astype(matrix.dtype)
    is_tall = matrix.shape[0] > matrix.shape[1]
    for a, b, c in coefficients:
        gram = paddle.matmul(x, x, transpose_x=is_tall, transpose_y=not is_tall)
        polynomial = b * gram + c * paddle.matmul(gram, gram)
        x = a * x + (paddle.matmul(x, polynomial) if is_tall else paddle.matmul(polynomial, x))
    return x


def update_scale(kind: str, shape: list[int]) -> float:
    """Return the factor of a parameter's orthogonalized update, from the sizes of its matrix.

    match_rms_adamw: 0.2 sqrt(max(inputs, outputs)), after which the update is as large as AdamW's (arXiv 2502.16982).
    original: sqrt(max(1, outputs / inputs)).
    """
    num_inputs, num_outputs = shape if len(shape) == 2 else (math.prod(shape[1:]), shape[0])
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(num_inputs, num_outputs))
    return math.sqrt(max(1.0, num_outputs / num_inputs))


class Muon(RuleOptimizer):
    """Muon for the matrices of the layers, AdamW for all other parameters and the head.

    m' = momentum m + (1 - momentum) g; with nesterov, u = momentum m' + (1 - momentum) g, else u = m';
    p' = p - lr (scale orthogonalize(u) + decay p). AdamW's learning rate is lr adamw_lr_scale. A kernel [outputs,
    inputs, height, width] is the matrix [outputs, inputs height width]. Queries, keys and values are three matrices
    (where timm's layer has one), each orthogonalized by itself. On every mesh, every rank gathers the entire matrices
    and orthogonalizes them.
    """

    newton_schulz_dtype = "float32"

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        return {"moment1": None} if group.is_matrix else {"moment1": None, "moment2": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        update = self._adamw(gradient, weight, states) if "moment2" in states else self._muon(gradient, weight, states)
        direction = update.direction
        if decay:
            direction = direction + decay * weight
        if "moment2" in states and self._optim.adamw_lr_scale != 1.0:
            direction = self._optim.adamw_lr_scale * direction
        return Update(direction, update.states)

    def _muon(self, gradient: Any, weight: Any, states: Mapping[str, Any]) -> Update:
        momentum = self._optim.momentum
        first = momentum * states["moment1"] + (1.0 - momentum) * gradient
        smoothed = momentum * first + (1.0 - momentum) * gradient if self._optim.nesterov else first
        shape, placements = list(weight.shape), weight.placements
        with _marked_operators():
            part = smoothed.astype(self.newton_schulz_dtype)  # before the exchange, which is then half as large
            matrix = gather(part)
            if len(shape) != 2:
                matrix = matrix.reshape([shape[0], math.prod(shape[1:])])
            matrix = orthogonalize(matrix, COEFFICIENTS[self._optim.newton_schulz])
            if len(shape) != 2:
                matrix = matrix.reshape(shape)
        direction = reshard(matrix.astype("float32"), placements)
        return Update(update_scale(self._optim.muon_scale, shape) * direction, {"moment1": first})

    def _adamw(self, gradient: Any, weight: Any, states: Mapping[str, Any]) -> Update:
        beta1, beta2 = self._optim.betas
        first = beta1 * states["moment1"] + (1.0 - beta1) * gradient
        second = beta2 * states["moment2"] + (1.0 - beta2) * gradient * gradient
        deviation = paddle.sqrt(second / self._scalar("correction2", weight)) + self._optim.epsilon
        direction = first / self._scalar("correction1", weight) / deviation
        return Update(direction, {"moment1": first, "moment2": second})


@contextmanager
def _marked_operators() -> Iterator[None]:
    """Give the operators that are created within the context the attribute NEWTON_SCHULZ."""
    block = paddle.static.default_main_program().global_block()
    num_before = len(block.ops)
    yield
    for operator in block.ops[num_before:]:
        operator.set_bool_attr(NEWTON_SCHULZ, True)
