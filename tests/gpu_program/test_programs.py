"""Properties of the programs that GPUs execute, compiled without a GPU, over meshes, precisions and settings."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import combinations

import paddle
import pytest
from helpers.small import ROOT

from gpu_program.build import (
    IMAGES_PER_RANK,
    MODEL,
    OPTIONS,
    Compiled,
    GpuCase,
    build_program,
    building,
    compile_eval_only,
    compile_rank,
    covering_cases,
    expected_of,
)
from gpu_program.interpreter import decode
from vit_static.config.model_schema import ModelConfig
from vit_static.plan.costs import count_by_kind, program_costs
from vit_static.plan.planner import Cluster, make_plan
from vit_static.program.distillation import TEACHER_PREFIX
from vit_static.program.grad_buckets import STREAM
from vit_static.program.ir import BACKWARD, FORWARD
from vit_static.program.verify import violations

pytestmark = pytest.mark.early

CLUSTER = Cluster("a100-80g", "ib-hdr")


def problems_of(compiled: Compiled) -> dict[str, list[str]]:
    """Return the violations by mode."""
    return {
        mode: violations(program, expected_of(compiled, mode), compiled.rings.__getitem__)
        for mode, program in compiled.modes.items()
    }


def test_every_pair_of_options_occurs() -> None:
    cases = [[getattr(case, name) for name in OPTIONS] for case in covering_cases()]
    for (first, firsts), (second, seconds) in combinations(enumerate(OPTIONS.values()), 2):
        occurring = {(case[first], case[second]) for case in cases}
        assert occurring == {(one, two) for one in firsts for two in seconds}


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_a_program_has_all_properties(case: GpuCase) -> None:
    """Of the first rank, and in a pipeline also of the last."""
    for rank in {0, case.shape.world_size - 1} if case.shape.pp > 1 else {0}:
        compiled = compile_rank(case, rank)
        assert problems_of(compiled) == {"train": [], "eval": []}
        for program in compiled.modes.values():
            decode(program)  # the interpreter knows every operator, and every attribute of it


@pytest.mark.parametrize(
    "case",
    [
        GpuCase(mesh="dp 8", amp={"master_grad": False}),
        GpuCase(mesh="ZeRO 2", precision="O2 float16", amp={"master_grad": False}),
        GpuCase(mesh="dp 8", parallel={"bucket_mb": 0.0}),
        GpuCase(mesh="dp 8", parallel={"overlap_gradients": False}),
        GpuCase(mesh="dp 8", parallel={"reduce_dtype": "bfloat16"}),
        GpuCase(mesh="ZeRO 2", parallel={"reduce_dtype": "bfloat16"}),
        GpuCase(mesh="ZeRO 3", parallel={"reduce_dtype": "float16"}),
        GpuCase(mesh="ZeRO 3", precision="O0 float32", parallel={"reduce_dtype": "bfloat16"}),
        GpuCase(mesh="pp 2 x mp 2 x dp 2", precision="O2 float16", freeze="backbone"),
        GpuCase(mesh="dp 8", kernels={"fused_linear": False, "fused_dropout": False}),
    ],
    ids=lambda case: f"{case} {case.amp or case.parallel or case.kernels}",
)
def test_settings_of_exchanges_and_kernels_keep_all_properties(case: GpuCase) -> None:
    assert problems_of(compile_rank(case, modes=("train",))) == {"train": []}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (GpuCase(mesh="dp 8", distills="soft"), "bfloat16"),
        (GpuCase(mesh="ZeRO 3", precision="O1 bfloat16", distills="token"), "float32"),
        (GpuCase(mesh="pp 2 x mp 2 x dp 2", precision="O2 float16", distills="features"), "float16"),
    ],
    ids=str,
)
def test_a_program_with_a_teacher_has_all_properties(case: GpuCase, dtype: str) -> None:
    """Of the last rank, which computes the loss. The teacher has the precision of the model and no gradients."""
    compiled = compile_rank(case, case.shape.world_size - 1, modes=("train",))
    assert problems_of(compiled) == {"train": []}
    parameters = [op.result(0) for op in compiled.modes["train"].global_block().ops if op.name() == "builtin.parameter"]
    teacher = {value.name: value for value in parameters if value.name.startswith(TEACHER_PREFIX)}
    assert any(name.endswith(".mlp.fc1.weight") for name in teacher)
    for name, value in teacher.items():
        if name.endswith((".weight", ".bias")) and ".norm" not in name:
            assert str(value.dtype) == f"paddle.{dtype}", name
        assert {op.op_role for op in value.all_used_ops()} == {FORWARD}, name


def test_no_pass_reads_an_operator_that_it_has_erased() -> None:
    """It would crash, but seldom: only here does glibc overwrite freed memory at once.

    ZeRO 3 sums gradients in half precision, so that their sums and casts are replaced.
    """
    script = """
