"""Every check of a compiled program finds a program that is broken in that way, and names what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import paddle
import pytest
from paddle import pir

from gpu_program.build import Compiled, GpuCase, compile_rank, expected_of
from gpu_program.gpu_wheel import gpu_wheel
from vit_static.optim.grad_clip import CLIPPED_GRADIENT
from vit_static.program.grad_buckets import STREAM
from vit_static.program.ir import BACKWARD, UPDATE, insert_before, operator_role
from vit_static.program.verify import violations

BFLOAT16, FLOAT16 = GpuCase(mesh="dp 8"), GpuCase(mesh="ZeRO 2", precision="O2 float16")
Break = Callable[[Any], None]  # changes a program


def operators(program: Any, name: str) -> list[Any]:
    return [op for op in program.global_block().ops if op.name() == f"pd_op.{name}"]


@cache
def compiled_once(case: GpuCase) -> Compiled:
    return compile_rank(case, modes=("train",))


def copy_of(case: GpuCase) -> Compiled:
    """Return the compiled program of a case, to be changed."""
    compiled = compiled_once(case)
    return replace(compiled, modes={"train": compiled.modes["train"].clone()})


def problems_of(compiled: Compiled, **changed: Any) -> list[str]:
    expected = replace(expected_of(compiled, "train"), **changed)
    return violations(compiled.modes["train"], expected, compiled.rings.__getitem__)


def add_unknown_collective(program: Any) -> None:
    gelu = operators(program, "gelu")[0]
    with insert_before(gelu):
        paddle._C_ops.broadcast(gelu.operand_source(0), 0, 0)


def copy_to_the_host(program: Any) -> None:
    norm = operators(program, "sqrt")[0]
    with insert_before(norm):
        paddle.tensor.creation._memcpy(norm.operand_source(0), paddle.CPUPlace())


def gather_queries(program: Any) -> None:
    attention, ring = operators(program, "flash_attn")[0], operators(program, "all_reduce")[0].attrs()["ring_id"]
    with insert_before(attention):
        attention.operand(0).set_source(paddle._C_ops.all_gather(attention.operand_source(0), ring, 8))


def convert_queries(program: Any) -> None:
    attention = operators(program, "flash_attn")[0]
    with insert_before(attention):
        attention.operand(0).set_source(paddle.cast(attention.operand_source(0), "float32"))


def compute_attention_apart(program: Any) -> None:
    attention = operators(program, "flash_attn")[0]
    with insert_before(attention):
        paddle.nn.functional.softmax(attention.operand_source(0))


def store_a_moment_in_half_precision(program: Any) -> None:
    pir.set_insertion_point(operators(program, "adamw_")[0])
    moment = paddle.static.data("moment1", [4], "bfloat16")
    moment.persistable = True


def skip_an_exchange(program: Any) -> None:
    exchange = operators(program, "all_reduce")[-1]
    exchange.result(0).replace_all_uses_with(exchange.operand_source(0))


def exchange_twice(program: Any) -> None:
    exchange = operators(program, "all_reduce")[0]
    split = next(op for op in exchange.result(0).all_used_ops() if op.name() == "pd_op.split")
    with insert_before(split):
        split.operand(0).set_source(paddle._C_ops.all_reduce(exchange.result(0), exchange.attrs()["ring_id"], 0))


def unscale_again(program: Any) -> None:
    clipped = next(op for op in program.global_block().ops if op.has_attr(CLIPPED_GRADIENT))
    gradients = [clipped.operand_source(0)]
    scale = next(op.result(0) for op in operators(program, "data") if op.attrs()["name"].startswith("loss_scaling"))
    with insert_before(clipped):
        paddle._C_ops.check_finite_and_unscale_(gradients, scale)


def never_unscale(program: Any) -> None:
    clipped = next(op for op in program.global_block().ops if op.has_attr(CLIPPED_GRADIENT))
    with insert_before(clipped):
        clipped.operand(1).set_source(paddle.full([1], 1.0, "float32"))


def unscale_by_the_factor_again(program: Any) -> None:
    clipped = next(op for op in program.global_block().ops if op.has_attr(CLIPPED_GRADIENT))
    scale = next(op.result(0) for op in operators(program, "data") if op.attrs()["name"].startswith("loss_scaling"))
    with insert_before(clipped):
        clipped.operand(1).set_source(clipped.operand_source(1) / scale)


def record_the_scaled_norm(program: Any) -> None:
    norm = next(op for op in operators(program, "sqrt") if len(op.result(0).all_used_ops()) == 1)
    division = norm.result(0).all_used_ops()[0]
    assert division.name() == "pd_op.divide"
    division.result(0).replace_all_uses_with(norm.result(0))
    division.erase()


def forget_a_gradient(program: Any) -> None:
    next(op for op in program.global_block().ops if op.has_attr(CLIPPED_GRADIENT)).erase_attr(CLIPPED_GRADIENT)


def change_a_bucket_in_flight(program: Any) -> None:
    exchange = next(op for op in operators(program, "all_reduce") if op.has_attr("execution_stream"))
    assert exchange.str_attr("execution_stream") == STREAM
    operations = list(program.global_block().ops)
    position = next(i for i, op in enumerate(operations) if op.id() == exchange.id())
    pir.set_insertion_point(operations[position + 1])
    with operator_role(BACKWARD):
        paddle._C_ops.scale_(exchange.operand_source(0), 2.0, 0.0, True)


def unscale_a_bucket_in_flight(program: Any) -> None:
    """Paddle's operator changes each tensor of a vector in place."""
    exchange = next(op for op in operators(program, "reduce_scatter") if op.has_attr("execution_stream"))
    scale = next(op.result(0) for op in operators(program, "data") if op.attrs()["name"].startswith("loss_scaling"))
    operations = list(program.global_block().ops)
    position = next(i for i, op in enumerate(operations) if op.id() == exchange.id())
    pir.set_insertion_point(operations[position + 1])
    other = operators(program, "gelu")[0].result(0)
    paddle._C_ops.check_finite_and_unscale_([paddle.cast(other, "float32"), exchange.operand_source(0)], scale)


