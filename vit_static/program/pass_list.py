"""The passes that run over a compiled program, in order.

Each entry states when it applies and which other passes must have run before it, and why. To add a pass or to move one,
change PASSES; a test compares the order with the constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vit_static.config.schema import KernelsConfig
from vit_static.parallel import gloo
from vit_static.program import grad_buckets, passes, seeded_dropout
from vit_static.program.cpu import lowering, onednn
from vit_static.program.cpu.fuse_update import fuse_update
from vit_static.program.grad_buckets import GradSyncConfig


@dataclass(frozen=True)
class PassContext:
    """Properties of the program being compiled, by which passes apply."""

    is_training: bool
    device: str  # cpu or gpu
    world_size: int
    dp_ranks: tuple[int, ...]  # ranks that hold the same part of the model as this one, this one among them
    sharding_stage: int
    grad_sync: GradSyncConfig
    kernels: KernelsConfig
    count_costs: Callable[[Any], None] | None = None
    record_loss: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Pass:
    """One step over a compiled program, as one rank executes it, before the engine splits it into jobs.

    `after` maps the names of the passes that must run earlier to the reason.
    """

    name: str
    run: Callable[[Any, PassContext], None]
    applies: Callable[[PassContext], bool]
    after: dict[str, str] = field(default_factory=dict)


def _count_costs(program: Any, context: PassContext) -> None:
    assert context.count_costs is not None
    context.count_costs(program)


def _record_loss(program: Any, context: PassContext) -> None:
    assert context.record_loss is not None
    context.record_loss(program)


_BY_NAME = "it recognizes Paddle's collectives by their operator names, which this pass replaces"
_PLAIN = "costs are counted from Paddle's plain operators, which this pass replaces"

PASSES: tuple[Pass, ...] = (
    Pass(
        "remove aliases",
        lambda program, _: passes.remove_aliases(program),
        applies=lambda context: context.world_size > 1,
    ),
    Pass(
        "seed dropouts",
        lambda program, _: seeded_dropout.seed_dropouts(program),
        applies=lambda context: True,
    ),
    Pass(
        "fused linear layers",
        lambda program, context: passes.fuse_linears(program, context.kernels.fused_gelu),
        applies=lambda context: context.device == "gpu" and context.kernels.fused_linear,
    ),
    Pass(
        "re-gather parameters",
        lambda program, _: passes.regather_params_in_backward(program),
        applies=lambda context: context.sharding_stage == 3,
        after={"fused linear layers": "it gathers in front of the first reader, and fused operators come earlier"},
    ),
    Pass(
        "dtype of gradient sums",
        lambda program, context: passes.sum_gradients_in(context.grad_sync.dtype, program, context.dp_ranks),
        applies=lambda context: context.is_training and len(context.dp_ranks) > 1,
    ),
    Pass(
        "early master gradients",
        lambda program, _: passes.cast_master_gradients_early(program),
        applies=lambda context: context.is_training and context.device == "gpu" and len(context.dp_ranks) > 1,
        after={"fused linear layers": "it replaces the operators behind which the casts move"},
    ),
    Pass(
        "bucket gradients",
        lambda program, context: grad_buckets.bucket_gradients(program, context.grad_sync),
        applies=lambda context: context.is_training and context.grad_sync.bucket_bytes > 0,
        after={
            "dtype of gradient sums": "a bucket has one dtype",
            "early master gradients": "an exchange overlaps with the backward pass only if its operand is part of it",
        },
    ),
    Pass(
        "count costs",
        _count_costs,
        applies=lambda context: context.is_training and context.count_costs is not None,
        after={
            "re-gather parameters": "the second gathers are part of the communication and lower the memory peak",
            "bucket gradients": "the collectives that run are those of the buckets",
        },
    ),
    Pass(
        "gloo collectives",
        lambda program, _: gloo.replace_collectives(program),
        applies=lambda context: context.device == "cpu" and context.world_size > 1,
        after={"re-gather parameters": _BY_NAME, "bucket gradients": _BY_NAME, "count costs": _BY_NAME},
    ),
    Pass(
        "oneDNN kernels",
        lambda program, context: lowering.lower(program, context.kernels.measure_products),
        applies=lambda context: context.device == "cpu" and context.kernels.onednn and onednn.is_supported(),
        after={"count costs": _PLAIN},
    ),
    Pass(
        "fused update",
        lambda program, _: fuse_update(program),
        applies=lambda context: (
            context.device == "cpu" and context.is_training and context.kernels.onednn and onednn.is_supported()
        ),
        after={
            "count costs": _PLAIN,
            "bucket gradients": "the gathers of updated parameters are combined behind the last of them",
        },
    ),
    Pass(
        "gradients of frozen norms",
        lambda program, _: passes.complete_norm_gradients(program),
        applies=lambda context: context.device == "cpu" and context.is_training,
        after={"count costs": _PLAIN, "oneDNN kernels": "its own kernel computes all three"},
    ),
    Pass(
        "fused dropout",
        lambda program, _: passes.fuse_dropouts(program),
        applies=lambda context: context.device == "gpu" and context.kernels.fused_dropout,
        after={
            "seed dropouts": "a fused dropout no longer has the attribute that says which seed it gets",
            "count costs": _PLAIN,
        },
    ),
    Pass(
        "record the loss",
        _record_loss,
        applies=lambda context: context.is_training and context.record_loss is not None,
        after={
            "count costs": "costs are those of training itself",
            "oneDNN kernels": "it recognizes patterns of operators, in which the loss has no other reader",
        },
    ),
)


def run_passes(program: Any, context: PassContext, pass_list: Sequence[Pass] = PASSES) -> None:
    """Run those passes over a program that apply to it, in their order. Changes the program."""
    for step in pass_list:
        if step.applies(context):
            step.run(program, context)
