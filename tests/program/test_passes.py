"""Passes for GPUs, on programs that a CPU build can compile but not run."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import paddle
import pytest
from helpers.small import SMALL

from vit_static.config.data_schema import DataConfig
from vit_static.config.schema import AmpConfig, Config, KernelsConfig, ParallelConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import MeshShape, make_mesh
from vit_static.plan.fake_world import fake_world
from vit_static.program import grad_buckets, passes
from vit_static.program.grad_buckets import STREAM, GradSyncConfig
from vit_static.program.ir import BACKWARD, FORWARD, UPDATE
from vit_static.program.precision import Precision
from vit_static.program.program import Program

CONFIG = SMALL.model_copy(update={"layer_scale_init": None, "representation_size": None})
DEPTH = 2
PADDLE_KERNELS = KernelsConfig(onednn=False)


def count_operators(program) -> Counter[str]:
    return Counter(op.name().removeprefix("pd_op.") for op in program.global_block().ops)


def compile_bfloat16(make_program, config=CONFIG):
    """Return a training program whose linear layers are entirely in bfloat16, as in O2 on a GPU."""
    paddle.seed(3)
    program = make_program(
        VisionTransformer(config, attention_by_matmul),
        8,
        precision=Precision("O1", "bfloat16"),
        amp=AmpConfig(white_list=("elementwise_add",)),
        kernels=PADDLE_KERNELS,
    )
    return program.compiled("train")


@pytest.mark.needs_bfloat16
def test_linear_layers_are_fused_with_their_bias(make_program) -> None:
    compiled = compile_bfloat16(make_program)
    before = count_operators(compiled)
    with paddle.pir_utils.IrGuard():  # as in the engine while it builds programs
        passes.fuse_linears(compiled, fuse_gelu=False)
    after, num_linears = count_operators(compiled), 6 * DEPTH + 1  # the head's 5 classes aren't a multiple of 8
    assert before["matmul"] - after["matmul"] == after["fused_gemm_epilogue"] == num_linears
    assert before["matmul_grad"] - after["matmul_grad"] == after["fused_gemm_epilogue_grad"] == num_linears
    assert after["gelu"] == after["gelu_grad"] == DEPTH
    assert after["assign"] == before["assign"]
    roles = {op.op_role for op in compiled.global_block().ops if "fused_gemm" in op.name()}
    assert roles == {FORWARD, BACKWARD}


@pytest.mark.needs_bfloat16
def test_the_activation_is_fused_on_request(make_program) -> None:
    compiled = compile_bfloat16(make_program)
    passes.fuse_linears(compiled, fuse_gelu=True)
    activations = [
        op.attrs()["activation"] for op in compiled.global_block().ops if op.name() == "pd_op.fused_gemm_epilogue"
    ]
    assert Counter(activations)["gelu"] == DEPTH


def test_dropout_and_residual_are_fused(make_program) -> None:
    paddle.seed(3)
    program = make_program(
        VisionTransformer(CONFIG.model_copy(update={"dropout": 0.1}), attention_by_matmul), 8, kernels=PADDLE_KERNELS
    )
    compiled = program.compiled("train")
    before = count_operators(compiled)
    passes.fuse_dropouts(compiled)
    after = count_operators(compiled)
    assert before["dropout"] - after["dropout"] == after["fused_dropout_add"] == 2 * DEPTH
    assert after["fused_dropout_add_grad"] == 2 * DEPTH


@dataclass(frozen=True)
class Operator:
    """A copy of an operator's properties, which outlives the program."""

    name: str
    role: int
    stream: str
    dtype: Any = None
    shape: tuple[int, ...] = ()


def copy_operators(program) -> list[Operator]:
    operators = []
    for op in program.global_block().ops:
        name = op.name().removeprefix("pd_op.")
        if name in ("all_reduce", "reduce_scatter", "all_gather"):
            operand = op.operand_source(0)
            stream = op.attrs().get("execution_stream", "")
            operators.append(Operator(name, op.op_role, stream, operand.dtype, tuple(operand.shape)))
        else:
            operators.append(Operator(name, op.op_role, ""))
    return operators


