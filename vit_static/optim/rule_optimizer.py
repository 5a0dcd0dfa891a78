"""Base class of optimizers whose update is built of basic operators.

Notation: g is the clipped gradient, p the parameter, lr its learning rate in this step, and decay its weight-decay
coefficient (0 if it isn't decayed).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import paddle

from vit_static.config.optim_schema import OptimConfig
from vit_static.optim.ema import EmaMixin
from vit_static.optim.param_groups import ParamGroup, decay_coefficient
from vit_static.optim.sharded_state import ShardedState, StepScalars
from vit_static.parallel.dist_values import assign_to, replicate, reshard


@dataclass(frozen=True)
class Update:
    """Result of a rule: the direction of the update (p' = p - lr * direction), and the new states by name."""

    direction: Any
    states: dict[str, Any] = field(default_factory=dict)


class RuleOptimizer(EmaMixin, ShardedState, paddle.optimizer.Optimizer, ABC):
    """Optimizer whose update p' = p - lr * direction is built of basic operators.

    With its fused operators other than AdamW's, Paddle 3.3.1 doesn't keep sharded states sharded. A subclass defines
    which states it keeps and its update (`update`, or `apply` where that isn't of this form); it then works on every
    mesh and in every precision. All arithmetic is in float32: parameters in half precision have master copies.
    """

    def __init__(
        self,
        learning_rate: Any,
        optim: OptimConfig,
        groups: Mapping[str, ParamGroup],
        scalars: StepScalars,
        **arguments: Any,
    ) -> None:
        self._multi_precision = arguments.pop("multi_precision")
        super().__init__(learning_rate, **arguments)
        self._optim, self._groups, self._scalars = optim, groups, scalars
        self._decay = decay_coefficient(optim)
        self._master_weights: dict[str, Any] = {}

    @abstractmethod
    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        """Return the states of a parameter of this shape and with these settings, by name.

        None is a state with the parameter's shape, a number one with that shape without this axis.
        """

    @abstractmethod
    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        """Compute the update of a parameter. All values have the same placements."""

    def apply(
        self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float, learning_rate: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Return the new weight and the new states. `learning_rate`: [1], and 0 in a step that is skipped."""
        update = self.update(gradient, weight, states, decay)
        return weight - learning_rate * update.direction, update.states

    def _create_accumulators(self, block: Any, parameters: list[Any]) -> None:
        for parameter in parameters:
            weight = self._create_master_weight(parameter) if self._in_low_precision(parameter) else parameter
            for name, missing_axis in self._shapes_of(parameter).items():
                if missing_axis is None:
                    self._add_accumulator(name, weight, dtype="float32")
                else:
                    self._add_reduced_accumulator(name, weight, parameter, missing_axis)
            self._create_ema(weight)
        super()._create_accumulators(block, parameters)

    def _append_optimize_op(self, block: Any, parameter_and_gradient: tuple[Any, Any]) -> None:
        parameter, gradient = parameter_and_gradient
        low_precision = self._in_low_precision(parameter)
        weight = self._master_weights[parameter.name] if low_precision else parameter
        group = self._groups[parameter.name]
        states = self._states_of(parameter, weight)
        placements = self._placements_of_state(parameter)
        old = reshard(weight, placements)
        learning_rate = group.lr_multiplier * self._learning_rate_on(parameter)
        gradient = reshard(gradient.astype("float32"), placements)
        finite = None
        if self._loss_scaling.is_on:  # if the scaled gradients overflowed, change nothing
            finite = self._loss_scaling.is_finite_on(parameter.process_mesh).astype("float32")
            learning_rate = finite * learning_rate
        new, new_states = self.apply(gradient, old, states, self._decay if group.decays else 0.0, learning_rate)
        if finite is not None:
            new_states = {name: finite * state + (1.0 - finite) * states[name] for name, state in new_states.items()}
        for name, new_state in new_states.items():
            assign_to(states[name], reshard(new_state, states[name].placements))
        assign_to(weight, reshard(new, weight.placements))
        if low_precision:
            assign_to(parameter, reshard(new.astype(parameter.dtype), parameter.placements))
        self._update_ema(parameter, weight, new)  # also in a skipped step, as in timm: step 0 starts the average

    def _states_of(self, parameter: Any, weight: Any) -> dict[str, Any]:
        return {name: self._get_accumulator(name, weight) for name in self._shapes_of(parameter)}

    def _shapes_of(self, parameter: Any) -> dict[str, int | None]:
        return self.state_shapes(list(parameter.shape), self._groups[parameter.name])

    def _in_low_precision(self, parameter: Any) -> bool:
        return self._multi_precision and self._is_dtype_fp16_or_bf16(parameter.dtype)

    def _scalar(self, name: str, like: Any) -> Any:
        """Return a scalar of this step (`step_scalars`), [1], on the ranks of `like`.

        With loss scaling it is computed on the device, as that of the n-th step that wasn't skipped.
        """
        mesh = like.process_mesh
        if not self._loss_scaling.is_on:
            return replicate(self._scalars.value(name), mesh)
        number = self._number_on(mesh)
        if name == "second_moment_decay":
            return paddle.clip(1.0 - paddle.exp(-0.8 * paddle.log(number)), max=self._optim.betas[1])
        beta = self._optim.betas[0] if name == "correction1" else self._optim.betas[1]
        return 1.0 - paddle.exp(number * math.log(beta))

    def _number_on(self, mesh: Any) -> Any:
        """Return the number, from 1, of this step among those that loss scaling didn't skip, [1], on a mesh."""
        return replicate(self._scalars.value("step"), mesh) - self._loss_scaling.num_skipped_on(mesh)
