"""Where the program reaches behind Paddle's public interface: each with the version and the reason.

Written for Paddle 3.3.1; the one place, with cpu_collectives.py, to look at when Paddle changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle import nn, pir
from paddle.distributed import collective
from paddle.distributed.auto_parallel.placement_type import to_dim_map
from paddle.distributed.auto_parallel.static import engine as engine_module
from paddle.distributed.auto_parallel.static import process_group
from paddle.distributed.auto_parallel.static.dist_input_spec import DistributedInputSpec
from paddle.distributed.passes import auto_parallel_gradient_merge as gradient_merge

_NO_CLIPPING = 1e30


class RecordedGlobalNorm(nn.ClipGradByGlobalNorm):
    """Clipping by the norm of all gradients together, whose norm (before clipping) can be read after a step.

    `clip_norm` None only measures. Paddle computes the norm but keeps it in the program; here it is copied into a
    variable that lives as long as the parameters. (Fetching it would do for a program in one piece, but not with
    accumulated gradients: those that compute the update are then a program of their own.) And Paddle sums each split
    gradient's square over the ranks by itself, a number at a time; here those of one split are added up first.
    """

    def __init__(self, clip_norm: float | None) -> None:
        super().__init__(_NO_CLIPPING if clip_norm is None else clip_norm)
        self._variable: str | None = None

    def _pir_clip(self, params_grads: Any) -> Any:
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        norm = paddle.sqrt(_total([_square(gradient) for _, gradient in params_grads]))
        self._variable = paddle.utils.unique_name.generate("grad_norm")
        kept = paddle.pir.core.create_persistable_value(
            "float32",
            norm.shape,
            self._variable,
            initializer=nn.initializer.Constant(0.0),
            dist_attr=norm.dist_attr(),
        )
        write_to(kept, norm)
        bound = paddle.full([1], self.clip_norm, "float32")
        factor = bound / paddle.maximum(norm, bound)
        return [
            (parameter, gradient * everywhere(factor, gradient.process_mesh).astype(gradient.dtype))
            for parameter, gradient in params_grads
        ]

    def norm(self) -> float:
        """The last step's. Waits for the device."""
        variable = paddle.static.global_scope().find_var(self._variable)
        if variable is None or not variable.get_tensor()._is_initialized():
            return math.nan  # a pipeline's later stages don't compute it
        return float(np.asarray(variable.get_tensor()).item())


def _square(gradient: Any) -> Any:
    """The sum of a gradient's squares, [1], float32; of a split gradient what each rank has of it."""
    return paddle._C_ops.squared_l2_norm(gradient.astype("float32"))


def _total(squares: list[Any]) -> Any:
    """Their sum, on the first stage of a pipeline; each rank's parts are added up before they are exchanged."""
    alike: dict[str, list[Any]] = {}
    for square in squares:
        alike.setdefault(f"{square.process_mesh.process_ids} {square.placements}", []).append(square)
    # `add_n` keeps partial sums partial, where other sums would exchange each of them.
    sums = [paddle.add_n(group) for group in alike.values()]
    first = min((total.process_mesh for total in sums), key=lambda mesh: min(mesh.process_ids))
    whole = [dist.Replicate()] * first.ndim
    return paddle.add_n([everywhere(reshard(total, whole), first) for total in sums])


