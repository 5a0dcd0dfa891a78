"""Gradient clipping by global norm, with the norms readable after a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.optim.loss_scaling import LossScaling
from vit_static.parallel.dist_values import assign_to, replicate, reshard, set_variable

_NO_CLIPPING = 1e30
# Attributes of operators: whose results are sums of squared gradients; the square of a parameter's gradient; its
# clipped gradient. The value of the last two is the parameter's name.
SQUARES = "vit_static_squares"
SQUARED_GRADIENT, CLIPPED_GRADIENT = "vit_static_squared_gradient", "vit_static_clipped_gradient"


class GlobalNormClip(nn.ClipGradByGlobalNorm):
    """Clip gradients by their global norm, and record the norm before clipping.

    The first step whose norm isn't finite is recorded, too, with its norms by group. `clip_norm` None only measures.

    Paddle also computes the norm, but keeps it inside the program. Here it is copied into a variable that outlives the
    step. (Fetching it would do for a program in one piece, but with gradient accumulation the update is a program of
    its own.) And for each sharded gradient Paddle sums the squares over the ranks in a separate collective; here the
    squares with the same sharding are added up first.
    """

    def __init__(
        self,
        clip_norm: float | None,
        group_of: Mapping[str, str],
        step_number: Callable[[], Any],
        loss_scaling: LossScaling,
    ) -> None:
        """`group_of` maps the name of each parameter to its group.

        `step_number` is called while the program is built and returns the variable with the number of the step, from 1.
        If `loss_scaling` is on, gradients are unscaled in the same pass, and set to 0 in a step that is skipped.
        """
        super().__init__(_NO_CLIPPING if clip_norm is None else clip_norm)
        self._group_of, self._step_number, self._loss_scaling = group_of, step_number, loss_scaling
        self._groups: list[str] = []  # the group of each recorded norm; a group may have several
        self._variable_names: dict[str, str] = {}  # of grad_norm, first_nonfinite_step and nonfinite_norms

    def _pir_clip(self, params_grads: Any) -> Any:
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        squares = [
            (self._group_of[parameter.name], _squared_norm(parameter, gradient)) for parameter, gradient in params_grads
        ]
        self._groups, group_squares = _sum_by_group(squares)
        norm = paddle.sqrt(group_squares.sum(keepdim=True))
        if self._loss_scaling.is_on:
            norm = self._loss_scaling.unscale_norm(norm)
        recorded = self._variable("grad_norm", norm)
        assign_to(recorded, norm)
        self._record_first_nonfinite(norm, paddle.sqrt(group_squares))
        bound = paddle.full([1], self.clip_norm, "float32")
        factor = bound / paddle.maximum(norm, bound)
        if self._loss_scaling.is_on:
            factor = self._loss_scaling.unscale_factor(factor, norm)
        return [(parameter, self._clip(parameter, gradient, factor)) for parameter, gradient in params_grads]

    def _clip(self, parameter: Any, gradient: Any, factor: Any) -> Any:
        mesh = gradient.process_mesh
        if self._loss_scaling.is_on:  # float16 has neither the range nor the precision of such a factor
            gradient = gradient.astype("float32")
        clipped = gradient * replicate(factor, mesh).astype(gradient.dtype)
        clipped.get_defining_op().set_str_attr(CLIPPED_GRADIENT, parameter.name)
        if not self._loss_scaling.is_on:
            return clipped
        # `expand`, since `where` broadcasts by additions, in which a NaN spreads.
        is_finite = paddle.expand(self._loss_scaling.is_finite_on(mesh), clipped.shape)
        return paddle.where(is_finite, clipped, paddle.zeros_like(clipped))

    def _record_first_nonfinite(self, norm: Any, norms: Any) -> None:
        """Record the step on the device, so that the host waits for it only when somebody asks."""
        recorded_step = self._variable("first_nonfinite_step", norm)
        recorded_norms = self._variable("nonfinite_norms", norms)
        # Without `assign` the engine would move the variable itself to this stage, and other stages would lose it.
        step = replicate(paddle.assign(self._step_number()), norm.process_mesh)
        is_recorded = recorded_step > 0.0
        # `expand`, since `where` broadcasts by additions, in which a NaN spreads.
        is_recorded_for_each = paddle.expand(is_recorded, norms.shape)
        assign_to(recorded_norms, paddle.where(is_recorded_for_each, recorded_norms, norms))
        keeps_step = paddle.logical_or(is_recorded, paddle.isfinite(norm))
        assign_to(recorded_step, paddle.where(keeps_step, recorded_step, step))

    def _variable(self, name: str, like: Any) -> Any:
        """Create a variable that outlives the step, 0 at first, with the shape and placement of `like`."""
        unique_name = self._variable_names[name] = paddle.utils.unique_name.generate(name)
        return paddle.pir.core.create_persistable_value(
            "float32",
            like.shape,
            unique_name,
            initializer=nn.initializer.Constant(0.0),
            dist_attr=like.dist_attr(),
        )

    def norm(self) -> float:
        """Return the last step's norm, or NaN on later stages of a pipeline. Waits for the device."""
        value = self._recorded("grad_norm")
        return math.nan if value is None else float(value.item())

    def first_nonfinite_step(self) -> tuple[int, dict[str, float]] | None:
        """Return the number, from 1, of the first step whose norm wasn't finite, and its norms by group.

        None if there was no such step, and on later stages of a pipeline. Waits for the device.
        """
        step, norms = self._recorded("first_nonfinite_step"), self._recorded("nonfinite_norms")
        if step is None or norms is None or step.item() == 0.0:
            return None
        squares: dict[str, float] = {}
        for group, norm in zip(self._groups, norms.tolist(), strict=True):
            squares[group] = squares.get(group, 0.0) + norm * norm
        return int(step.item()), {group: math.sqrt(square) for group, square in squares.items()}

    def clear_nonfinite(self) -> None:
        """Forget the recorded non-finite step."""
        if self._tensor("first_nonfinite_step") is not None:
            set_variable(self._variable_names["first_nonfinite_step"], np.zeros([1], np.float32))

    def _recorded(self, name: str) -> np.ndarray | None:
        tensor = self._tensor(name)
        return None if tensor is None else np.asarray(tensor)

    def _tensor(self, name: str) -> Any:
        """Return a recorded variable's tensor, or None if this rank doesn't compute it."""
        variable = paddle.static.global_scope().find_var(self._variable_names.get(name, ""))
        if variable is None or not variable.get_tensor()._is_initialized():
            return None
        return variable.get_tensor()


