"""The optimizers, by the config's names: what each parameter's rate and decay are, the moving average of the weights,
and how ZeRO splits what they keep."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.config.schema import OptimConfig
from vit_static.optim.grad_clip import GlobalNormClip
from vit_static.optim.param_groups import ParamGroup, decay_coefficient, layer_index, param_group
from vit_static.optim.sharded_state import ShardedState, StepScalars
from vit_static.parallel.dist_values import assign_to, replicate, reshard

# (a parameter or a gradient as a value of the program) -> the placements that ZeRO gives what belongs to it
StatePlacements = Callable[[Any], list[Any]]
EMA = "ema"  # what the average is called among what an optimizer keeps


def ema_decay(step: int, optim: OptimConfig) -> float:
    """The share that the average keeps in the update that follows `step` done ones.

    As timm's ModelEmaV3: 0 in the first, so that the average begins with the weights after it; with the warmup then
    1 - n ** (-2/3) in the n-th, until that passes `ema_decay`.
    """
    warmed = 1.0 - (step + 1) ** (-2.0 / 3.0) if optim.ema_warmup else optim.ema_decay
    return min(optim.ema_decay, warmed) if step > 0 else 0.0


def step_scalars(step: int, optim: OptimConfig) -> dict[str, float]:
    """What the update after `step` done ones needs besides the learning rate, by name."""
    numbers = {"step": step + 1.0}
    if optim.name == "lamb":
        numbers |= {f"correction{order}": 1.0 - beta ** (step + 1) for order, beta in enumerate(optim.betas, 1)}
    if optim.name == "adafactor":
        numbers |= {"second_moment_decay": min(optim.betas[1], 1.0 - (step + 1) ** -0.8)}
    if optim.ema_decay > 0.0:
        numbers["ema_decay"] = ema_decay(step, optim)
    return numbers


# -- the updates -----------------------------------------------------------------------------------------------------


class _AveragedWeights:
    """For an optimizer to inherit: each parameter's group, and the average of the weights."""

    _groups: Mapping[str, ParamGroup]
    _numbers: StepScalars
    _averages_weights = False
    _rate: Any = None

    def _rate_on(self, parameter: Any) -> Any:
        """The step's, on the ranks of a parameter."""
        if self._rate is None:
            rate = paddle.assign(self._global_learning_rate())  # type: ignore[attr-defined]
            self._rate = replicate(rate, dist.auto_parallel.get_mesh())
        return replicate(self._rate, parameter.process_mesh)

    def average_weights(self) -> None:
        self._averages_weights = True

    def _average(self, parameter: Any, weight: Any, updated: Any) -> None:
        """`weight` in float32 is what the average is kept for, `updated` its new value."""
        if not self._averages_weights:
            return
        average = self._get_accumulator(EMA, weight)  # type: ignore[attr-defined]
        share = replicate(self._numbers.value("ema_decay"), parameter.process_mesh)
        updated = reshard(updated.astype("float32"), average.placements)
        assign_to(average, updated + share * (average - updated))