class ShardedState:
    """For an optimizer to inherit first: what it keeps of each parameter may be split over ranks (ZeRO), and gradients
    may come in micro-batches.

    Paddle's own wrapper, `dist.shard_optimizer`, takes only its AdamW and its SGD without momentum, splits along axes
    that don't divide, which then fails, and in a static program never scatters the gradients.
    """

    _state_placements: Any = None
    _num_micro_batches = 1

    def average_over(self, num_micro_batches: int) -> None:
        """Gradients come as the sum over so many micro-batches.

        The engine's own averaging comes after the clipping, and, where the update is not one operator named sgd or
        adam, puts a scaling of every gradient before every operator of the backward.
        """
        self._num_micro_batches = num_micro_batches

    def shard_state(self, placements_of: Any, scatter_gradients: bool) -> None:
        """`placements_of` a parameter are those of its moments and its master copy.

        With `scatter_gradients` each rank gets the sum of its own part of a gradient alone, else of the whole.
        """
        self._state_placements, self._scatter_gradients = placements_of, scatter_gradients

    def _apply_optimize(self, loss: Any, startup_program: Any, params_grads: Any, param_group_idx: int = 0) -> Any:
        """What the engine calls."""
        summed = self._averages(params_grads)
        return super()._apply_optimize(loss, startup_program, summed, param_group_idx)  # type: ignore[misc]

    def apply_gradients(self, params_grads: Any) -> Any:
        """What mixed precision, O2, calls instead: with gradients that are unscaled, and in float32 if so asked for."""
        return super().apply_gradients(self._averages(params_grads))  # type: ignore[misc]

    def _averages(self, params_grads: Any) -> Any:
        # Without a gradient: variables of the program that aren't trained, such as the seeds of dropout.
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        if self._state_placements is not None:
            params_grads = [(parameter, self._part_of_sum(parameter, gradient)) for parameter, gradient in params_grads]
        if self._num_micro_batches > 1:
            share = 1.0 / self._num_micro_batches
            params_grads = [(parameter, paddle.scale(gradient, share)) for parameter, gradient in params_grads]
        return params_grads

    def _part_of_sum(self, parameter: Any, gradient: Any) -> Any:
        if not self._scatter_gradients:
            gradient = reshard(gradient, parameter.placements)
        return reshard(gradient, self._state_placements(parameter))

    def _create_accumulators(self, block: Any, parameters: Any) -> None:
        super()._create_accumulators(block, parameters)  # type: ignore[misc]
        if self._state_placements is None:
            return
        for parameter in parameters:
            placements = self._state_placements(parameter)
            master = self._master_weights.get(parameter.name)  # type: ignore[attr-defined]
            weight = parameter if master is None else master
            kept = [values[weight.name] for values in self._accumulators.values()]  # type: ignore[attr-defined]
            for value in [*kept, *([] if master is None else [master])]:
                if list(value.shape) == list(parameter.shape):  # not the powers of beta, which are numbers
                    _place_variable(value, parameter.process_mesh, placements)


def _place_variable(value: Any, mesh: dist.ProcessMesh, placements: list[Any]) -> None:
    """Says of a persistable variable, before the program is cut, how it is split."""
    libpir = paddle.base.libpaddle.pir
    dim_map, partial = to_dim_map(placements, len(value.shape))
    attributes = libpir.create_tensor_dist_attribute(mesh, dim_map, partial)
    value.set_type(libpir.cvt_to_dist_type(value.type(), attributes))
    value.get_defining_op().dist_attr = libpir.create_op_dist_attribute(mesh, [], [attributes])


def reshard(value: Any, placements: list[Any]) -> Any:
    """A value of the program, placed otherwise on the same mesh."""
    return value if value.placements == placements else dist.reshard(value, value.process_mesh, placements)


def everywhere(value: Any, mesh: dist.ProcessMesh) -> Any:
    """A value, placed nowhere yet or on all ranks, whole on every rank of a mesh."""
    if not value.is_dist():
        world = dist.auto_parallel.get_mesh()
        value = dist.shard_tensor(value, world, [dist.Replicate()] * world.ndim)
    return value if value.process_mesh == mesh else dist.reshard(value, mesh, [dist.Replicate()] * mesh.ndim)


def write_to(variable: Any, value: Any) -> None:
    """Stores a value in a persistable variable of the program."""
    paddle.assign(value, output=variable)


