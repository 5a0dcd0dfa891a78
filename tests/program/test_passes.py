"""What is done to compiled programs for cards, seen in programs that a CPU build can compile but not run."""

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

from vit_static.config.schema import (
    AmpConfig,
    Config,
    DataConfig,
    KernelsConfig,
    ParallelConfig,
)
from vit_static.model.vit import VisionTransformer, attention_by_matmul
from vit_static.parallel.mesh import MeshShape, make_mesh
from vit_static.plan.fake_world import fake_world
from vit_static.program import grad_buckets, passes
from vit_static.program.grad_buckets import STREAM, GradSyncConfig
from vit_static.program.ir import BACKWARD, UPDATE
from vit_static.program.precision import Precision
from vit_static.program.program import Program

CONFIG = SMALL.model_copy(update={"layer_scale_init": None, "representation_size": None})
DEPTH = 2
PADDLES = KernelsConfig(onednn=False)


def counted(program) -> Counter[str]:
    return Counter(op.name().removeprefix("pd_op.") for op in program.global_block().ops)


def in_bfloat16(make_program, config=CONFIG):
    """A program whose linear layers are in bfloat16 throughout, as O2's are on a card."""
    paddle.seed(3)
    program = make_program(
        VisionTransformer(config, attention_by_matmul),
        8,
        precision=Precision("O1", "bfloat16"),
        amp=AmpConfig(white_list=("elementwise_add",)),
        kernels=PADDLES,
    )
    return program.compiled("train")


@pytest.mark.needs_bfloat16
def test_linear_layers_become_products_with_a_bias(make_program) -> None:
    compiled = in_bfloat16(make_program)
    before = counted(compiled)
    with paddle.pir_utils.IrGuard():  # as it is open while programs are built
        passes.fuse_linears(compiled, fuse_gelu=False)
    after, num_linears = counted(compiled), 6 * DEPTH + 2
    assert before["matmul"] - after["matmul"] == after["fused_gemm_epilogue"] == num_linears
    assert before["matmul_grad"] - after["matmul_grad"] == after["fused_gemm_epilogue_grad"] == num_linears
    assert after["gelu"] == after["gelu_grad"] == DEPTH
    assert after["assign"] == before["assign"]
    roles = {op.op_role for op in compiled.global_block().ops if "fused_gemm" in op.name()}
    assert roles == {passes.FORWARD, BACKWARD}


@pytest.mark.needs_bfloat16
def test_the_activation_is_fused_on_demand(make_program) -> None:
    compiled = in_bfloat16(make_program)
    passes.fuse_linears(compiled, fuse_gelu=True)
    activations = [
        op.attrs()["activation"] for op in compiled.global_block().ops if op.name() == "pd_op.fused_gemm_epilogue"
    ]
    assert Counter(activations)["gelu"] == DEPTH


def test_dropout_and_residual_become_one_operator(make_program) -> None:
    paddle.seed(3)
    program = make_program(
        VisionTransformer(CONFIG.model_copy(update={"dropout": 0.1}), attention_by_matmul), 8, kernels=PADDLES
    )
    compiled = program.compiled("train")
    before = counted(compiled)
    passes.fuse_dropouts(compiled)
    after = counted(compiled)
    assert before["dropout"] - after["dropout"] == after["fused_dropout_add"] == 2 * DEPTH
    assert after["fused_dropout_add_grad"] == 2 * DEPTH


@dataclass(frozen=True)
class Operator:
    """What is remembered of one, whose program doesn't outlive its making."""

    name: str
    role: int
    stream: str
    dtype: Any = None
    shape: tuple[int, ...] = ()


def remembered(program) -> list[Operator]:
    found = []
    for op in program.global_block().ops:
        name = op.name().removeprefix("pd_op.")
        if name in ("all_reduce", "reduce_scatter", "all_gather"):
            given = op.operand_source(0)
            stream = op.attrs().get("execution_stream", "")
            found.append(Operator(name, op.op_role, stream, given.dtype, tuple(given.shape)))
        else:
            found.append(Operator(name, op.op_role, ""))
    return found


def exchanged(exchange: GradSyncConfig, parallel: ParallelConfig) -> tuple[Counter[str], list[Operator]]:
    """Of the program of rank 0 of two ranks that aren't there: its update's exchanges, how many of each, as Paddle
    leaves them, and all its operators after those are put together."""
    found: list[Any] = []
    fuse = grad_buckets.bucket_gradients

    def recorded(program, own: GradSyncConfig) -> None:
        found.append(Counter(op.name for op in remembered(program) if op.dtype is not None and op.role == UPDATE))
        fuse(program, exchange)
        found.append(remembered(program))

    with fake_world(0, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_buckets, "bucket_gradients", recorded)
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
    return found[0], found[1]


def places(operations: list[Operator], name: str) -> list[int]:
    return [n for n, op in enumerate(operations) if op.name == name and op.role == UPDATE]


def last_of_backward(operations: list[Operator]) -> int:
    return max(n for n, op in enumerate(operations) if op.role == BACKWARD)


NUM_EXCHANGED = 16 * DEPTH + 6  # at least; that of a parameter or two is part of another operator


def test_gradients_are_summed_in_buckets_while_the_backward_runs() -> None:
    before, after = exchanged(GradSyncConfig(20_000, overlap=True), ParallelConfig(dp=2))
    assert before["all_reduce"] >= NUM_EXCHANGED
    sums = places(after, "all_reduce")
    assert len(sums) < 8
    early = [n for n in sums if n < last_of_backward(after)]
    assert len(early) >= 2  # all but the last bucket, whose gradients are the backward's last
    assert all(after[n].stream == STREAM for n in early)


def test_without_overlap_they_are_summed_after_the_backward() -> None:
    _, after = exchanged(GradSyncConfig(20_000, overlap=False), ParallelConfig(dp=2))
    assert all(n > last_of_backward(after) for n in places(after, "all_reduce"))


def test_accumulated_gradients_are_summed_after_the_last_micro_batch() -> None:
    before, after = exchanged(GradSyncConfig(20_000, overlap=True), ParallelConfig(dp=2, grad_accum_steps=2))
    sums = places(after, "all_reduce")
    assert before["all_reduce"] >= NUM_EXCHANGED
    assert len(sums) < 8 and all(n > last_of_backward(after) for n in sums)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_scatters_and_gathers_in_buckets(stage: int) -> None:
    before, after = exchanged(GradSyncConfig(10**6, overlap=True), ParallelConfig(dp=2, sharding_stage=stage))
    assert before["all_gather"] >= NUM_EXCHANGED and len(places(after, "all_gather")) <= 2
    if stage == 2:
        assert before["reduce_scatter"] >= NUM_EXCHANGED and len(places(after, "reduce_scatter")) <= 3


def test_gradients_travel_in_the_dtype_that_is_asked_for_and_norms_in_float32() -> None:
    exchange = GradSyncConfig(10**6, overlap=True, dtype="float16")
    _, after = exchanged(exchange, ParallelConfig(dp=2, sharding_stage=2))
    sums = [op for op in after if op.name in ("all_reduce", "reduce_scatter") and op.role == UPDATE]
    assert {op.dtype for op in sums} == {paddle.float16, paddle.float32}
    (precise,) = [op for op in sums if op.dtype == paddle.float32]
    assert precise.name == "all_reduce" and math.prod(precise.shape) <= (CONFIG.depth or 0) + 6  # one a layer


def test_a_cards_linear_layers_are_products_and_sums() -> None:
    """Those of a CUDA build, which has one operator for both, for whose gradient the engine has no rule."""
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