class AdamW(_AveragedWeights, ShardedState, paddle.optimizer.AdamW):
    """Paddle's, whose state may be split."""

    def __init__(
        self, learning_rate: Any, groups: Mapping[str, ParamGroup], numbers: StepScalars, **arguments: Any
    ) -> None:
        super().__init__(learning_rate, apply_decay_param_fun=lambda name: groups[name].decays, **arguments)
        self._groups, self._numbers = groups, numbers

    def _create_param_lr(self, parameter_and_gradient: tuple[Any, Any]) -> Any:
        # Not by the argument lr_ratio, which on a CPU scales the decay alone (3.3.1).
        if all(group.rate == 1.0 for group in self._groups.values()):
            return super()._create_param_lr(parameter_and_gradient)
        parameter = parameter_and_gradient[0]
        return self._groups[parameter.name].rate * self._rate_on(parameter)

    def _create_accumulators(self, block: Any, parameters: list[Any]) -> None:
        if self._averages_weights:
            for parameter in parameters:
                low_precision = self._multi_precision and self._is_dtype_fp16_or_bf16(parameter.dtype)
                weight = self._create_master_weight(parameter) if low_precision else parameter
                self._add_accumulator(EMA, weight, dtype="float32")
        super()._create_accumulators(block, parameters)

    def _append_optimize_op(self, block: Any, parameter_and_gradient: tuple[Any, Any]) -> None:
        super()._append_optimize_op(block, parameter_and_gradient)
        parameter = parameter_and_gradient[0]
        master = self._master_weights.get(parameter.name)
        weight, written = (parameter, 0) if master is None else (master, 6)
        updated = weight
        if self._placements_of_state(parameter) != weight.placements:
            # The operator gets a part of the weight, and writes to its memory: what it gives is to be read, since
            # Paddle's later passes take what it was given for dead.
            operator = paddle.static.default_main_program().global_block().ops[-1]
            assert operator.name() == "pd_op.adamw_"
            updated = operator.result(written)
        self._average(parameter, weight, updated)


@dataclass(frozen=True)
class Update:
    """What a rule makes of a gradient: what the weight is moved by, times the rate, and the new states."""

    direction: Any
    states: dict[str, Any] = field(default_factory=dict)


class RuleOptimizer(_AveragedWeights, ShardedState, paddle.optimizer.Optimizer, ABC):
    """p' = p - rate * direction, of basic operators, since Paddle 3.3.1's rules for how its other optimizers'
    operators are split don't keep their state split. A subclass says what is kept and what the direction is.

    Everything is float32; parameters in half precision have master copies.
    """

    def __init__(
        self,
        learning_rate: Any,
        optim: OptimConfig,
        groups: Mapping[str, ParamGroup],
        numbers: StepScalars,
        **arguments: Any,
    ) -> None:
        self._multi_precision = arguments.pop("multi_precision")
        super().__init__(learning_rate, **arguments)
        self._optim, self._groups, self._numbers = optim, groups, numbers
        self._decay = decay_coefficient(optim)
        self._master_weights: dict[str, Any] = {}

    @abstractmethod
    def state_shapes(self, shape: list[int]) -> dict[str, int | None]:
        """By name what is kept of a parameter of this shape: the axis that it lacks, or None."""

    @abstractmethod
    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        """All with the same placements; `decay` is 0 where the parameter has none."""

    def _create_accumulators(self, block: Any, parameters: list[Any]) -> None:
        for parameter in parameters:
            weight = self._create_master_weight(parameter) if self._in_low_precision(parameter) else parameter
            for name, axis in self.state_shapes(list(parameter.shape)).items():
                if axis is None:
                    self._add_accumulator(name, weight, dtype="float32")
                else:
                    self._add_reduced(name, weight, parameter, axis)
            if self._averages_weights:
                self._add_accumulator(EMA, weight, dtype="float32")
        super()._create_accumulators(block, parameters)

    def _append_optimize_op(self, block: Any, parameter_and_gradient: tuple[Any, Any]) -> None:
        parameter, gradient = parameter_and_gradient
        low_precision = self._in_low_precision(parameter)
        weight = self._master_weights[parameter.name] if low_precision else parameter
        group = self._groups[parameter.name]
        kept = {name: self._get_accumulator(name, weight) for name in self.state_shapes(list(parameter.shape))}
        placements = self._placements_of_state(parameter)
        whole = reshard(weight, placements)
        rate = group.rate * self._rate_on(parameter)
        gradient = reshard(gradient.astype("float32"), placements)
        updated = self.update(gradient, whole, kept, self._decay if group.decays else 0.0)
        change, states = rate * updated.direction, updated.states
        overflow = self._get_auxiliary_var("found_inf")  # of float16's scaled gradients: then nothing is to change
        if overflow is not None:
            sound = 1.0 - overflow.astype("float32")
            change = sound * change
            states = {name: kept[name] + sound * (value - kept[name]) for name, value in states.items()}
        for name, value in states.items():
            assign_to(kept[name], reshard(value, kept[name].placements))
        new = whole - change
        assign_to(weight, reshard(new, weight.placements))
        if low_precision:
            assign_to(parameter, reshard(new.astype(parameter.dtype), parameter.placements))
        self._average(parameter, weight, new)

    def _in_low_precision(self, parameter: Any) -> bool:
        return self._multi_precision and self._is_dtype_fp16_or_bf16(parameter.dtype)

    def _number(self, name: str, like: Any) -> Any:
        return replicate(self._numbers.value(name), like.process_mesh)


