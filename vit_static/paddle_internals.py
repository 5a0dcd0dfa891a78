"""Where the program reaches behind Paddle's public interface: each with the version and the reason.

Written for Paddle 3.3.1; the one place, with cpu_collectives.py, to look at when Paddle changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed import collective
from paddle.distributed.auto_parallel.placement_type import to_dim_map
from paddle.distributed.auto_parallel.static import engine as engine_module
from paddle.distributed.auto_parallel.static import process_group
from paddle.distributed.auto_parallel.static.dist_input_spec import DistributedInputSpec
from paddle.distributed.passes import auto_parallel_gradient_merge as gradient_merge

_NO_CLIPPING = 1e30
SQUARES = "vit_static_squares"  # an attribute of the operators whose results are sums of gradients' squares


class RecordedGlobalNorm(nn.ClipGradByGlobalNorm):
    """Clipping by the norm of all gradients together, whose norm (before clipping) can be read after a step, and of the
    first step in which it wasn't finite the number, and the norms by what `group_of` says of a parameter's name.

    `clip_norm` None only measures. Paddle computes the norm but keeps it in the program; here it is copied into a
    variable that lives as long as the parameters. (Fetching it would do for a program in one piece, but not with
    accumulated gradients: those that compute the update are then a program of their own.) And Paddle sums each split
    gradient's square over the ranks by itself, a number at a time; here those of one split are added up first.
    """

    def __init__(self, clip_norm: float | None, group_of: Mapping[str, str], step_number: Callable[[], Any]) -> None:
        """`step_number` gives, while the program is built, the number of the step that it will be doing, from 1."""
        super().__init__(_NO_CLIPPING if clip_norm is None else clip_norm)
        self._group_of, self._step_number = group_of, step_number
        self._groups: list[str] = []  # of the numbers in _norms, of which some are parts of one group's
        self._norm = self._first_unsound = self._norms = ""  # names of variables

    def _pir_clip(self, params_grads: Any) -> Any:
        params_grads = [(parameter, gradient) for parameter, gradient in params_grads if gradient is not None]
        squares = [(self._group_of[parameter.name], _square(gradient)) for parameter, gradient in params_grads]
        self._groups, of_groups = _totals(squares)
        norm = paddle.sqrt(of_groups.sum(keepdim=True))
        kept = self._variable("grad_norm", norm)
        write_to(kept, norm)
        self._keep_first_unsound(norm, paddle.sqrt(of_groups))
        bound = paddle.full([1], self.clip_norm, "float32")
        factor = bound / paddle.maximum(norm, bound)
        return [
            (parameter, gradient * everywhere(factor, gradient.process_mesh).astype(gradient.dtype))
            for parameter, gradient in params_grads
        ]

    def _keep_first_unsound(self, norm: Any, norms: Any) -> None:
        """On the device: it isn't waited for before somebody asks."""
        first, kept = self._variable("first_unsound", norm), self._variable("unsound_norms", norms)
        # `assign`, since the engine would move a variable itself to this stage, of which others then know nothing.
        step = everywhere(paddle.assign(self._step_number()), norm.process_mesh)
        is_later = first > 0.0
        # Where shapes differ `where` makes them alike by additions, of NaN too.
        write_to(kept, paddle.where(paddle.expand(is_later, norms.shape), kept, norms))
        write_to(first, paddle.where(paddle.logical_or(is_later, paddle.isfinite(norm)), first, step))

    def _variable(self, name: str, like: Any) -> Any:
        unique = paddle.utils.unique_name.generate(name)
        setattr(self, {"grad_norm": "_norm", "unsound_norms": "_norms"}.get(name, f"_{name}"), unique)
        zeros = nn.initializer.Constant(0.0)
        dist_attr = like.dist_attr()
        return paddle.pir.core.create_persistable_value(
            "float32", like.shape, unique, initializer=zeros, dist_attr=dist_attr
        )

    def norm(self) -> float:
        """The last step's. Waits for the device."""
        values = _value_of(self._norm)
        return math.nan if values is None else float(values.item())  # a pipeline's later stages don't compute it

    def first_unsound(self) -> tuple[int, dict[str, float]] | None:
        """The number, from 1, of the first step whose norm wasn't finite, and its norms by group; None where there is
        none, or where another stage of the pipeline knows. Waits for the device."""
        step, norms = _value_of(self._first_unsound), _value_of(self._norms)
        if step is None or norms is None or step.item() == 0.0:
            return None
        squares: dict[str, float] = {}
        for group, norm in zip(self._groups, norms.tolist(), strict=True):
            squares[group] = squares.get(group, 0.0) + norm * norm
        return int(step.item()), {group: math.sqrt(square) for group, square in squares.items()}

    def forget_unsound(self) -> None:
        """As if there had been no such step."""
        variable = paddle.static.global_scope().find_var(self._first_unsound)
        if variable is not None and variable.get_tensor()._is_initialized():
            variable.get_tensor().set(np.zeros([1], np.float32), paddle.framework._current_expected_place_())


