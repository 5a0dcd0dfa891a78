"""Optimizer state sharded over data-parallel ranks (ZeRO), and per-step scalars."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static.parallel.dist_values import _place_variable, persistable, reshard


class ShardedState:
    """For an optimizer to inherit first: what it keeps of each parameter may be split over ranks (ZeRO), and gradients
    may come in micro-batches.

    Paddle's own wrapper, `dist.shard_optimizer`, takes only its AdamW and its SGD without momentum, splits along axes
    that don't divide, which then fails, and in a static program never scatters the gradients.
    """

    _state_placements: Any = None
    _num_micro_batches = 1

    def average_over(self, num_micro_batches: int) -> None:
        """Gradients come as the sum over so many micro-batches.

        The engine's own averaging comes after the clipping, and, where the update is not one operator named sgd or
        adam, puts a scaling of every gradient before every operator of the backward.
        """
        self._num_micro_batches = num_micro_batches

    def shard_state(self, placements_of: Any, scatter_gradients: bool) -> None:
        """`placements_of` a parameter are those of its moments and its master copy.

        With `scatter_gradients` each rank gets the sum of its own part of a gradient alone, else of the whole.
        """
        self._state_placements, self._scatter_gradients = placements_of, scatter_gradients

    def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: Any, param_group_idx: int = 0) -> Any:
        """What the engine calls."""
        summed = self._averages(params_grads)
        return super()._apply_optimize(loss, startup_program, summed, param_group_idx)  # type: ignore[misc]

    def apply_gradients(self, params_grads: Any) -> Any:
        """What mixed precision, O2, calls instead: with gradients that are unscaled, and in float32 if so asked for."""
        return super().apply_gradients(self._averages(params_grads))  # type: ignore[misc]

    def _averages(self, params_grads: Any) -> Any:
        # Without a gradient: variables of the program that aren't trained, such as the seeds of dropout.
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        if self._state_placements is not None:
            params_grads = [(parameter, self._part_of_sum(parameter, gradient)) for parameter, gradient in params_grads]
        if self._num_micro_batches > 1:
            share = 1.0 / self._num_micro_batches
            params_grads = [(parameter, paddle.scale(gradient, share)) for parameter, gradient in params_grads]
        return params_grads

    def _part_of_sum(self, parameter: Any, gradient: Any) -> Any:
        if not self._scatter_gradients:
            gradient = reshard(gradient, parameter.placements)
        return reshard(gradient, self._state_placements(parameter))

    def _create_accumulators(self, block: Any, parameters: Any) -> None:
        super()._create_accumulators(block, parameters)  # type: ignore[misc]
        if self._state_placements is None:
            return
        for parameter in parameters:
            placements = self._state_placements(parameter)
            master = self._master_weights.get(parameter.name)  # type: ignore[attr-defined]
            weight = parameter if master is None else master
            accumulators = self._accumulators.values()  # type: ignore[attr-defined]
            kept = [values[weight.name] for values in accumulators if weight.name in values]
            for value in [*kept, *([] if master is None else [master])]:
                if list(value.shape) == list(parameter.shape):  # not the powers of beta, which are numbers
                    _place_variable(value, parameter.process_mesh, placements)

    def _placements_of_state(self, parameter: Any) -> list[Any]:
        return parameter.placements if self._state_placements is None else self._state_placements(parameter)

    def _add_reduced(self, name: str, weight: Any, parameter: Any, axis: int) -> None:
        """A state of a parameter's shape without one axis, split as its others are."""
        placements = []
        for placement in self._placements_of_state(parameter):
            if placement.is_shard():
                place = placement.get_dim()
                placement = dist.Replicate() if place == axis else dist.Shard(place - (place > axis))
            placements.append(placement)
        shape = [size for place, size in enumerate(parameter.shape) if place != axis]
        value = persistable(f"{weight.name}_{name}", shape, "float32", parameter.process_mesh, placements)
        self._accumulators[name][weight.name] = value  # type: ignore[attr-defined]


class StepScalars:
    """Numbers that the host sets before each step: variables of the program, on every rank."""

    def __init__(self) -> None:
        self._variables: dict[str, tuple[str, Any]] = {}

    def __deepcopy__(self, memo: Any) -> StepScalars:
        return self  # Paddle copies the optimizer that refers to it

    def value(self, name: str) -> Any:
        """[1], float32, in the program being built."""
        if name not in self._variables:
            mesh = dist.auto_parallel.get_mesh()
            variable = persistable(name, [1], "float32", mesh, [dist.Replicate()] * mesh.ndim)
            self._variables[name] = (variable.name, variable)
        return self._variables[name][1]

    def set(self, numbers: dict[str, float]) -> None:
        """Before a step. Those that the program doesn't ask for are passed over."""
        scope = paddle.static.global_scope()
        for name, (variable_name, _) in self._variables.items():
            variable = scope.find_var(variable_name)
            if variable is not None:
                array = np.array([numbers[name]], np.float32)
                variable.get_tensor().set(array, paddle.framework._current_expected_place_())
