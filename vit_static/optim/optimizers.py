"""Optimizers, selected by `optim.name`.

To add one: subclass RuleOptimizer, register it in _OPTIMIZERS, add its name to OptimConfig.name
(config/optim_schema.py), and put its per-step values into step_scalars. CONTRIBUTING.md describes the tests.

Notation: g is the clipped gradient, p the parameter, lr its learning rate in this step, and decay its weight-decay
coefficient (0 if it isn't decayed).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.config.optim_schema import OptimConfig
from vit_static.optim.ema import EmaMixin, ema_decay
from vit_static.optim.grad_clip import GlobalNormClip
from vit_static.optim.loss_scaling import LossScaling
from vit_static.optim.muon import Muon
from vit_static.optim.param_groups import ParamGroup, decay_coefficient, norm_group, param_group
from vit_static.optim.rule_optimizer import RuleOptimizer, Update
from vit_static.optim.schedule_free import ScheduleFreeAdamW, averaging_weight
from vit_static.optim.sharded_state import ShardedState, StatePlacements, StepScalars
from vit_static.parallel.dist_values import reshard

_BETA_POWERS = ("beta1_pow_acc", "beta2_pow_acc")  # as Paddle's AdamW names these states


def step_scalars(step: int, optim: OptimConfig, warmup_steps: int = 0) -> dict[str, float]:
    """Return by name what the update that follows `step` completed ones needs besides the learning rate.

    `warmup_steps`: those of the learning rate, on which the average of schedule_free_adamw depends.
    """
    scalars = {"step": step + 1.0}
    if optim.name in ("lamb", "schedule_free_adamw", "muon"):
        scalars |= {f"correction{order}": 1.0 - beta ** (step + 1) for order, beta in enumerate(optim.betas, 1)}
    if optim.name == "adafactor":
        scalars |= {"second_moment_decay": min(optim.betas[1], 1.0 - (step + 1) ** -0.8)}
    if optim.name == "schedule_free_adamw":
        num_warmup_steps = max(warmup_steps, 1.0)
        scalars |= {
            "warmup_steps": num_warmup_steps,
            "averaging_weight": averaging_weight(step + 1.0, num_warmup_steps),
        }
    if optim.ema_decay > 0.0:
        scalars["ema_decay"] = ema_decay(step, optim)
    return scalars


class AdamW(EmaMixin, ShardedState, paddle.optimizer.AdamW):
    """AdamW (arXiv 1711.05101): Paddle's fused operator, with sharded state, parameter groups and the EMA.

    m' = beta1 m + (1 - beta1) g, v' = beta2 v + (1 - beta2) g^2, and in the n-th update
    p' = p - lr (decay p + m' / (1 - beta1^n) / (sqrt(v' / (1 - beta2^n)) + epsilon)).
    """

    def __init__(
        self, learning_rate: Any, groups: Mapping[str, ParamGroup], scalars: StepScalars, **arguments: Any
    ) -> None:
        super().__init__(learning_rate, apply_decay_param_fun=lambda name: groups[name].decays, **arguments)
        self._groups, self._scalars = groups, scalars

    def _create_param_lr(self, parameter_and_gradient: tuple[Any, Any]) -> Any:
        # Not with the argument lr_ratio: on a CPU, Paddle 3.3.1 multiplies only the decay by it.
        if all(group.lr_multiplier == 1.0 for group in self._groups.values()):
            return super()._create_param_lr(parameter_and_gradient)
        parameter = parameter_and_gradient[0]
        return self._groups[parameter.name].lr_multiplier * self._learning_rate_on(parameter)

    def _create_accumulators(self, block: Any, parameters: list[Any]) -> None:
        for parameter in parameters:
            low_precision = self._multi_precision and self._is_dtype_fp16_or_bf16(parameter.dtype)
            self._create_ema(self._create_master_weight(parameter) if low_precision and self._has_ema else parameter)
        super()._create_accumulators(block, parameters)

    def _append_optimize_op(self, block: Any, parameter_and_gradient: tuple[Any, Any]) -> None:
        super()._append_optimize_op(block, parameter_and_gradient)
        parameter = parameter_and_gradient[0]
        master = self._master_weights.get(parameter.name)
        weight, result_index = (parameter, 0) if master is None else (master, 6)
        updated = weight
        if self._placements_of_state(parameter) != weight.placements:
            # The operator gets a part of the weight and writes into its memory. Read its result: Paddle's later passes
            # assume that nobody reads the input again.
            operator = paddle.static.default_main_program().global_block().ops[-1]
            assert operator.name() == "pd_op.adamw_"
            updated = operator.result(result_index)
        self._update_ema(parameter, weight, updated)


class AdamWByRule(RuleOptimizer):
    """AdamW (see AdamW) of basic operators, for float16: it can skip a step without the host.

    Paddle's fused operator reads on the host whether the gradients overflowed, which waits for the device. Unlike the
    step's number, the powers of beta, [1] each, don't change in a step that is skipped.
    """

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        return {"moment1": None, "moment2": None}

    def _create_accumulators(self, block: Any, parameters: list[Any]) -> None:
        super()._create_accumulators(block, parameters)
        for parameter in parameters:
            weight = self._master_weights.get(parameter.name, parameter)
            for name, beta in zip(_BETA_POWERS, self._optim.betas, strict=True):
                self._add_accumulator(name, weight, dtype="float32", fill_value=beta, shape=[1])

    def _states_of(self, parameter: Any, weight: Any) -> dict[str, Any]:
        powers = {name: self._get_accumulator(name, weight) for name in _BETA_POWERS}
        return {**super()._states_of(parameter, weight), **powers}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        beta1, beta2 = self._optim.betas
        power1, power2 = (states[name] for name in _BETA_POWERS)
        first = beta1 * states["moment1"] + (1.0 - beta1) * gradient
        second = beta2 * states["moment2"] + (1.0 - beta2) * gradient * gradient
        direction = first / (1.0 - power1) / (paddle.sqrt(second / (1.0 - power2)) + self._optim.epsilon)
        if decay:
            direction = direction + decay * weight
        powers = zip(_BETA_POWERS, (beta1 * power1, beta2 * power2), strict=True)
        return Update(direction, {"moment1": first, "moment2": second, **dict(powers)})


class SGDMomentum(RuleOptimizer):
    """SGD with momentum and an L2 penalty.

    v' = momentum v + g + decay p, p' = p - lr v'.
    """

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        return {"velocity": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        if decay:
            gradient = gradient + decay * weight
        velocity = self._optim.momentum * states["velocity"] + gradient
        return Update(velocity, {"velocity": velocity})


class Lion(RuleOptimizer):
    """Lion (arXiv 2302.06675, algorithm 2).

    p' = p - lr (sign(beta1 m + (1 - beta1) g) + decay p), m' = beta2 m + (1 - beta2) g.
    """

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        return {"moment1": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        (beta1, beta2), moment = self._optim.betas, states["moment1"]
        direction = paddle.sign(beta1 * moment + (1.0 - beta1) * gradient)
        if decay:
            direction = direction + decay * weight
        return Update(direction, {"moment1": beta2 * moment + (1.0 - beta2) * gradient})


class Lamb(RuleOptimizer):
    """LAMB (arXiv 1904.00962), as in timm and apex.

    u is AdamW's direction, decay included; p' = p - lr |p| / |u| u with the 2-norms of the parameter. A parameter
    without decay, or with a norm of 0, has the factor 1 instead of |p| / |u|.
    """

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        return {"moment1": None, "moment2": None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        beta1, beta2 = self._optim.betas
        first = beta1 * states["moment1"] + (1.0 - beta1) * gradient
        second = beta2 * states["moment2"] + (1.0 - beta2) * gradient * gradient
        deviation = paddle.sqrt(second / self._scalar("correction2", weight)) + self._optim.epsilon
        direction = first / self._scalar("correction1", weight) / deviation
        if decay:
            direction = direction + decay * weight
            weight_norm, direction_norm = _norm(weight), _norm(direction)
            has_ratio = (weight_norm * direction_norm > 0.0).astype("float32")
            ratio = weight_norm / (direction_norm + (1.0 - has_ratio))
            direction = direction * (has_ratio * ratio + (1.0 - has_ratio))
        return Update(direction, {"moment1": first, "moment2": second})


def _norm(value: Any) -> Any:
    """Return the 2-norm of an entire tensor, [1], on every rank."""
    square = paddle._C_ops.squared_l2_norm(value)
    return paddle.sqrt(reshard(square, [dist.Replicate()] * len(square.placements)))


class Adafactor(RuleOptimizer):
    """Adafactor for Vision Transformers (arXiv 2106.04560, section 3.5).

    The second moment of a matrix is factored: R and C are moving averages of the means of g^2 over its columns and over
    its rows. m' = beta1 m + (1 - beta1) g / sqrt(R' C' / mean(R')), p' = p - lr (m' + decay p). Momentum replaces the
    update clipping and relative step sizes of the original (arXiv 1804.04235). In the n-th update the averages decay by
    min(beta2, 1 - n^-0.8). Unlike big_vision's, the momentum is float32, not bfloat16.
    """

    MIN_FACTORED_SIZE = 32  # of the smaller of the two axes

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        axes = self._factored_axes(shape)
        if axes is None:
            return {"moment1": None, "moment2": None}
        smaller, larger = axes
        return {"moment1": None, "row_moment2": larger, "column_moment2": smaller}

    def _factored_axes(self, shape: list[int]) -> tuple[int, int] | None:
        """Return the second largest axis and the largest one, or None if the second moment isn't factored."""
        if len(shape) < 2:
            return None
        smaller, larger = (int(axis) for axis in np.argsort(shape, kind="stable")[-2:])
        return (smaller, larger) if shape[smaller] >= self.MIN_FACTORED_SIZE else None

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        moment2_decay = self._scalar("second_moment_decay", weight)
        square = gradient * gradient + 1e-30
        axes = self._factored_axes(list(weight.shape))
        if axes is None:
            second = {"moment2": square + moment2_decay * (states["moment2"] - square)}
            scaled = gradient * paddle.rsqrt(second["moment2"])
        else:
            smaller, larger = axes
            second = {}
            for name, axis in (("row_moment2", larger), ("column_moment2", smaller)):
                mean = reshard(square.mean(axis=axis), states[name].placements)
                second[name] = mean + moment2_decay * (states[name] - mean)
            row, column = second["row_moment2"].unsqueeze(larger), second["column_moment2"].unsqueeze(smaller)
            scaled = gradient * paddle.rsqrt(row / row.mean(axis=smaller, keepdim=True)) * paddle.rsqrt(column)
        beta1 = self._optim.betas[0]
        direction = moment = beta1 * states["moment1"] + (1.0 - beta1) * scaled
        if decay:
            direction = moment + decay * weight
        return Update(direction, {"moment1": moment, **second})