class SGDMomentum(RuleOptimizer):
    """v' = momentum * v + g + decay * p, p' = p - lr * v'."""

    def state_shapes(self, shape: list[int]) -> dict[str, int | None]:
        return {"velocity": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        if decay:
            gradient = gradient + decay * weight
        velocity = self._optim.momentum * states["velocity"] + gradient
        return Update(velocity, {"velocity": velocity})


class Lion(RuleOptimizer):
    """arXiv 2302.06675: the sign of the momentum, interpolated otherwise than it is kept."""

    def state_shapes(self, shape: list[int]) -> dict[str, int | None]:
        return {"moment1": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        (beta1, beta2), moment = self._optim.betas, states["moment1"]
        direction = paddle.sign(beta1 * moment + (1.0 - beta1) * gradient)
        if decay:
            direction = direction + decay * weight
        return Update(direction, {"moment1": beta2 * moment + (1.0 - beta2) * gradient})


class Lamb(RuleOptimizer):
    """arXiv 1904.00962, as timm's and apex's: Adam's direction and the decay, times the weight's norm over theirs; by
    parameter, and only for those that decay."""

    def state_shapes(self, shape: list[int]) -> dict[str, int | None]:
        return {"moment1": None, "moment2": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        beta1, beta2 = self._optim.betas
        first = beta1 * states["moment1"] + (1.0 - beta1) * gradient
        second = beta2 * states["moment2"] + (1.0 - beta2) * gradient * gradient
        deviation = paddle.sqrt(second / self._number("correction2", weight)) + self._optim.epsilon
        direction = first / self._number("correction1", weight) / deviation
        if decay:
            direction = direction + decay * weight
            norm_of_weight, norm_of_direction = _norm(weight), _norm(direction)
            both = (norm_of_weight * norm_of_direction > 0.0).astype("float32")
            ratio = norm_of_weight / (norm_of_direction + (1.0 - both))
            direction = direction * (both * ratio + (1.0 - both))
        return Update(direction, {"moment1": first, "moment2": second})


def _norm(value: Any) -> Any:
    """The 2-norm of all of a tensor, [1], on every rank."""
    square = paddle._C_ops.squared_l2_norm(value)
    return paddle.sqrt(reshard(square, [dist.Replicate()] * len(square.placements)))


class Adafactor(RuleOptimizer):
    """As arXiv 2106.04560, section 3.5, has it for Vision Transformers: the second moment of a matrix from the means of
    its rows and columns, a momentum in place of Adafactor's own step sizes and clipping.

    Its decay is min(betas[1], 1 - n ** -0.8) in the n-th update. (big_vision keeps the momentum in bfloat16; here it
    is float32.)
    """

    LEAST_FACTORED = 32  # of the smaller of the two axes

    def state_shapes(self, shape: list[int]) -> dict[str, int | None]:
        axes = self._factored(shape)
        second: dict[str, int | None] = {"moment2": None}
        if axes is not None:
            second = {"row_moment2": axes[1], "column_moment2": axes[0]}
        return {"moment1": None, **second}

    def _factored(self, shape: list[int]) -> tuple[int, int] | None:
        """The second largest axis and the largest, or None where the second moment is kept whole."""
        if len(shape) < 2:
            return None
        smaller, larger = (int(axis) for axis in np.argsort(shape, kind="stable")[-2:])
        return (smaller, larger) if shape[smaller] >= self.LEAST_FACTORED else None

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        keep = self._number("second_moment_decay", weight)
        square = gradient * gradient + 1e-30
        axes = self._factored(list(weight.shape))
        if axes is None:
            second = {"moment2": square + keep * (states["moment2"] - square)}
            scaled = gradient * paddle.rsqrt(second["moment2"])
        else:
            smaller, larger = axes
            second = {}
            for name, axis in (("row_moment2", larger), ("column_moment2", smaller)):
                mean = reshard(square.mean(axis=axis), states[name].placements)
                second[name] = mean + keep * (states[name] - mean)
            row, column = second["row_moment2"].unsqueeze(larger), second["column_moment2"].unsqueeze(smaller)
            scaled = gradient * paddle.rsqrt(row / row.mean(axis=smaller, keepdim=True)) * paddle.rsqrt(column)
        beta1 = self._optim.betas[0]
        direction = moment = beta1 * states["moment1"] + (1.0 - beta1) * scaled
        if decay:
            direction = moment + decay * weight
        return Update(direction, {"moment1": moment, **second})


_BY_RULE: dict[str, type[RuleOptimizer]] = {"sgd": SGDMomentum, "lamb": Lamb, "lion": Lion, "adafactor": Adafactor}


def make_optimizer(
    model: nn.Layer,
    optim: OptimConfig,
    learning_rate: Callable[[int], float],
    *,
    num_micro_batches: int = 1,
    low_precision: bool = False,
    sharding_stage: int = 0,
    state_placements: StatePlacements | None = None,
) -> tuple[paddle.optimizer.Optimizer, paddle.optimizer.lr.LRScheduler, GlobalNormClip, StepScalars]:
    """The optimizer over all parameters that have a gradient, the scheduler that feeds it (``scheduler.step(n)`` sets
    update n's rate), its clipping, which knows the gradients' norm, and the other numbers of a step (`step_numbers`).

    adamw: arXiv 1711.05101, the decay multiplied by the learning rate and applied to every parameter unless the config
    says otherwise, as the seed has it. sgd: with momentum, the decay added to the (already clipped) gradient. lamb,
    lion, adafactor: see their classes. `low_precision` parameters get float32 master copies. `sharding_stage` is
    ZeRO's, `state_placements` where it puts what belongs to a parameter.
    """
    scheduler = paddle.optimizer.lr.LambdaDecay(learning_rate=1.0, lr_lambda=learning_rate)
    numbers = StepScalars()
    trained = {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    depth = len({found[1] for name, _ in model.named_parameters() if (found := re.match(r"blocks\.(\d+)\.", name))})
    groups = {parameter.name: param_group(name, depth, optim) for name, parameter in trained.items()}
    layers = {parameter.name: layer_index(name) for name, parameter in trained.items()}
    clip = GlobalNormClip(optim.clip_norm, layers, lambda: numbers.value("step"))
    common: dict[str, Any] = {
        "parameters": list(trained.values()),
        "weight_decay": None,
        "grad_clip": clip,
        "multi_precision": low_precision,
    }
    if optim.name == "adamw":
        common["weight_decay"] = decay_coefficient(optim)
        (beta1, beta2), epsilon = optim.betas, optim.epsilon
        optimizer = AdamW(scheduler, groups, numbers, beta1=beta1, beta2=beta2, epsilon=epsilon, **common)
    else:
        optimizer = _BY_RULE[optim.name](scheduler, optim, groups, numbers, **common)
    if optim.ema_decay > 0.0:
        optimizer.average_weights()
    optimizer.average_over(num_micro_batches)
    if state_placements is not None and sharding_stage > 0:
        optimizer.shard_state(state_placements, scatter_gradients=sharding_stage > 1)
    return optimizer, scheduler, clip, numbers