def compile_buckets(sync: GradSyncConfig, parallel: ParallelConfig) -> tuple[Counter[str], list[Operator]]:
    """Compile the program of rank 0 in a fake world of two ranks.

    Returns the number of each collective in the update before bucketing, and all operators after it.
    """
    before: Counter[str] = Counter()
    after: list[Operator] = []
    bucket_gradients = grad_buckets.bucket_gradients

    def record(program, _: GradSyncConfig) -> None:
        before.update(op.name for op in copy_operators(program) if op.dtype is not None and op.role == UPDATE)
        bucket_gradients(program, sync)
        after.extend(copy_operators(program))

    with fake_world(0, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_buckets, "bucket_gradients", record)
        mesh = make_mesh(0, MeshShape(dp=2, mp=1, pp=1), "gpu")
        with paddle.LazyGuard():
            model = VisionTransformer(CONFIG, attention_by_matmul)
        program = Program.for_training(
            Config(
                name="buckets",
                model=CONFIG,
                data=DataConfig(global_batch_size=8),
                parallel=parallel,
                kernels=KernelsConfig(fused_linear=False, fused_dropout=False),
            ),
            model,
            mesh,
            Precision("O0", "float32"),
            learning_rate=lambda step: 1e-3,
            eval_batch_size=8,
        )
        program.compiled("train")
    return before, after


def positions(operators: list[Operator], name: str) -> list[int]:
    """Return the positions of the update's collectives of a kind."""
    return [position for position, op in enumerate(operators) if op.name == name and op.role == UPDATE]


def end_of_backward(operators: list[Operator]) -> int:
    return max(position for position, op in enumerate(operators) if op.role == BACKWARD)


MIN_COLLECTIVES = 16 * DEPTH + 6  # one per parameter, except for one or two that are part of another operator


def test_buckets_are_reduced_while_the_backward_runs() -> None:
    before, after = compile_buckets(GradSyncConfig(20_000, overlap=True), ParallelConfig(dp=2))
    assert before["all_reduce"] >= MIN_COLLECTIVES
    reductions = positions(after, "all_reduce")
    assert len(reductions) < 8
    early = [n for n in reductions if n < end_of_backward(after)]
    assert len(early) >= 2  # all but the last bucket, whose gradients are computed last
    assert all(after[n].stream == STREAM for n in early)


def test_without_overlap_buckets_are_reduced_after_the_backward() -> None:
    _, after = compile_buckets(GradSyncConfig(20_000, overlap=False), ParallelConfig(dp=2))
    assert all(n > end_of_backward(after) for n in positions(after, "all_reduce"))


def test_accumulated_gradients_are_reduced_after_the_last_micro_batch() -> None:
    before, after = compile_buckets(GradSyncConfig(20_000, overlap=True), ParallelConfig(dp=2, grad_accum_steps=2))
    reductions = positions(after, "all_reduce")
    assert before["all_reduce"] >= MIN_COLLECTIVES
    assert len(reductions) < 8 and all(n > end_of_backward(after) for n in reductions)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_scatters_and_gathers_in_buckets(stage: int) -> None:
    before, after = compile_buckets(GradSyncConfig(10**6, overlap=True), ParallelConfig(dp=2, sharding_stage=stage))
    assert before["all_gather"] >= MIN_COLLECTIVES and len(positions(after, "all_gather")) <= 2
    if stage == 2:
        assert before["reduce_scatter"] >= MIN_COLLECTIVES and len(positions(after, "reduce_scatter")) <= 3


def test_gradients_are_reduced_in_the_configured_dtype_and_norms_in_float32() -> None:
    sync = GradSyncConfig(10**6, overlap=True, dtype="float16")
    _, after = compile_buckets(sync, ParallelConfig(dp=2, sharding_stage=2))
    reductions = [op for op in after if op.name in ("all_reduce", "reduce_scatter") and op.role == UPDATE]
    assert {op.dtype for op in reductions} == {paddle.float16, paddle.float32}
    (squares,) = [op for op in reductions if op.dtype == paddle.float32]
    assert squares.name == "all_reduce" and math.prod(squares.shape) <= (CONFIG.depth or 0) + 6  # one per layer


def test_linear_layers_on_a_gpu_are_products_and_additions() -> None:
    """By default a CUDA build has one operator for both, and the engine can't shard its gradient."""
    script = """
from vit_static.common.startup import prepare_process
prepare_process(verbose=True)
import paddle
paddle.is_compiled_with_cuda = lambda: True
paddle.enable_static()
program = paddle.static.Program()
with paddle.static.program_guard(program):
    paddle.nn.Linear(8, 8)(paddle.static.data("x", [4, 8], "float32"))
print([op.name() for op in program.global_block().ops])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pd_op.matmul" in done.stdout and "linear_v2" not in done.stdout