def _value_of(name: str) -> np.ndarray | None:
    """A variable's that outlives a step; None where this rank doesn't compute it."""
    variable = paddle.static.global_scope().find_var(name)
    if variable is None or not variable.get_tensor()._is_initialized():
        return None
    return np.asarray(variable.get_tensor())


def _square(gradient: Any) -> Any:
    """The sum of a gradient's squares, [1], float32; of a split gradient what each rank has of it."""
    return paddle._C_ops.squared_l2_norm(gradient.astype("float32"))


def _totals(squares: list[tuple[str, Any]]) -> tuple[list[str], Any]:
    """The sums by group, [n], on the first stage of a pipeline, and the group of each; where a group's parameters are
    split in several ways it has as many. Each rank's parts are added up before they are exchanged, all at once."""
    alike: dict[str, dict[str, list[Any]]] = {}
    for group, square in squares:
        split = f"{square.process_mesh.process_ids} {square.placements}"
        alike.setdefault(split, {}).setdefault(group, []).append(square)
    groups: list[str] = []
    vectors: list[Any] = []
    for by_group in alike.values():
        # `add_n` keeps partial sums partial, where other sums would exchange each of them.
        vector = paddle.stack([paddle.add_n(values) for values in by_group.values()])  # [n] or [n, 1]
        vector = vector.reshape([-1])
        vector.get_defining_op().set_bool_attr(SQUARES, True)
        vectors.append(reshard(vector, [dist.Replicate()] * vector.process_mesh.ndim))
        groups += by_group
    first = min((vector.process_mesh for vector in vectors), key=lambda mesh: min(mesh.process_ids))
    whole = [everywhere(vector, first) for vector in vectors]
    return groups, whole[0] if len(whole) == 1 else paddle.concat(whole)


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
            accumulators = self._accumulators.values()  # type: ignore[attr-defined]
            kept = [values[weight.name] for values in accumulators if weight.name in values]
            for value in [*kept, *([] if master is None else [master])]:
                if list(value.shape) == list(parameter.shape):  # not the powers of beta, which are numbers
                    _place_variable(value, parameter.process_mesh, placements)

    def _placements_of_state(self, parameter: Any) -> list[Any]:
        return parameter.placements if self._state_placements is None else self._state_placements(parameter)

    def _add_reduced(self, name: str, weight: Any, parameter: Any, axis: int) -> None:
        """A state of a parameter's shape without one axis, split as its others are."""
        placements = []
        for placement in self._placements_of_state(parameter):
            if placement.is_shard():
                place = placement.get_dim()
                placement = dist.Replicate() if place == axis else dist.Shard(place - (place > axis))
            placements.append(placement)
        shape = [size for place, size in enumerate(parameter.shape) if place != axis]
        value = persistable(f"{weight.name}_{name}", shape, "float32", parameter.process_mesh, placements)
        self._accumulators[name][weight.name] = value  # type: ignore[attr-defined]


class StepNumbers:
    """Numbers that the host sets before each step: variables of the program, on every rank."""

    def __init__(self) -> None:
        self._variables: dict[str, tuple[str, Any]] = {}

    def __deepcopy__(self, memo: Any) -> StepNumbers:
        return self  # Paddle copies the optimizer that refers to it

    def value(self, name: str) -> Any:
        """[1], float32, in the program being built."""
        if name not in self._variables:
            mesh = dist.auto_parallel.get_mesh()
            variable = persistable(name, [1], "float32", mesh, [dist.Replicate()] * mesh.ndim)
            self._variables[name] = (variable.name, variable)
        return self._variables[name][1]

    def set(self, numbers: dict[str, float]) -> None:
        """Before a step. Those that the program doesn't ask for are passed over."""
        scope = paddle.static.global_scope()
        for name, (variable_name, _) in self._variables.items():
            variable = scope.find_var(variable_name)
            if variable is not None:
                array = np.array([numbers[name]], np.float32)
                variable.get_tensor().set(array, paddle.framework._current_expected_place_())


def persistable(name: str, shape: list[int], dtype: str, mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """A variable of the program being built that outlives a step; 0 at first."""
    dim_map, partial = to_dim_map(placements, len(shape))
    return paddle.pir.core.create_persistable_value(
        dtype,
        shape,
        paddle.utils.unique_name.generate(name),
        initializer=nn.initializer.Constant(0),
        dist_attr=paddle.base.libpaddle.pir.create_tensor_dist_attribute(mesh, dim_map, partial),
    )


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


def compiled_program(program: dist.DistModel) -> Any:
    """The current mode's program as this rank executes it: local shapes, collectives as operators."""
    return program._engine._pir_dense_main_progs[program._engine._mode]


def structured_names(program: dist.DistModel) -> dict[str, str]:
    """From the layers' parameter names to the model's own: `linear_3.w_0` to `blocks.0.attn.q.weight`."""
    return dict(program._parameter_to_structured_name)


def local_array(tensor: paddle.Tensor) -> np.ndarray:
    """The part of a distributed tensor that this rank holds."""
    return np.array(local_tensor(tensor))


def local_tensor(tensor: paddle.Tensor) -> paddle.Tensor:
    return tensor._local_value() if tensor.is_dist() else tensor