from vit_static.common.startup import prepare_process
prepare_process(verbose=True)
from gpu_program.build import GpuCase, compile_rank
compile_rank(GpuCase("ZeRO 3", "O1 bfloat16", "lamb"))
compile_rank(GpuCase("pp 2 x mp 2 x dp 2", "O2 bfloat16"))
"""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "GLIBC_TUNABLES": "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0",
    }
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("precision", OPTIONS["precision"])
def test_the_program_of_the_verb_eval_has_all_properties(precision: str) -> None:
    assert problems_of(compile_eval_only(GpuCase(mesh="dp 8", precision=precision))) == {"eval": []}


@pytest.mark.parametrize(("rope", "shape"), [("axial", [1, 13, 1, 16]), ("mixed", [2, 32])])
def test_rotary_positions_stay_float32_in_o2(rope: str, shape: list[int]) -> None:
    """Their tables, or what they are computed from: a bfloat16 angle of many turns would be off by degrees."""
    model = MODEL.model_copy(update={"rope": rope, "pos_embed": "none"})
    compiled = compile_rank(GpuCase(model=model), modes=("train",))
    operations = compiled.modes["train"].global_block().ops
    parameters = [operation.result(0) for operation in operations if operation.name() == "builtin.parameter"]
    tables = [value.dtype for value in parameters if list(value.shape) == shape]
    assert tables and set(tables) == {paddle.float32}
    assert paddle.bfloat16 in {value.dtype for value in parameters}  # the others


@pytest.mark.parametrize(
    ("precision", "num_products"), [("O2 bfloat16", 8), ("O2 float16", 8), ("O1 bfloat16", 8), ("O0 float32", 0)]
)
def test_linear_layers_are_fused(precision: str, num_products: int) -> None:
    """6 per block, the patch embedding and the tanh layer; not the head, whose 5 classes are no multiple of 8."""
    compiled = compile_rank(GpuCase(precision=precision))
    for mode in ("train", "eval"):
        names = [op.name() for op in compiled.modes[mode].global_block().ops]
        assert names.count("pd_op.fused_gemm_epilogue") == num_products, mode
    names = [op.name() for op in compiled.modes["train"].global_block().ops]
    assert names.count("pd_op.fused_gemm_epilogue_grad") == num_products


@pytest.mark.parametrize("mesh", [mesh for mesh in OPTIONS["mesh"] if mesh != "single"])
def test_the_plan_knows_every_collective(mesh: str) -> None:
    """`plan`, which compiles in float32 on a CPU and whose figures tests/plan compares with closed forms, agrees.

    Except for the gradient of the loss by image, which stays float32, and that with ZeRO 3 fused layers don't gather
    their biases again.
    """
    case = GpuCase(mesh=mesh)
    config, world_size = case.config(), case.shape.world_size
    with building(case.shape, rank=0):
        costs = build_program(case, rank=0, count_costs=program_costs).costs()
    counted = count_by_kind(costs.collectives, 1)
    planned = count_by_kind(make_plan(config, config.parallel, world_size, CLUSTER).costs.collectives, 1)
    assert set(counted) == set(planned)
    for (kind, role, ranks), (num_planned, num_planned_bytes) in planned.items():
        num, num_bytes = counted[kind, role, ranks]
        if (kind, role) != ("all_gather", "backward"):
            assert [num, num_bytes] == [num_planned, num_planned_bytes], (kind, role, ranks)
        elif mesh == "ZeRO 3":
            num_biases = 6 * MODEL.depth + 2
            assert (num, num_bytes) <= (num_planned, num_planned_bytes)
            assert num == num_planned - num_biases
        else:
            assert (num, num_bytes, num_planned_bytes) == (num_planned, 4 * IMAGES_PER_RANK, 2 * IMAGES_PER_RANK)


def test_gradients_are_exchanged_during_the_backward_pass() -> None:
    """At least 90 % of the bytes of the gradients start before the last operator of the backward pass, and half of them
    before the last third of its operators, in a B/16 with half as many blocks."""
    case = GpuCase(mesh="dp 8", model=ModelConfig(variant="B/16", depth=6))
    num_parameters = 86_567_656 - 6 * 7_087_872  # those of a block
    compiled = compile_rank(case, modes=("train",))
    ops = list(compiled.modes["train"].global_block().ops)
    backward = [position for position, op in enumerate(ops) if op.op_role == BACKWARD]
    exchanges = [
        (position, 4 * math.prod(op.operand_source(0).shape))
        for position, op in enumerate(ops)
        if op.name() == "pd_op.all_reduce" and compiled.rings[op.attrs()["ring_id"]] == tuple(range(8))
    ]
    buckets = [op for op in ops if op.has_attr("execution_stream")]
    assert {op.str_attr("execution_stream") for op in buckets} == {STREAM}
    assert len(buckets) == len(exchanges) - 1  # all but the patch embedding's, which Paddle sums by itself
    num_bytes = sum(size for _, size in exchanges)
    assert 4 * num_parameters <= num_bytes < 4 * num_parameters * 1.001  # and squares for the norm
    assert sum(size for position, size in exchanges if position < backward[-1]) >= 0.9 * num_bytes
    two_thirds = backward[len(backward) * 2 // 3]
    assert sum(size for position, size in exchanges if position < two_thirds) >= 0.5 * num_bytes
