"""The optimizers, by the config's names, and how ZeRO splits what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn

from vit_static.config import OptimConfig
from vit_static.paddle_internals import RecordedGlobalNorm, ShardedState, everywhere, reshard, write_to

# (a parameter or a gradient as a value of the program) -> the placements that ZeRO gives what belongs to it
StatePlacements = Callable[[Any], list[Any]]


class AdamW(ShardedState, paddle.optimizer.AdamW):
    """Paddle's, whose state may be split."""


class SGDMomentum(ShardedState, paddle.optimizer.Optimizer):
    """Stochastic gradient descent with momentum: v' = momentum * v + g, p' = p - lr * v'.

    Of basic operators, since Paddle 3.3.1's rules for how `Momentum` is split don't keep its state split.
    """

    def __init__(self, learning_rate: Any, momentum: float, **arguments: Any) -> None:
        self._multi_precision = arguments.pop("multi_precision")
        super().__init__(learning_rate, **arguments)
        self._momentum = momentum
        self._master_weights: dict[str, Any] = {}
        self._rate: Any = None

    def _create_accumulators(self, block: Any, parameters: list[Any]) -> None:
        for parameter in parameters:
            if self._in_low_precision(parameter):
                parameter = self._create_master_weight(parameter)
            self._add_accumulator("velocity", parameter, dtype="float32")
        super()._create_accumulators(block, parameters)

    def _append_optimize_op(self, block: Any, parameter_and_gradient: tuple[Any, Any]) -> None:
        parameter, gradient = parameter_and_gradient
        low_precision = self._in_low_precision(parameter)
        weight = self._master_weights[parameter.name] if low_precision else parameter
        velocity = self._get_accumulator("velocity", weight)
        moved = self._momentum * velocity + reshard(gradient.astype("float32"), velocity.placements)
        if self._rate is None:
            self._rate = everywhere(
                paddle.assign(self._create_param_lr((parameter, gradient))), dist.auto_parallel.get_mesh()
            )
        rate = everywhere(self._rate, parameter.process_mesh)
        change = rate * moved
        overflow = self._get_auxiliary_var("found_inf")  # of float16's scaled gradients: then nothing is to change
        if overflow is not None:
            sound = 1.0 - overflow.astype("float32")
            moved, change = velocity + sound * (moved - velocity), sound * change
        updated = reshard(weight, velocity.placements) - change
        write_to(velocity, moved)
        write_to(weight, reshard(updated, weight.placements))
        if low_precision:
            write_to(parameter, reshard(updated.astype(parameter.dtype), parameter.placements))

    def _in_low_precision(self, parameter: Any) -> bool:
        return self._multi_precision and self._is_dtype_fp16_or_bf16(parameter.dtype)


def make_optimizer(
    model: nn.Layer,
    optim: OptimConfig,
    learning_rate: Callable[[int], float],
    *,
    num_micro_batches: int = 1,
    low_precision: bool = False,
    sharding_stage: int = 0,
    state_placements: StatePlacements | None = None,
) -> tuple[paddle.optimizer.Optimizer, paddle.optimizer.lr.LRScheduler, RecordedGlobalNorm]:
    """The optimizer over all parameters, the scheduler that feeds it (``scheduler.step(n)`` sets update n's rate), and
    its clipping, which knows the gradients' norm.

    adamw: arXiv 1711.05101, the decay multiplied by the learning rate and applied to every parameter, as the seed
    has it. sgd: with momentum, the decay added to the (already clipped) gradient. `low_precision` parameters get
    float32 master copies. `sharding_stage` is ZeRO's, `state_placements` where it puts what belongs to a parameter.
    """
    scheduler = paddle.optimizer.lr.LambdaDecay(learning_rate=1.0, lr_lambda=learning_rate)
    clip = RecordedGlobalNorm(optim.clip_norm)
    common = {
        "parameters": model.parameters(),
        "weight_decay": optim.weight_decay or None,
        "grad_clip": clip,
        "multi_precision": low_precision,
    }
    if optim.name == "adamw":
        common["weight_decay"] = optim.weight_decay
        optimizer = AdamW(scheduler, beta1=optim.betas[0], beta2=optim.betas[1], epsilon=optim.epsilon, **common)
    else:
        optimizer = SGDMomentum(scheduler, optim.momentum, **common)
    optimizer.average_over(num_micro_batches)
    if state_placements is not None and sharding_stage > 0:
        optimizer.shard_state(state_placements, scatter_gradients=sharding_stage > 1)
    return optimizer, scheduler, clip
