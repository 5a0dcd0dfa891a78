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
