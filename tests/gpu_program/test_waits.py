"""No operator of a GPU's training program copies to the host, which would wait for the device in every step."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_program.build import MODEL, GpuCase, compile_rank

# By their CUDA kernels in Paddle 3.3.1, these read a result on the host: copies, fetches, control flow, and operators
# whose results have as many elements as the data says.
READ_ON_HOST = {
    *("memcpy", "memcpy_d2h", "memcpy_d2h_multi_io", "fetch", "print", "if", "while", "assert"),
    *("nonzero", "masked_select", "unique", "unique_consecutive", "where_index", "bincount", "repeat_interleave"),
}
CASES = [
    GpuCase("single", "O2 float16", has_ema=True),
    GpuCase("single", "O2 bfloat16", dropout=0.1),
    GpuCase("ZeRO 2", "O2 float16", "lamb", num_micro_batches=2),
    GpuCase("pp 2 x mp 2 x dp 2", "O2 float16"),
    GpuCase("ZeRO 3", "O2 bfloat16", "adafactor", recompute="block"),
]


def num_seeded_dropouts(operators: list[Any]) -> int:
    """Count the dropouts with a seed, which their kernels read on the host."""
    seed_operands = {"pd_op.dropout": 1, "pd_op.fused_dropout_add": 2}
    dropouts = [operation for operation in operators if operation.name() in seed_operands]
    return sum(operation.operand_source(seed_operands[operation.name()]).initialized() for operation in dropouts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_operator_reads_a_result_on_the_host(case: GpuCase) -> None:
    compiled = compile_rank(case, modes=("train",))  # operators don't outlive it
    operators = compiled.modes["train"].global_block().ops
    assert {operation.name().removeprefix("pd_op.") for operation in operators} & READ_ON_HOST == set()
    for operation in operators:
        if operation.name() == "pd_op.adamw_":  # with `skip_update` its kernel reads that on the host
            assert not operation.operand_source(9).initialized()
    assert num_seeded_dropouts(operators) == 0


@pytest.mark.parametrize(
    ("case", "is_seeded"),
    [
        (GpuCase("dp 8", dropout=0.1), False),
        (GpuCase(recompute="block", dropout=0.1), True),
        (GpuCase("dp 4 x mp 2", dropout=0.1), True),
    ],
    ids=str,
)
def test_dropout_has_seeds_only_with_tensor_parallelism_or_recomputation(case: GpuCase, is_seeded: bool) -> None:
    """The exception that configs/GPU.md names."""
    compiled = compile_rank(case, modes=("train",))
    assert (num_seeded_dropouts(compiled.modes["train"].global_block().ops) > 0) == is_seeded


@pytest.mark.parametrize("num_classes", [5, 8])
def test_a_head_is_fused_if_its_rows_start_at_multiples_of_16_bytes(num_classes: int) -> None:
    case = GpuCase("single", "O2 float16", model=MODEL.model_copy(update={"num_classes": num_classes}))
    compiled = compile_rank(case, modes=("train",))
    names = [operation.name() for operation in compiled.modes["train"].global_block().ops]
    num_others = 6 * MODEL.depth + 2  # patch embedding and the layer before the head
    is_fused = num_classes % 8 == 0
    for fused, plain in (("fused_gemm_epilogue", "matmul"), ("fused_gemm_epilogue_grad", "matmul_grad")):
        assert names.count(f"pd_op.{fused}") == num_others + is_fused
        assert names.count(f"pd_op.{plain}") == 1 - is_fused
