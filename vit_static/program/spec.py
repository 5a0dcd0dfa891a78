"""Settings that a program is compiled from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vit_static.config.distill_schema import DistillConfig
from vit_static.config.optim_schema import OptimConfig
from vit_static.config.schema import AmpConfig, KernelsConfig, ParallelConfig
from vit_static.program.precision import Precision

# From the training program of this rank, with the collectives as Paddle's own operators, and the names of its
# parameters, to whatever `Program.costs` is to return.
CountCosts = Callable[[Any, Iterable[str]], Any]


@dataclass(frozen=True)
class TrainingSpec:
    """Settings of the training step."""

    optim: OptimConfig
    learning_rate: Callable[[int], float]  # from the number of completed updates to the rate of the next
    batch_size: int  # global, per optimizer step
    target_classes: int | None = None  # None: labels [B]; K: targets [B, K] (model/loss.py)
    freeze: str = "none"  # train.freeze
    saves_frozen: bool = True  # false: checkpoints have only what is trained
    warmup_steps: int = 0  # of `learning_rate`
    # Height and width of the first step's images, and whether later ones may have other sizes
    image_size: tuple[int, int] | None = None  # None: ProgramSpec's
    image_size_varies: bool = False
    count_costs: CountCosts | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass(frozen=True)
class ProgramSpec:
    """Settings of a program. Without `training` it only evaluates."""

    precision: Precision
    image_size: tuple[int, int]  # height, width; in evaluation
    eval_batch_size: int  # global
    eval_target_classes: int | None = None
    num_channels: int = 3
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    seed: int = 0
    training: TrainingSpec | None = None