def input_spec(name: str, shape: list[int], dtype: Any, mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """What the engine must know of an input: its global shape, and over which axes of the mesh it is split."""
    local_shape = list(shape)
    for size, placement in zip(mesh.shape, placements, strict=True):
        if placement.is_shard():
            local_shape[placement.get_dim()] //= size
    return DistributedInputSpec(shape, dtype, name, True, mesh, placements, local_shape)


@contextmanager
def pretended_world(rank: int, world_size: int) -> Iterator[None]:
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


def build(program: dist.DistModel, mode: str, change: Callable[[Any], None]) -> tuple[Any, Any]:
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

    def clean_and_change(program: Any) -> None:
        cleaned(program)
        change(program)

    average = gradient_merge._pir_append_scale_op
    engine_module.remove_unuseful_comm_op_pass = clean_and_change
    gradient_merge._pir_append_scale_op = lambda *_: None  # ShardedState.average_over
    try:
        yield
    finally:
        engine_module.remove_unuseful_comm_op_pass = cleaned
        gradient_merge._pir_append_scale_op = average


def use(program: dist.DistModel, mode: str, built: tuple[Any, Any]) -> None:
    """Makes a mode that was built the current one."""
    engine = program._engine
    engine._executor, engine._job_plan = built
    if mode == "train":
        program.train()
    else:
        program.eval()


def recompute(layer: nn.Layer, segment: int) -> None:
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


def placed_dropout(mesh: dist.ProcessMesh) -> Any:
    """F.dropout(x, p), its masks from the rank's one generator."""

    def dropout(x: Any, p: float, training: bool = True) -> Any:
        return F.dropout(_placed(x, mesh), p, training=True)

    return dropout


def _placed(x: Any, mesh: dist.ProcessMesh) -> Any:
    """A constant, which isn't placed yet, the same on all ranks of a stage."""
    return x if x.is_dist() else dist.shard_tensor(x, mesh, [dist.Replicate()] * mesh.ndim)


class SeededDropout:
    """Dropout whose masks follow the data: the same on ranks that hold the same activations, others on others.

    Each dropout of the program has a seed of its own, an element of a variable that is set before each step; so a
    block that is computed again draws its mask again. Micro-batches count up from it. (Paddle's dropout takes the next
    numbers of the rank's one generator: the halves of a split activation would get the same mask, and a recomputed
    block another than before, without an error.)

    The seeds are put in when the program is cut for this rank: Paddle's rule for how a dropout is split wants none.
    """

    def __init__(self, seed: int, rank: int, meshes: list[dist.ProcessMesh], stages: list[int]) -> None:
        """`meshes` are those of the pipeline's stages, `stages` that of each dropout."""
        self._seed, self._rank, self._meshes, self._stages = seed, rank, meshes, stages
        self._names: dict[int, tuple[str, str]] = {}  # of a stage's variables: the seeds, the micro-batches done
        self._split_axes: list[tuple[str, ...]] = [()] * len(stages)  # over which each dropout's activation is split

    def begin(self) -> None:
        """Called first of all in the forward, outside of all that is computed again."""
        for stage in set(self._stages):
            seeds = _variable("dropout_seeds", [len(self._stages)], "int32", self._meshes[stage])
            done = _variable("dropout_micro_batches", [1], "int32", self._meshes[stage])
            self._names[stage] = (seeds.name, done.name)
            current = seeds + done
            for index, stage_of_dropout in enumerate(self._stages):
                if stage_of_dropout == stage:
                    current[index : index + 1].get_defining_op().set_int_attr(_SEED_OF_DROPOUT, index)
            write_to(done, done + 1)

    def function(self, index: int) -> Any:
        """F.dropout(x, p) for the `index`-th dropout."""

        def dropout(x: Any, p: float, training: bool = True) -> Any:
            mesh = self._meshes[self._stages[index]]
            x = _placed(x, mesh)
            self._split_axes[index] = tuple(
                axis for axis, placement in zip(mesh.dim_names, x.placements, strict=True) if placement.is_shard()
            )
            out = F.dropout(x, p, training=True)
            out.get_defining_op().set_int_attr(_DROPOUT, index)
            return out

        return dropout

    def set_step(self, step: int) -> None:
        """Sets the seeds for the step after `step` done ones: functions of the seed, the step, the dropout, and this
        rank's place along the axes over which the activation is split."""
        coordinates = dict(zip(*self._place(), strict=True))
        scope = paddle.static.global_scope()
        for stage, names in self._names.items():
            if self._rank not in self._meshes[stage].process_ids:
                continue
            seeds = np.array([self._seed_of(index, step, coordinates) for index in range(len(self._stages))], np.int32)
            for name, value in zip(names, (seeds, np.zeros(1, np.int32)), strict=True):
                scope.find_var(name).get_tensor().set(value, paddle.framework._current_expected_place_())

    def _seed_of(self, index: int, step: int, coordinates: dict[str, int]) -> int:
        place = [coordinates[axis] if axis in self._split_axes[index] else 0 for axis in ("dp", "mp")]
        drawn = np.random.SeedSequence([self._seed, step, index, *place]).generate_state(1)
        return int(drawn[0] % 2**30) + 1  # 0 would mean none, and micro-batches are added

    def _place(self) -> tuple[list[str], list[int]]:
        """The axes of a stage's mesh and this rank's place along them."""
        mesh = next(mesh for mesh in self._meshes if self._rank in mesh.process_ids)
        return mesh.dim_names, [int(np.argwhere(mesh.mesh == self._rank)[0][axis]) for axis in range(mesh.ndim)]


_FORWARD, _BACKWARD, _UPDATE = 0, 1, 2  # roles of operators
_GATHERING = {
    *("pd_op.all_gather", "pd_op.concat", "pd_op.split", "pd_op.split_with_num", "pd_op.transpose", "pd_op.reshape"),
    *("pd_op.cast", "pd_op.assign", "pd_op.full", "pd_op.full_int_array", "builtin.split", "builtin.combine"),
}


def gather_again(program: Any) -> None:
    """Has the backward gather split parameters once more, so that between its layers' forward and backward none is
    whole: what ZeRO's third stage is for. Paddle gathers each once and keeps it for the backward.
    """
    operations = list(program.global_block().ops)
    gathering: dict[str, list[Any]] = {}  # by a value's id, the operators that make it of parameters alone, in order
    for operation in operations:
        if operation.op_role != _FORWARD and operation.name() != "builtin.parameter":
            continue
        operands = [operation.operand_source(index) for index in range(operation.num_operands())]
        if operation.name() in _GATHERING and all(operand.id in gathering for operand in operands):
            chain = [op for operand in operands for op in gathering[operand.id]] + [operation]
        elif operation.name() == "builtin.parameter" or (
            operation.name() == "pd_op.data" and operation.result(0).persistable
        ):
            chain = []
        else:
            continue
        gathering.update({value.id: chain for value in operation.results()})
    backward = {operation.id() for operation in operations if operation.op_role == _BACKWARD}
    for operation in operations:
        for value in operation.results():
            chain = gathering.get(value.id, [])
            if not any(op.name() == "pd_op.all_gather" for op in chain):
                continue
            readers = [op for op in value.all_used_ops() if op.id() in backward]
            if readers:
                _clone_before(chain, value, readers, operations)


def _clone_before(chain: list[Any], value: Any, readers: list[Any], operations: list[Any]) -> None:
    """Puts a copy of the operators that make a value before the first of its readers, which read the copy's."""
    numbers = {reader.id() for reader in readers}
    pir.set_insertion_point(next(operation for operation in operations if operation.id() in numbers))
    copies = pir.IrMapping()
    made = {operation.id(): operation for operation in chain}
    for operation in chain:
        for index in range(operation.num_operands()):
            source = operation.operand_source(index)
            if source.get_defining_op().id() not in made:  # the parameter
                copies.add(source, source)
    for operation in made.values():
        copy = operation.clone(copies, pir.CloneOptions(False, True, True))
        copy.op_role = _BACKWARD
    value.replace_grad_users_with(copies.look_up(value), set(readers))


def fuse_all_reduces(program: Any, bucket_bytes: int) -> None:
    """Sums gradients over the ranks together, in buckets of so many bytes, where Paddle sums them one by one."""
    operations = list(program.global_block().ops)
    index_of = {operation.id(): index for index, operation in enumerate(operations)}
    buckets: dict[tuple[Any, ...], list[Any]] = {}  # the open one of each kind
    full = []
    for operation in operations:
        if operation.name() not in ("pd_op.all_reduce", "pd_op.all_reduce_") or operation.op_role != _UPDATE:
            continue
        given, value = operation.attrs(), operation.operand_source(0)
        kind = (given["ring_id"], given["reduce_type"], str(value.dtype))
        bucket = buckets.setdefault(kind, [])
        source = value.get_defining_op()
        # What is summed must be there where the bucket's first is summed.
        too_late = bucket and source is not None and index_of[source.id()] > index_of[bucket[0].id()]
        size = sum(math.prod(op.operand_source(0).shape) for op in bucket) + math.prod(value.shape)
        if too_late or (bucket and size * value.element_size() > bucket_bytes):
            full.append(bucket)
            bucket = buckets[kind] = []
        bucket.append(operation)
    with paddle.static.program_guard(program), _role(_UPDATE):
        for bucket in [*full, *buckets.values()]:
            if len(bucket) > 1:
                _sum_together(bucket)


def _sum_together(all_reduces: list[Any]) -> None:
    given = all_reduces[0].attrs()
    values = [operation.operand_source(0) for operation in all_reduces]
    shapes = [[int(length) for length in value.shape] for value in values]
    pir.set_insertion_point(all_reduces[0])
    flat = paddle.concat([value.reshape([-1]) for value in values])
    total = paddle._C_ops.all_reduce(flat, given["ring_id"], given["reduce_type"])
    parts = paddle.split(total, [math.prod(shape) for shape in shapes])
    parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    for operation, part in zip(all_reduces, parts, strict=True):  # the insertion point goes with the first
        operation.result(0).replace_all_uses_with(part)
        operation.erase()


@contextmanager
def _role(role: int) -> Iterator[None]:
    """Inside, operators that are added get this role."""
    before = pir.get_op_role()
    pir.set_op_role(role)
    try:
        yield
    finally:
        pir.set_op_role(before)


_DROPOUT, _SEED_OF_DROPOUT = "vit_static_dropout", "vit_static_seed_of_dropout"  # attributes of operators


def seed_dropouts(program: Any) -> None:
    """Gives every marked dropout of a program its seed, those that are computed again too."""
    operations = list(program.global_block().ops)
    seeds = {op.attrs()[_SEED_OF_DROPOUT]: op.result(0) for op in operations if op.has_attr(_SEED_OF_DROPOUT)}
    for operation in operations:
        if operation.name() == "pd_op.dropout" and operation.has_attr(_DROPOUT):
            operation.operand(1).set_source(seeds[operation.attrs()[_DROPOUT]])


def _variable(name: str, shape: list[int], dtype: str, mesh: dist.ProcessMesh) -> Any:
    """A variable of the program being traced that outlives a step, whole on every rank of `mesh`; 0 at first."""
    dim_map, partial = to_dim_map([dist.Replicate()] * mesh.ndim, len(shape))
    return paddle.pir.core.create_persistable_value(
        dtype,
        shape,
        paddle.utils.unique_name.generate(name),
        initializer=nn.initializer.Constant(0),
        dist_attr=paddle.base.libpaddle.pir.create_tensor_dist_attribute(mesh, dim_map, partial),
    )


def compiled_program(program: dist.DistModel) -> Any:
    """The current mode's program as this rank executes it: local shapes, collectives as operators."""
    return program._engine._pir_dense_main_progs[program._engine._mode]


def structured_names(program: dist.DistModel) -> dict[str, str]:
    """From the layers' parameter names to the model's own: `linear_3.w_0` to `blocks.0.attn.q.weight`."""
    return dict(program._parameter_to_structured_name)


def local_array(tensor: paddle.Tensor) -> np.ndarray:
    """The part of a distributed tensor that this rank holds."""
    return np.asarray(tensor._local_value() if tensor.is_dist() else tensor)
