"""The order of the passes over a compiled program, and when each applies."""

from __future__ import annotations

from typing import Any

import pytest

from vit_static.config.schema import KernelsConfig
from vit_static.program.grad_buckets import GradSyncConfig
from vit_static.program.pass_list import PASSES, Pass, PassContext, run_passes

NO_KERNELS = KernelsConfig(onednn=False, fused_linear=False, fused_dropout=False)


def context(**changed: Any) -> PassContext:
    """A training program of one GPU without any option."""
    fields: dict[str, Any] = {
        "is_training": True,
        "device": "gpu",
        "world_size": 1,
        "dp_ranks": (0,),
        "sharding_stage": 0,
        "grad_sync": GradSyncConfig(bucket_bytes=0, overlap=False),
        "kernels": NO_KERNELS,
    }
    return PassContext(**{**fields, **changed})


def test_every_pass_runs_after_those_that_it_needs() -> None:
    names = [step.name for step in PASSES]
    assert len(set(names)) == len(names)
    for position, step in enumerate(PASSES):
        for earlier, reason in step.after.items():
            assert earlier in names[:position], f"{step.name} must run after {earlier}: {reason}"
            assert reason


@pytest.mark.parametrize(
    ("changed", "added"),
    [
        ({}, []),
        ({"sharding_stage": 2}, []),
        ({"sharding_stage": 3}, ["re-gather parameters"]),
        ({"grad_sync": GradSyncConfig(1000, overlap=False)}, ["bucket gradients"]),
        ({"grad_sync": GradSyncConfig(1000, overlap=False), "is_training": False}, []),
        ({"count_costs": lambda program: None}, ["count costs"]),
        ({"count_costs": lambda program: None, "is_training": False}, []),
        ({"world_size": 2}, []),
        ({"world_size": 2, "dp_ranks": (0, 1)}, ["dtype of gradient sums", "early master gradients"]),
        ({"world_size": 2, "dp_ranks": (0, 1), "is_training": False}, []),
        ({"world_size": 2, "device": "cpu"}, ["gloo collectives", "gradients of frozen norms"]),
        (
            {"kernels": KernelsConfig(), "device": "cpu"},
            ["oneDNN kernels", "fused update", "gradients of frozen norms"],
        ),
        ({"kernels": KernelsConfig(), "device": "cpu", "is_training": False}, ["oneDNN kernels"]),
        ({"kernels": KernelsConfig()}, ["fused linear layers", "fused dropout"]),
        ({"kernels": KernelsConfig(fused_linear=False)}, ["fused dropout"]),
    ],
)
def test_which_passes_apply(changed: dict[str, Any], added: list[str]) -> None:
    applied = [step.name for step in PASSES if step.applies(context(**changed))]
    is_distributed = changed.get("world_size", 1) > 1
    assert applied == [*(["remove aliases"] if is_distributed else []), "seed dropouts", *added]


def test_passes_run_in_order_where_they_apply() -> None:
    ran: list[tuple[str, str]] = []

    def recorder(name: str, applies: bool) -> Pass:
        return Pass(name, lambda program, _: ran.append((name, program)), applies=lambda _: applies)

    run_passes("program", context(), [recorder("first", True), recorder("second", False), recorder("third", True)])
    assert ran == [("first", "program"), ("third", "program")]
