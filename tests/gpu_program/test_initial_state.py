"""State that a GPU's program starts from. Nothing but Paddle's initialization is executed, on the CPU."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from gpu_program.build import GpuCase, build_program
from gpu_program.gpu_wheel import gpu_wheel
from vit_static.model.vit import VisionTransformer


@pytest.mark.parametrize("precision", ["O2 bfloat16", "O2 float16"])
def test_master_weights_start_from_the_weights_before_rounding(precision: str) -> None:
    case = GpuCase(precision=precision)
    paddle.seed(case.config().seed)
    expected = {name: value.numpy() for name, value in VisionTransformer(case.config().model).named_parameters()}
    with gpu_wheel():
        program = build_program(case, rank=0)
        program.compiled("train")
        state = {name: np.array(value._local_value()) for name, value in program.state().items() if "@" not in name}
    assert set(state) == set(expected)
    for name, value in state.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
