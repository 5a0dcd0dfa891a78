"""Properties of the programs that GPUs execute, compiled without a GPU, over meshes, precisions and settings."""

from __future__ import annotations

from itertools import combinations

import pytest

from gpu_program.build import (
    OPTIONS,
    Compiled,
    GpuCase,
    compile_eval_only,
    compile_rank,
    covering_cases,
    expected_of,
)
from vit_static.program.verify import violations

pytestmark = pytest.mark.early


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
        assert problems_of(compile_rank(case, rank)) == {"train": [], "eval": []}


@pytest.mark.parametrize("precision", OPTIONS["precision"])
def test_the_program_of_the_verb_eval_has_all_properties(precision: str) -> None:
    assert problems_of(compile_eval_only(GpuCase(mesh="dp 8", precision=precision))) == {"eval": []}


@pytest.mark.parametrize(
    ("precision", "num_products"), [("O2 bfloat16", 15), ("O2 float16", 15), ("O1 bfloat16", 15), ("O0 float32", 0)]
)
def test_linear_layers_are_fused(precision: str, num_products: int) -> None:
    """6 per block, the patch embedding, the tanh layer and the head, in training and evaluation."""
    compiled = compile_rank(GpuCase(precision=precision))
    for mode in ("train", "eval"):
        names = [op.name() for op in compiled.modes[mode].global_block().ops]
        assert names.count("pd_op.fused_gemm_epilogue") == num_products, mode
    names = [op.name() for op in compiled.modes["train"].global_block().ops]
    assert names.count("pd_op.fused_gemm_epilogue_grad") == num_products
