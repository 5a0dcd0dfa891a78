"""Optimizer state sharded over data-parallel ranks (ZeRO), and per-step scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static.optim.loss_scaling import LossScaling
from vit_static.parallel.dist_values import create_variable, place_variable, replicate, reshard, set_variable

# (a parameter or gradient as a value of the program) -> the ZeRO placements of its optimizer state
StatePlacements = Callable[[Any], list[Any]]


class ShardedState:
    """Base class of optimizers, to precede Paddle's: shards state over ranks (ZeRO), averages over micro-batches.

    Paddle's own wrapper, `dist.shard_optimizer`, accepts only Paddle's AdamW and its SGD without momentum, splits along
    axes that can't be divided, which then fails, and never scatters the gradients in a static program.
    """

    _state_placements: StatePlacements | None = None
    _scatters_gradients = False
    _num_micro_batches = 1
    _learning_rate_of_mesh: Any = None
    _loss_scaling = LossScaling([])
    _found_inf = None  # passed on to `update_loss_scaling`, which asks the loss scaling instead
    # Mixed precision then gives the scaled gradients to `apply_gradients`, and leaves it to check and unscale them.
    _supports_check_nan_inf = True

    def average_over(self, num_micro_batches: int) -> None:
        """Divide gradients, which are sums over micro-batches, by the number of micro-batches.

        The engine's own averaging comes after clipping. And unless the update is one operator named sgd or adam, it
        scales every gradient before every operator of the backward pass.
        """
        self._num_micro_batches = num_micro_batches

    def shard_state(self, state_placements: StatePlacements, scatter_gradients: bool) -> None:
        """Place the moments and the master copy of each parameter by `state_placements`.

        With `scatter_gradients`, a rank gets only its own part of a gradient's sum, else the entire sum.
        """
        self._state_placements, self._scatters_gradients = state_placements, scatter_gradients

    def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: Any, param_group_idx: int = 0) -> Any:
        """Override the method that the engine calls."""
        reduced = self._reduce_gradients(params_grads)
        return super()._apply_optimize(loss, startup_program, reduced, param_group_idx)  # type: ignore[misc]

    def apply_gradients(self, params_grads: Any) -> Any:
        """Override the method that mixed precision calls instead with O2."""
        return super().apply_gradients(self._reduce_gradients(params_grads))  # type: ignore[misc]

    def scale_loss_by(self, loss_scaling: LossScaling) -> None:
        """Use this loss scaling if mixed precision turns it on, in float16."""
        self._loss_scaling = loss_scaling

    def _set_scale(self, scale: Any) -> None:
        """Take the loss scale; mixed precision calls it before `apply_gradients`."""
        self._loss_scaling.set_scale(scale)

    def _get_stop_update_var(self) -> Any:
        """Return what mixed precision passes on to `update_loss_scaling`."""
        return self._loss_scaling

    def _reduce_gradients(self, params_grads: Any) -> Any:
        # Variables of the program that aren't trained, such as dropout's seeds, have no gradient.
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        params_grads = [(parameter, self._reduce(parameter, gradient)) for parameter, gradient in params_grads]
        if self._num_micro_batches > 1:
            factor = 1.0 / self._num_micro_batches
            params_grads = [(parameter, paddle.scale(gradient, factor)) for parameter, gradient in params_grads]
        return params_grads

    def _reduce(self, parameter: Any, gradient: Any) -> Any:
        if not self._scatters_gradients:
            gradient = reshard(gradient, parameter.placements)
        return reshard(gradient, self._placements_of_state(parameter))

    def _create_accumulators(self, block: Any, parameters: Any) -> None:
        super()._create_accumulators(block, parameters)  # type: ignore[misc]
        if self._state_placements is None:
            return
        for parameter in parameters:
            master = self._master_weights.get(parameter.name)  # type: ignore[attr-defined]
            weight = parameter if master is None else master
            accumulators = self._accumulators.values()  # type: ignore[attr-defined]
            states = [values[weight.name] for values in accumulators if weight.name in values]
            for value in [*states, *([] if master is None else [master])]:
                if list(value.shape) == list(parameter.shape):  # not the powers of beta, which are single numbers
                    place_variable(value, parameter.process_mesh, self._state_placements(parameter))

    def _placements_of_state(self, parameter: Any) -> list[Any]:
        return parameter.placements if self._state_placements is None else self._state_placements(parameter)

    def _add_reduced_accumulator(self, name: str, weight: Any, parameter: Any, axis: int) -> None:
        """Create a state with the parameter's shape without `axis`, sharded like its other states."""
        placements = []
        for placement in self._placements_of_state(parameter):
            if placement.is_shard():
                split_axis = placement.get_dim()
                placement = dist.Replicate() if split_axis == axis else dist.Shard(split_axis - (split_axis > axis))
            placements.append(placement)
        shape = [size for index, size in enumerate(parameter.shape) if index != axis]
        value = create_variable(f"{weight.name}_{name}", shape, "float32", parameter.process_mesh, placements)
        self._accumulators[name][weight.name] = value  # type: ignore[attr-defined]

    def _learning_rate_on(self, parameter: Any) -> Any:
        """Return the step's learning rate, [1], on the ranks of a parameter."""
        if self._learning_rate_of_mesh is None:
            learning_rate = paddle.assign(self._global_learning_rate())  # type: ignore[attr-defined]
            self._learning_rate_of_mesh = replicate(learning_rate, dist.auto_parallel.get_mesh())
        return replicate(self._learning_rate_of_mesh, parameter.process_mesh)


def update_loss_scaling(
    gradients: Any,
    found_inf: None,
    scale: Any,
    num_good_steps: Any,
    num_bad_steps: Any,
    *settings: Any,
    stop_update: LossScaling,
    **arguments: Any,
) -> None:
    """Change the loss scale after a step: replaces Paddle's function of this name (program/engine.py).

    `stop_update` comes from `ShardedState._get_stop_update_var`.
    """
    stop_update.update(num_good_steps, num_bad_steps)


class StepScalars:
    """Scalars that the host sets before each step, as variables of the program on every rank."""

    def __init__(self) -> None:
        self._variables: dict[str, tuple[str, Any]] = {}

    def __deepcopy__(self, memo: Any) -> StepScalars:
        return self  # Paddle copies the optimizer, which refers to this

    def start_program(self) -> None:
        """Forget the variables of an earlier program."""
        self._variables = {}

    def value(self, name: str) -> Any:
        """Return the variable, [1] float32, in the program that is being built."""
        if name not in self._variables:
            mesh = dist.auto_parallel.get_mesh()
            variable = create_variable(name, [1], "float32", mesh, [dist.Replicate()] * mesh.ndim)
            self._variables[name] = (variable.name, variable)
        return self._variables[name][1]

    def set(self, scalars: dict[str, float]) -> None:
        """Set the values for the next step. Those that the program doesn't use are ignored."""
        for name, (variable_name, _) in self._variables.items():
            set_variable(variable_name, np.array([scalars[name]], np.float32))
