"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from vit_static.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """The rate of the update that follows `step` done ones (so 0 for the first, and 0 there with a warmup).

    As the seed has it: the decay begins after the warmup and ends at `total_steps`; during the warmup the decayed
    value (the peak, then) is multiplied by step / warmup_steps. Past the end the last value holds.
    """
    warmup_steps = min(schedule.warmup_steps, total_steps)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    decay = {
        "cosine": lambda: 0.5 * optim.lr * (1.0 + math.cos(math.pi * progress)),
        "linear": lambda: schedule.end_lr + (optim.lr - schedule.end_lr) * (1.0 - progress),
        "constant": lambda: optim.lr,
    }[schedule.name]
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return decay() * warmup