@pytest.mark.parametrize(
    ("case", "break_program", "problem"),
    [
        (BFLOAT16, add_unknown_collective, "(broadcast) is a collective that `plan` doesn't count"),
        (BFLOAT16, copy_to_the_host, "(memcpy) copies between device and host"),
        (BFLOAT16, gather_queries, "q of flash_attn is gathered over ranks"),
        (BFLOAT16, convert_queries, "flash_attn reads q in paddle.float32"),
        (BFLOAT16, compute_attention_apart, "1 attention layers compute their weights by a softmax"),
        (BFLOAT16, store_a_moment_in_half_precision, "moment1 is stored in paddle.bfloat16"),
        (BFLOAT16, skip_an_exchange, "its gradient is exchanged 0 times before vit_static_clipped_gradient"),
        (BFLOAT16, exchange_twice, "its gradient is exchanged 2 times before vit_static_squared_gradient"),
        (FLOAT16, unscale_again, "its gradient is unscaled 2 times"),
        (FLOAT16, never_unscale, "its gradient is unscaled 0 times"),
        (FLOAT16, unscale_by_the_factor_again, "its gradient is unscaled 2 times"),
        (FLOAT16, record_the_scaled_norm, "the norm of the gradients is unscaled 0 times"),
        (BFLOAT16, forget_a_gradient, "its gradient is used 0 times as vit_static_clipped_gradient"),
        (FLOAT16, unscale_a_bucket_in_flight, f"which may be running on the stream {STREAM}"),
        (BFLOAT16, change_a_bucket_in_flight, f"which may be running on the stream {STREAM}"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_program_is_found(case: GpuCase, break_program: Break, problem: str) -> None:
    compiled = copy_of(case)
    assert problems_of(compiled) == []
    program = compiled.modes["train"]
    with gpu_wheel(), paddle.static.program_guard(program), operator_role(UPDATE):
        paddle.enable_static()
        break_program(program)
        paddle.disable_static()
    problems = problems_of(compiled)
    assert any(problem in one for one in problems), problems


def test_an_operand_that_is_defined_later_is_found() -> None:
    compiled = copy_of(BFLOAT16)
    program = compiled.modes["train"]
    operations = list(program.global_block().ops)
    position = next(i for i, op in enumerate(operations) if op.name() == "pd_op.gelu")
    gelu, producer = operations[position], operations[position].operand_source(0).get_defining_op()
    gelu.move_before(producer)
    assert [problem for problem in problems_of(compiled) if "(gelu) reads a result of" in problem]
    gelu.move_before(operations[position + 1])  # Paddle aborts when it deletes a program whose order is wrong
    assert problems_of(compiled) == []


def test_another_dtype_of_sums_is_found() -> None:
    problems = problems_of(copy_of(BFLOAT16), reduce_dtype="float16")
    assert all("its gradient is summed over ranks in float32, not float16" in problem for problem in problems)
    assert problems


def test_a_missing_master_copy_is_found() -> None:
    compiled = copy_of(BFLOAT16)
    data = next(
        op for op in operators(compiled.modes["train"], "data") if re.search(r"_fp32_master_\d+$", op.attrs()["name"])
    )
    data.set_str_attr("name", "renamed")
    assert any("has no float32 master copy" in problem for problem in problems_of(compiled))


def test_attention_that_is_not_fused_is_found() -> None:
    compiled = compile_rank(GpuCase(kernels={"flash_attention": False}), modes=("train",))
    assert problems_of(compiled, uses_flash_attention=False) == []
    assert problems_of(compiled, uses_flash_attention=True)[0] == "no flash_attn: attention isn't fused"
