"""Learning-rate schedules as pure functions of the step, and the number of steps of a run and its warmup.

`RunSpec.lr_at` calls `learning_rate`; the optimizers multiply it by each parameter's `lr_multiplier` (param_groups.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vit_static.config.optim_schema import OptimConfig, ScheduleConfig
from vit_static.config.schema import TrainConfig


def learning_rate(
    step: int, total_steps: int, optim: OptimConfig, schedule: ScheduleConfig, warmup_steps: int | None = None
) -> float:
    """Return the learning rate of the update that follows `step` completed ones.

    The warmup rises linearly from `warmup_start_lr`, in the first update, to `optim.lr`. `warmup_steps` None means
    `schedule.warmup_steps`. As in PLSC, the decay begins after the warmup and ends at `total_steps`. With
    `decay_begins` at_start it is counted from step 0, as in timm's schedulers, and the warmup replaces its beginning.
    rsqrt and the cooldown, which decreases linearly from 1 to 0 and multiplies the rate, are big_vision's. After
    `total_steps`, the rate stays constant. schedule_free_adamw has the warmup of its paper, whose first update isn't
    lost: the n-th one's rate is n / `warmup_steps` of `optim.lr`.
    """
    step = min(step, total_steps)
    warmup = min(schedule.warmup_steps if warmup_steps is None else warmup_steps, total_steps)
    if optim.name == "schedule_free_adamw":
        return optim.lr * min(1.0, (step + 1) / max(warmup, 1))
    if step < warmup:
        return schedule.warmup_start_lr + (optim.lr - schedule.warmup_start_lr) * step / warmup
    decay_start = warmup if schedule.decay_begins == "after_warmup" else 0
    progress = (step - decay_start) / max(total_steps - decay_start, 1)
    decay = {
        "cosine": lambda: schedule.end_lr + 0.5 * (optim.lr - schedule.end_lr) * (1.0 + math.cos(math.pi * progress)),
        "linear": lambda: schedule.end_lr + (optim.lr - schedule.end_lr) * (1.0 - progress),
        "rsqrt": lambda: optim.lr / math.sqrt(1.0 + (step - warmup) / schedule.timescale),
        "constant": lambda: optim.lr,
    }[schedule.name]
    cooldown = min(1.0, (total_steps - step) / schedule.cooldown_steps) if schedule.cooldown_steps else 1.0
    return decay() * cooldown


_MAX_IMAGES = 2.0**62  # the number of steps must stay an exact integer


def total_steps(train: TrainConfig, num_images: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps of a run: full batches only, but at least one."""
    images = min(train.epochs * num_images, _MAX_IMAGES)
    if train.max_images is not None:
        images = min(images, train.max_images)
    steps = max(1, math.floor(images / global_batch_size + 1e-9))
    return steps if train.max_steps is None else min(steps, train.max_steps)


def limiting_key(train: TrainConfig, num_images: int, global_batch_size: int) -> str:
    """Return the key of the section `train` that decides the number of steps: epochs, max_images or max_steps."""
    steps = total_steps(train, num_images, global_batch_size)
    for key in ("max_steps", "max_images"):
        if getattr(train, key) is not None:
            others = total_steps(train.model_copy(update={key: None}), num_images, global_batch_size)
            if others > steps:
                return key
    return "epochs"


@dataclass(frozen=True)
class Phase:
    """Consecutive steps on images of one size (train.image_sizes). `start` steps are done before it, `end` after it."""

    image_size: tuple[int, int]  # height, width
    start: int
    end: int


def phases(train: TrainConfig, image_size: tuple[int, int], num_steps: int) -> list[Phase]:
    """Return the phases of a run of `num_steps`, at least one; those without a step are left out.

    `image_size`: the model's, of all steps without train.image_sizes.
    """
    sizes = train.image_sizes or ((image_size, 1.0),)
    ends = [round(share * num_steps) for _, share in sizes]
    found = [Phase(size, start, end) for (size, _), start, end in zip(sizes, [0, *ends[:-1]], ends, strict=True)]
    return [phase for phase in found if phase.end > phase.start]


def warmup_steps(schedule: ScheduleConfig, num_images: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps of the warmup."""
    if schedule.warmup_epochs is None:
        return schedule.warmup_steps
    return round(min(schedule.warmup_epochs * num_images, _MAX_IMAGES) / global_batch_size)
