"""The optimizers, by the config's names."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import nn

from vit_static.config import ConfigError, OptimConfig
from vit_static.paddle_internals import RecordedGlobalNorm


def check(optim: OptimConfig, grad_accum_steps: int) -> None:
    """Raises ConfigError for what Paddle can't do."""
    if optim.name == "sgd" and grad_accum_steps > 1:
        raise ConfigError(
            f"parallel.grad_accum_steps = {grad_accum_steps}: Paddle 3.3.1's executor never returns from a step of "
            "accumulated gradients with momentum; set parallel.grad_accum_steps=1 (the update is the same), or "
            "optim.name=adamw"
        )


def make_optimizer(
    model: nn.Layer,
    optim: OptimConfig,
    learning_rate: Callable[[int], float],
    *,
    grad_accum_steps: int = 1,
    low_precision: bool = False,
) -> tuple[paddle.optimizer.Optimizer, paddle.optimizer.lr.LRScheduler, RecordedGlobalNorm]:
    """The optimizer over all parameters, the scheduler that feeds it (``scheduler.step(n)`` sets update n's rate), and
    its clipping, which knows the gradients' norm.

    adamw: arXiv 1711.05101, the decay multiplied by the learning rate and applied to every parameter, as the seed
    has it. sgd: with momentum, the decay added to the (already clipped) gradient. `low_precision` parameters get
    float32 master copies.
    """
    scheduler = paddle.optimizer.lr.LambdaDecay(learning_rate=1.0, lr_lambda=learning_rate)
    # Paddle divides accumulated gradients by their number after clipping, not before: the bound grows with it.
    clip_norm = None if optim.clip_norm is None else optim.clip_norm * grad_accum_steps
    clip = RecordedGlobalNorm(clip_norm)
    if optim.name == "adamw":
        optimizer = paddle.optimizer.AdamW(
            scheduler,
            beta1=optim.betas[0],
            beta2=optim.betas[1],
            epsilon=optim.epsilon,
            parameters=model.parameters(),
            weight_decay=optim.weight_decay,
            grad_clip=clip,
            multi_precision=low_precision,
        )
    else:
        optimizer = paddle.optimizer.Momentum(
            scheduler,
            momentum=optim.momentum,
            parameters=model.parameters(),
            weight_decay=optim.weight_decay or None,
            grad_clip=clip,
            multi_precision=low_precision,
        )
    return optimizer, scheduler, clip
