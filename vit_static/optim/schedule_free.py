"""Schedule-Free AdamW: an average of the weights instead of a falling learning rate (arXiv 2405.15682).

Three sequences: z takes AdamW's steps without momentum, x is the average of z, and the gradients are those at
y = (1 - beta1) z + beta1 x. Training holds y, the parameters of the model, and offset = z - y, which is 0 at first; so
x = y - (1 / beta1 - 1) offset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import paddle

from vit_static.optim.param_groups import ParamGroup
from vit_static.optim.rule_optimizer import RuleOptimizer, Update
from vit_static.parallel.dist_values import replicate

OFFSET = "offset"  # the name of z - y among an optimizer's states


def averaging_weight(number: Any, warmup_steps: Any, minimum: Callable[[Any, Any], Any] = min) -> Any:
    """Return the weight c of z in the average, in the update of this number, from 1: x' = (1 - c) x + c z'.

    Each z is weighted by the square of the learning rate with which it was reached. That rises linearly over
    `warmup_steps` (at least 1) and stays constant: the n-th is proportional to min(1, n / warmup_steps).
    """
    num_risen = minimum(number, warmup_steps)
    sum_of_squares = num_risen * (num_risen + 1.0) * (2.0 * num_risen + 1.0) / (6.0 * warmup_steps * warmup_steps)
    return (num_risen / warmup_steps) * (num_risen / warmup_steps) / (sum_of_squares + (number - num_risen))


def averaged_weights(weights: Any, offset: Any, beta1: float) -> Any:
    """Return x, which is evaluated, exported and used, from y, which is trained: arrays or tensors of one shape."""
    return weights - (1.0 / beta1 - 1.0) * offset


class ScheduleFreeAdamW(RuleOptimizer):
    """Schedule-Free AdamW (arXiv 2405.15682, algorithm 1), as in the authors' `AdamWScheduleFree`.

    With v' = beta2 v + (1 - beta2) g^2 and u = g / (sqrt(v' / (1 - beta2^n)) + epsilon) + decay y in the n-th update:
    z' = z - lr u, x' = (1 - c) x + c z', y' = (1 - beta1) z' + beta1 x'. Without x and z:
    y' = y + c offset - lr (1 - beta1 (1 - c)) u, offset' = (1 - c) (offset - beta1 lr u).
    """

    def state_shapes(self, shape: list[int], group: ParamGroup) -> dict[str, int | None]:
        return {"moment2": None, OFFSET: None}

    def update(self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float) -> Update:
        """Return u as the direction, and v'."""
        beta2 = self._optim.betas[1]
        second = beta2 * states["moment2"] + (1.0 - beta2) * gradient * gradient
        deviation = paddle.sqrt(second / self._scalar("correction2", weight)) + self._optim.epsilon
        direction = gradient / deviation
        if decay:
            direction = direction + decay * weight
        return Update(direction, {"moment2": second})

    def apply(
        self, gradient: Any, weight: Any, states: Mapping[str, Any], decay: float, learning_rate: Any
    ) -> tuple[Any, dict[str, Any]]:
        update = self.update(gradient, weight, states, decay)
        beta1, share = self._optim.betas[0], self._averaging_weight(weight)
        move, offset = learning_rate * update.direction, states[OFFSET]
        new = weight + share * offset - (1.0 - beta1 * (1.0 - share)) * move
        return new, {**update.states, OFFSET: (1.0 - share) * (offset - beta1 * move)}

    def _averaging_weight(self, like: Any) -> Any:
        """Return c, [1], on the ranks of `like`; 0 in a step that loss scaling skips, which isn't counted."""
        mesh = like.process_mesh
        if not self._loss_scaling.is_on:
            return replicate(self._scalars.value("averaging_weight"), mesh)
        warmup_steps = replicate(self._scalars.value("warmup_steps"), mesh)
        share = averaging_weight(self._number_on(mesh), warmup_steps, paddle.minimum)
        return self._loss_scaling.is_finite_on(mesh).astype("float32") * share
