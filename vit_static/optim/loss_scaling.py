"""Dynamic loss scaling for float16 (arXiv 1710.03740), computed on the device.

Paddle multiplies the loss; the rest is done here. Its own check of the gradients works in place on copies once the
gradients are scattered (ZeRO 2), each pipeline stage decides by itself whether to skip a step, and AdamW's kernel reads
that decision on the host, which waits for the device.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist

from vit_static.parallel.dist_values import assign_to, create_variable, place_variable, replicate

MAX_LOSS_SCALE = 2.0**32  # as in PLSC
# PLSC's other settings: halve the scale after two steps in a row that overflowed, double it after 1000 that didn't.
DECREASE_RATIO, NUM_BAD_STEPS, INCREASE_RATIO, NUM_GOOD_STEPS = 0.5, 2, 2.0, 1000


class LossScaling:
    """The loss scale of the program being built, and whether the gradients of its step are finite.

    If they aren't, the step changes neither weights nor optimizer state, only the scale, and the moving average of the
    weights as in any step.
    """

    def __init__(self, stages: list[dist.ProcessMesh]) -> None:
        """`stages`: the mesh of each pipeline stage."""
        self._stages = stages
        self._scale: Any = None
        self._num_skipped: Any = None
        self._finite_factor: Any = None
        self._is_finite: dict[tuple[int, ...], Any] = {}  # by the ranks of a stage

    def __deepcopy__(self, memo: Any) -> LossScaling:
        return self  # Paddle copies the optimizer, which refers to this

    @property
    def is_on(self) -> bool:
        return self._scale is not None

    def set_scale(self, scale: Any) -> None:
        """Take the scale, [1] float32, a variable of every rank, that the loss has been multiplied by."""
        self._scale, self._is_finite = _on_every_rank(scale), {}
        world = dist.auto_parallel.get_mesh()
        replicated = [dist.Replicate()] * world.ndim
        self._num_skipped = create_variable("num_skipped_steps", [1], "float32", world, replicated)

    def unscale_norm(self, norm: Any) -> Any:
        """Return the norm of the gradients, [1], from that of the scaled gradients."""
        return norm / replicate(paddle.assign(self._scale), norm.process_mesh)

    def unscale_factor(self, factor: Any, norm: Any) -> Any:
        """Return the factor of the scaled gradients, [1], from that of the gradients: NaN if their norm isn't finite.

        The norm is known on one pipeline stage. The factor, which is sent to all stages, also tells them to skip.
        """
        scale = replicate(paddle.assign(self._scale), factor.process_mesh)
        nan = paddle.full_like(factor, float("nan"))
        self._finite_factor = paddle.where(paddle.isfinite(norm), factor / scale, nan)
        return self._finite_factor

    def is_finite_on(self, mesh: dist.ProcessMesh) -> Any:
        """Return whether all gradients are finite, [1] bool, on the ranks of a pipeline stage."""
        ranks = tuple(mesh.process_ids)
        if ranks not in self._is_finite:
            is_finite = self._is_finite[ranks] = paddle.isfinite(replicate(self._finite_factor, mesh))
            is_finite.stop_gradient = True
        return self._is_finite[ranks]

    def num_skipped_on(self, mesh: dist.ProcessMesh) -> Any:
        """Return the number of steps before this one that were skipped, [1] float32, on the ranks of a stage."""
        return replicate(paddle.assign(self._num_skipped), mesh)

    def update(self, num_good_steps: Any, num_bad_steps: Any) -> None:
        """Change the scale after a step, on all pipeline stages. `num_...`: variables [1] int32 of every rank."""
        variables = [self._scale, self._num_skipped, *map(_on_every_rank, (num_good_steps, num_bad_steps))]
        for stage in self._stages:
            # Views, which share the memory of the variables.
            scale, num_skipped, num_good, num_bad = (replicate(variable, stage) for variable in variables)
            is_finite = self.is_finite_on(stage)
            finite = is_finite.astype("int32")
            assign_to(num_skipped, num_skipped + (1.0 - is_finite.astype("float32")))
            good, bad = finite * (num_good + 1), (1 - finite) * (num_bad + 1)
            grows = paddle.equal(good, paddle.full_like(good, NUM_GOOD_STEPS))
            shrinks = paddle.equal(bad, paddle.full_like(bad, NUM_BAD_STEPS))
            ratio = paddle.where(grows, paddle.full_like(scale, INCREASE_RATIO), paddle.full_like(scale, 1.0))
            ratio = paddle.where(shrinks, paddle.full_like(scale, DECREASE_RATIO), ratio)
            new_scale = paddle.clip(scale * ratio, min=1.0, max=MAX_LOSS_SCALE)
            assign_to(scale, new_scale)
            assign_to(num_good, good * (1 - grows.astype("int32")))
            assign_to(num_bad, bad * (1 - shrinks.astype("int32")))


def _on_every_rank(variable: Any) -> Any:
    world = dist.auto_parallel.get_mesh()
    place_variable(variable, world, [dist.Replicate()] * world.ndim)
    return variable