def _squared_norm(parameter: Any, gradient: Any) -> Any:
    """Return the sum of a gradient's squares, [1] float32; for a sharded gradient, partial sums on the ranks."""
    square = paddle._C_ops.squared_l2_norm(gradient.astype("float32"))
    square.get_defining_op().set_str_attr(SQUARED_GRADIENT, parameter.name)
    return square


def _sum_by_group(squares: list[tuple[str, Any]]) -> tuple[list[str], Any]:
    """Sum squared norms by group, on the first stage of a pipeline: the groups' names, and their sums [n].

    A group whose parameters are sharded in several ways occurs once for each. Every rank adds up its partial sums
    before one collective per sharding.
    """
    by_sharding: dict[str, dict[str, list[Any]]] = {}
    for group, square in squares:
        sharding = f"{square.process_mesh.process_ids} {square.placements}"
        by_sharding.setdefault(sharding, {}).setdefault(group, []).append(square)
    groups: list[str] = []
    vectors: list[Any] = []
    for by_group in by_sharding.values():
        # `add_n` leaves partial sums partial; other additions would start a collective for each.
        vector = paddle.stack([paddle.add_n(values) for values in by_group.values()])  # [n] or [n, 1]
        vector = vector.reshape([-1])
        vector.get_defining_op().set_bool_attr(SQUARES, True)
        vectors.append(reshard(vector, [dist.Replicate()] * vector.process_mesh.ndim))
        groups += by_group
    first_stage = min((vector.process_mesh for vector in vectors), key=lambda mesh: min(mesh.process_ids))
    vectors = [replicate(vector, first_stage) for vector in vectors]
    return groups, vectors[0] if len(vectors) == 1 else paddle.concat(vectors)
