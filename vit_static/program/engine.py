"""Where the program reaches behind Paddle's public interface: each with the version and the reason.

Written for Paddle 3.3.1; the one place, with cpu_collectives.py, to look at when Paddle changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed import collective
from paddle.distributed.auto_parallel.static import engine as engine_module
from paddle.distributed.auto_parallel.static import process_group
from paddle.distributed.auto_parallel.static.dist_input_spec import DistributedInputSpec
from paddle.distributed.passes import auto_parallel_gradient_merge as gradient_merge


def input_spec(name: str, shape: list[int], dtype: Any, mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """What the engine must know of an input: its global shape, and over which axes of the mesh it is split."""
    local_shape = list(shape)
    for size, placement in zip(mesh.shape, placements, strict=True):
        if placement.is_shard():
            local_shape[placement.get_dim()] //= size
    return DistributedInputSpec(shape, dtype, name, True, mesh, placements, local_shape)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Inside, programs are built as this rank of a world that isn't there: nothing is connected, nothing can be run."""
    endpoints = [f"127.0.0.1:{6170 + other}" for other in range(world_size)]
    pretended = {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(world_size),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
    }
    before = {name: os.environ.get(name) for name in pretended}
    instantiate, initialize = process_group.ProcessGroup.instantiate, engine_module.Engine._initialize
    try:
        os.environ.update(pretended)
        collective._global_env, dist.parallel._global_parallel_env = None, None
        process_group.ProcessGroup.instantiate = lambda self: None
        engine_module.Engine._initialize = lambda self, mode, init_parameters=True: None
        yield
    finally:
        process_group.ProcessGroup.instantiate = instantiate
        engine_module.Engine._initialize = initialize
        process_group.clear_all_process_groups()
        collective._global_env, dist.parallel._global_parallel_env = None, None
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def set_input_specs(program: dist.DistModel, inputs: list[Any], labels: list[Any]) -> None:
    """For the mode built next. `dist.to_static` takes one pair of them for all modes; evaluation has its own."""
    program._engine._inputs_spec = inputs
    program._engine._labels_spec = labels
    program._feed_name_list = {}


def build_mode(program: dist.DistModel, mode: str, change: Callable[[Any], None]) -> tuple[Any, Any]:
    """Builds the program of `mode`, train or eval; what `use` needs to run it.

    `change` gets the program as the engine has cut it for this rank, before it is split into jobs.

    The engine has one executor and one schedule of micro-batches for all modes, and gives parameters and an executor
    only to the mode 'train'. Here each mode has its own, and evaluation none of the schedule: one batch goes through
    all stages of a pipeline at once.
    """
    engine = program._engine
    engine._executor, engine._job_plan = None, None
    if mode == "train":
        with _changing(change):
            program.train()
    else:
        pipeline, engine._strategy.pipeline.enable = engine._strategy.pipeline.enable, False
        with _changing(change):
            program.eval()
        engine._strategy.pipeline.enable = pipeline
        paddle.enable_static()
        if not engine._has_prepared["train"]:
            engine.program_helper.init_pir(engine._pir_dist_main_progs["eval"], engine._place)
        engine._executor = paddle.static.Executor(engine._place)
        paddle.disable_static()
    return engine._executor, engine._job_plan


@contextmanager
def _changing(change: Callable[[Any], None]) -> Iterator[None]:
    """Inside, `change` sees every program after the first of the engine's passes over it: the one that removes what
    groups of one rank would exchange."""
    cleaned = engine_module.remove_unuseful_comm_op_pass
    changed: list[Any] = []  # the engine calls that pass on a program twice

    def clean_and_change(program: Any) -> None:
        cleaned(program)
        if not any(program is other for other in changed):
            changed.append(program)
            change(program)

    average = gradient_merge._pir_append_scale_op
    engine_module.remove_unuseful_comm_op_pass = clean_and_change
    gradient_merge._pir_append_scale_op = lambda *_: None  # ShardedState.average_over
    try:
        yield
    finally:
        engine_module.remove_unuseful_comm_op_pass = cleaned
        gradient_merge._pir_append_scale_op = average


def use_mode(program: dist.DistModel, mode: str, built: tuple[Any, Any]) -> None:
    """Makes a mode that was built the current one."""
    engine = program._engine
    engine._executor, engine._job_plan = built
    if mode == "train":
        program.train()
    else:
        program.eval()


def mark_recompute(layer: nn.Layer, segment: int) -> None:
    """Has a layer's forward computed again in the backward, in place of keeping what it computed.

    Marks its operators, as they are traced, for Paddle's pass. Segments must have different numbers.
    """
    operations_before: list[int] = []

    def before(layer: Any, inputs: Any) -> None:
        operations_before.append(len(paddle.static.default_main_program().global_block().ops))

    def after(layer: Any, inputs: Any, output: Any) -> None:
        operations = paddle.static.default_main_program().global_block().ops
        for index in range(operations_before.pop(), len(operations)):
            operations[index].set_int_attr("fwd_recompute_id", segment)

    layer.register_forward_pre_hook(before)
    layer.register_forward_post_hook(after)


def compiled_program(program: dist.DistModel) -> Any:
    """The current mode's program as this rank executes it: local shapes, collectives as operators."""
    return program._engine._pir_dense_main_progs[program._engine._mode]


def structured_names(program: dist.DistModel) -> dict[str, str]:
    """From the layers' parameter names to the model's own: `linear_3.w_0` to `blocks.0.attn.q.weight`."""
    return dict(program._parameter_to_structured_name)
