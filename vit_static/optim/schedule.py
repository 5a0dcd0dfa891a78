"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from vit_static.config.schema import OptimConfig, ScheduleConfig, TrainConfig


def learning_rate(
    step: int, total_steps: int, optim: OptimConfig, schedule: ScheduleConfig, warmup_steps: int | None = None
) -> float:
    """The rate of the update that follows `step` done ones (so `warmup_start_lr`, 0, for the first with a warmup).

    `warmup_steps` None: the schedule's own. As the seed has it, the decay begins after the warmup and ends at
    `total_steps`, and the warmup rises linearly to the peak. With `decay_begins` at_start the decay counts from step 0,
    as timm's schedulers do: what the warmup hides of it is left out. rsqrt and the cooldown, which multiplies the rest
    by the share of its steps that are left, are big_vision's. Past the end the last value holds.
    """
    step = min(step, total_steps)
    warmup = min(schedule.warmup_steps if warmup_steps is None else warmup_steps, total_steps)
    if step < warmup:
        return schedule.warmup_start_lr + (optim.lr - schedule.warmup_start_lr) * step / warmup
    begin = warmup if schedule.decay_begins == "after_warmup" else 0
    progress = (step - begin) / max(total_steps - begin, 1)
    decay = {
        "cosine": lambda: schedule.end_lr + 0.5 * (optim.lr - schedule.end_lr) * (1.0 + math.cos(math.pi * progress)),
        "linear": lambda: schedule.end_lr + (optim.lr - schedule.end_lr) * (1.0 - progress),
        "rsqrt": lambda: optim.lr / math.sqrt(1.0 + (step - warmup) / schedule.timescale),
        "constant": lambda: optim.lr,
    }[schedule.name]
    cooldown = min(1.0, (total_steps - step) / schedule.cooldown_steps) if schedule.cooldown_steps else 1.0
    return decay() * cooldown


_ENDLESS = 2.0**62  # images; more epochs than that make no whole number of steps


def total_steps(train: TrainConfig, num_images: int, global_batch_size: int) -> int:
    """Optimizer steps of a run: whole batches of the images that it has, at least one."""
    images = min(train.epochs * num_images, _ENDLESS)
    if train.max_images is not None:
        images = min(images, train.max_images)
    steps = max(1, math.floor(images / global_batch_size + 1e-9))
    return steps if train.max_steps is None else min(steps, train.max_steps)


def warmup_steps(schedule: ScheduleConfig, num_images: int, global_batch_size: int) -> int:
    """Optimizer steps of the warmup."""
    if schedule.warmup_epochs is None:
        return schedule.warmup_steps
    return round(min(schedule.warmup_epochs * num_images, _ENDLESS) / global_batch_size)