_OPTIMIZERS: dict[str, type[RuleOptimizer]] = {
    "sgd": SGDMomentum,
    "lamb": Lamb,
    "lion": Lion,
    "adafactor": Adafactor,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "muon": Muon,
}


class OptimizerParts(NamedTuple):
    """An optimizer and what is set or read in each step."""

    optimizer: paddle.optimizer.Optimizer
    scheduler: paddle.optimizer.lr.LRScheduler  # step(n) sets the learning rate of the update after n completed ones
    clip: GlobalNormClip  # knows the norms of the gradients
    scalars: StepScalars  # set them to `step_scalars`


def make_optimizer(
    model: nn.Layer,
    optim: OptimConfig,
    learning_rate: Callable[[int], float],
    *,
    num_micro_batches: int = 1,
    low_precision: bool = False,
    scales_loss: bool = False,
    newton_schulz_dtype: str = "float32",
    sharding_stage: int = 0,
    state_placements: StatePlacements | None = None,
    stages: Sequence[dist.ProcessMesh] = (),
) -> OptimizerParts:
    """Create the config's optimizer over all parameters of the model that have a gradient.

    With `low_precision`, parameters in half precision get float32 master copies. `scales_loss`: the loss is going to be
    scaled, as float16 needs. `newton_schulz_dtype` is Muon's. `sharding_stage` is ZeRO's, and `state_placements`
    returns where it puts a parameter's state. `stages`: the mesh of each pipeline stage.
    """
    scheduler = paddle.optimizer.lr.LambdaDecay(learning_rate=1.0, lr_lambda=learning_rate)
    scalars = StepScalars()
    names = [name for name, _ in model.named_parameters()]
    depth = len({match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))})
    trained = {name: parameter for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    groups = {
        parameter.name: param_group(name, depth, optim, len(parameter.shape)) for name, parameter in trained.items()
    }
    norm_groups = {parameter.name: norm_group(name) for name, parameter in trained.items()}
    loss_scaling = LossScaling(list(stages))
    clip = GlobalNormClip(optim.clip_norm, norm_groups, lambda: scalars.value("step"), loss_scaling)
    common: dict[str, Any] = {
        "parameters": list(trained.values()),
        "weight_decay": None,
        "grad_clip": clip,
        "multi_precision": low_precision,
    }
    if optim.name == "adamw" and not scales_loss:
        common["weight_decay"] = decay_coefficient(optim)
        (beta1, beta2), epsilon = optim.betas, optim.epsilon
        optimizer = AdamW(scheduler, groups, scalars, beta1=beta1, beta2=beta2, epsilon=epsilon, **common)
    else:
        rule = AdamWByRule if optim.name == "adamw" else _OPTIMIZERS[optim.name]
        optimizer = rule(scheduler, optim, groups, scalars, **common)
    if isinstance(optimizer, Muon):
        optimizer.newton_schulz_dtype = newton_schulz_dtype
    if optim.ema_decay > 0.0:
        optimizer.enable_ema()
    optimizer.average_over(num_micro_batches)
    optimizer.scale_loss_by(loss_scaling)
    if state_placements is not None and sharding_stage > 0:
        optimizer.shard_state(state_placements, scatter_gradients=sharding_stage > 1)
    return OptimizerParts(optimizer, scheduler, clip, scalars)
