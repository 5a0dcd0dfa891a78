"""Where the program reaches behind Paddle's public interface: each with the version and the reason.

Written for Paddle 3.3.1; the one place, with cpu_collectives.py, to look at when Paddle changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed.auto_parallel.static.dist_input_spec import DistributedInputSpec

_NO_CLIPPING = 1e30


class RecordedGlobalNorm(nn.ClipGradByGlobalNorm):
    """Clipping by the norm of all gradients together, whose norm (before clipping) can be read after a step.

    `clip_norm` None only measures. Paddle computes the norm but keeps it in the program, so the result of its square
    root is copied here into a variable that lives as long as the parameters. (Fetching it would do for a program in
    one piece, but not with accumulated gradients: those that compute the update are then a program of their own.)
    """

    def __init__(self, clip_norm: float | None) -> None:
        super().__init__(_NO_CLIPPING if clip_norm is None else clip_norm)
        self._variable: str | None = None

    def _pir_clip(self, params_grads: Any) -> Any:
        clipped = super()._pir_clip(params_grads)
        operations = paddle.static.default_main_program().global_block().ops
        norm = next(op for op in reversed(operations) if op.name() == "pd_op.sqrt").result(0)
        self._variable = paddle.utils.unique_name.generate("grad_norm")
        kept = paddle.pir.core.create_persistable_value(
            "float32",
            norm.shape,
            self._variable,
            initializer=nn.initializer.Constant(0.0),
            dist_attr=norm.dist_attr(),
        )
        paddle.assign(norm, output=kept)
        return clipped

    def norm(self) -> float:
        """The last step's. Waits for the device."""
        tensor = paddle.static.global_scope().find_var(self._variable).get_tensor()
        return float(np.asarray(tensor).item())


def input_spec(name: str, shape: list[int], dtype: str, mesh: dist.ProcessMesh, split: list[Any]) -> Any:
    """What the engine must know of an input: its global shape, and over which axes of the mesh it is split."""
    return DistributedInputSpec.from_dtensor(dist.shard_tensor(paddle.zeros(shape, dtype=dtype), mesh, split), name)


def set_input_specs(program: dist.DistModel, inputs: list[Any], labels: list[Any]) -> None:
    """For the mode built next. `dist.to_static` takes one pair of them for all modes; evaluation has its own."""
    program._engine._inputs_spec = inputs
    program._engine._labels_spec = labels
    program._feed_name_list = {}


def ready_to_evaluate(program: dist.DistModel) -> None:
    """Gives the program its parameters and an executor where it was never built for training.

    The engine does both for the mode 'train' alone.
    """
    engine = program._engine
    if engine._executor is None:
        paddle.enable_static()
        engine.program_helper.init_pir(engine._pir_dist_main_progs["eval"], engine._place)
        engine._executor = paddle.static.Executor(engine._place)
        paddle.disable_static()


def compiled_program(program: dist.DistModel) -> Any:
    """The current mode's program as this rank executes it: local shapes, collectives as operators."""
    return program._engine._pir_dense_main_progs[program._engine._mode]


def structured_names(program: dist.DistModel) -> dict[str, str]:
    """From the layers' parameter names to the model's own: `linear_3.w_0` to `blocks.0.attn.q.weight`."""
    return dict(program._parameter_to_structured_name)


def local_array(tensor: paddle.Tensor) -> np.ndarray:
    """The part of a distributed tensor that this rank holds."""
    return np.asarray(tensor._local_value() if tensor.is_dist() else tensor)
