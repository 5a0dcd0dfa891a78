"""Gradient clipping by global norm, with the norms readable after a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.parallel.dist_values import assign_to, replicate, reshard

_NO_CLIPPING = 1e30
SQUARES = "vit_static_squares"  # an attribute of the operators whose results are sums of gradients' squares


class GlobalNormClip(nn.ClipGradByGlobalNorm):
    """Clipping by the norm of all gradients together, whose norm (before clipping) can be read after a step, and of the
    first step in which it wasn't finite the number, and the norms by what `group_of` says of a parameter's name.

    `clip_norm` None only measures. Paddle computes the norm but keeps it in the program; here it is copied into a
    variable that lives as long as the parameters. (Fetching it would do for a program in one piece, but not with
    accumulated gradients: those that compute the update are then a program of their own.) And Paddle sums each split
    gradient's square over the ranks by itself, a number at a time; here those of one split are added up first.
    """

    def __init__(self, clip_norm: float | None, group_of: Mapping[str, str], step_number: Callable[[], Any]) -> None:
        """`step_number` gives, while the program is built, the number of the step that it will be doing, from 1."""
        super().__init__(_NO_CLIPPING if clip_norm is None else clip_norm)
        self._group_of, self._step_number = group_of, step_number
        self._groups: list[str] = []  # of the numbers in _norms, of which some are parts of one group's
        self._norm = self._first_nonfinite_step = self._norms = ""  # names of variables

    def _pir_clip(self, params_grads: Any) -> Any:
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        squares = [(self._group_of[parameter.name], _square(gradient)) for parameter, gradient in params_grads]
        self._groups, of_groups = _totals(squares)
        norm = paddle.sqrt(of_groups.sum(keepdim=True))
        kept = self._variable("grad_norm", norm)
        assign_to(kept, norm)
        self._record_first_nonfinite(norm, paddle.sqrt(of_groups))
        bound = paddle.full([1], self.clip_norm, "float32")
        factor = bound / paddle.maximum(norm, bound)
        return [
            (parameter, gradient * replicate(factor, gradient.process_mesh).astype(gradient.dtype))
            for parameter, gradient in params_grads
        ]

    def _record_first_nonfinite(self, norm: Any, norms: Any) -> None:
        """On the device: it isn't waited for before somebody asks."""
        first, kept = self._variable("first_nonfinite_step", norm), self._variable("unsound_norms", norms)
        # `assign`, since the engine would move a variable itself to this stage, of which others then know nothing.
        step = replicate(paddle.assign(self._step_number()), norm.process_mesh)
        is_later = first > 0.0
        # Where shapes differ `where` makes them alike by additions, of NaN too.
        assign_to(kept, paddle.where(paddle.expand(is_later, norms.shape), kept, norms))
        assign_to(first, paddle.where(paddle.logical_or(is_later, paddle.isfinite(norm)), first, step))

    def _variable(self, name: str, like: Any) -> Any:
        unique = paddle.utils.unique_name.generate(name)
        setattr(self, {"grad_norm": "_norm", "unsound_norms": "_norms"}.get(name, f"_{name}"), unique)
        zeros = nn.initializer.Constant(0.0)
        dist_attr = like.dist_attr()
        return paddle.pir.core.create_persistable_value(
            "float32", like.shape, unique, initializer=zeros, dist_attr=dist_attr
        )

    def norm(self) -> float:
        """The last step's. Waits for the device."""
        values = _value_of(self._norm)
        return math.nan if values is None else float(values.item())  # a pipeline's later stages don't compute it

    def first_nonfinite_step(self) -> tuple[int, dict[str, float]] | None:
        """The number, from 1, of the first step whose norm wasn't finite, and its norms by group; None where there is
        none, or where another stage of the pipeline knows. Waits for the device."""
        step, norms = _value_of(self._first_nonfinite_step), _value_of(self._norms)
        if step is None or norms is None or step.item() == 0.0:
            return None
        squares: dict[str, float] = {}
        for group, norm in zip(self._groups, norms.tolist(), strict=True):
            squares[group] = squares.get(group, 0.0) + norm * norm
        return int(step.item()), {group: math.sqrt(square) for group, square in squares.items()}

    def clear_nonfinite(self) -> None:
        """As if there had been no such step."""
        variable = paddle.static.global_scope().find_var(self._first_nonfinite_step)
        if variable is not None and variable.get_tensor()._is_initialized():
            variable.get_tensor().set(np.zeros([1], np.float32), paddle.framework._current_expected_place_())


def _value_of(name: str) -> np.ndarray | None:
    """A variable's that outlives a step; None where this rank doesn't compute it."""
    variable = paddle.static.global_scope().find_var(name)
    if variable is None or not variable.get_tensor()._is_initialized():
        return None
    return np.asarray(variable.get_tensor())


def _square(gradient: Any) -> Any:
    """The sum of a gradient's squares, [1], float32; of a split gradient what each rank has of it."""
    return paddle._C_ops.squared_l2_norm(gradient.astype("float32"))


def _totals(squares: list[tuple[str, Any]]) -> tuple[list[str], Any]:
    """The sums by group, [n], on the first stage of a pipeline, and the group of each; where a group's parameters are
    split in several ways it has as many. Each rank's parts are added up before they are exchanged, all at once."""
    alike: dict[str, dict[str, list[Any]]] = {}
    for group, square in squares:
        split = f"{square.process_mesh.process_ids} {square.placements}"
        alike.setdefault(split, {}).setdefault(group, []).append(square)
    groups: list[str] = []
    vectors: list[Any] = []
    for by_group in alike.values():
        # `add_n` keeps partial sums partial, where other sums would exchange each of them.
        vector = paddle.stack([paddle.add_n(values) for values in by_group.values()])  # [n] or [n, 1]
        vector = vector.reshape([-1])
        vector.get_defining_op().set_bool_attr(SQUARES, True)
        vectors.append(reshard(vector, [dist.Replicate()] * vector.process_mesh.ndim))
        groups += by_group
    first = min((vector.process_mesh for vector in vectors), key=lambda mesh: min(mesh.process_ids))
    whole = [replicate(vector, first) for vector in vectors]
    return groups, whole[0] if len(whole) == 1 else paddle.concat(whole)
