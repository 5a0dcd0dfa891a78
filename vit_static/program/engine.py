"""Hooks into Paddle's private auto-parallel engine.

Written for Paddle 3.3.1. CONTRIBUTING's table of Paddle internals lists each place with the reason.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import nn, pir
from paddle.base.dygraph.base import switch_to_static_graph
from paddle.distributed.auto_parallel.static import engine as engine_module
from paddle.distributed.auto_parallel.static.dist_input_spec import DistributedInputSpec
from paddle.distributed.auto_parallel.static.helper import ProgramHelper, ProxyLayer
from paddle.distributed.passes import auto_parallel_gradient_merge as gradient_merge
from paddle.static.amp import decorator as amp_decorator
from paddle.utils import unique_name

import vit_static
from vit_static.common.startup import keep_freed_memory
from vit_static.optim.sharded_state import update_loss_scaling

_MAX_CALL_STACK = 8  # frames, which reach from an operator to the line of the model that created it


def input_spec(name: str, shape: list[int], dtype: Any, mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """Return the engine's description of an input: its global shape and the mesh axes that split it."""
    local_shape = list(shape)
    for size, placement in zip(mesh.shape, placements, strict=True):
        if placement.is_shard():
            local_shape[placement.get_dim()] //= size
    return DistributedInputSpec(shape, dtype, name, True, mesh, placements, local_shape)


def set_input_specs(program: dist.DistModel, inputs: list[Any], labels: list[Any]) -> None:
    """Set the inputs of the mode that is built next: `dist.to_static` takes one set of them for all modes."""
    program._engine._inputs_spec = inputs
    program._engine._labels_spec = labels
    program._feed_name_list = {}


def build_mode(program: dist.DistModel, mode: str, run_passes: Callable[[Any], None]) -> tuple[Any, Any]:
    """Compile the program of `mode`, train or eval, and return what `use_mode` needs to run it.

    `run_passes` may change the program of this rank before the engine splits it into jobs.

    The engine has one executor and one schedule of micro-batches for all modes, and gives parameters and an executor
    only to the mode 'train'. Here each mode has its own, and evaluation has no schedule: one batch passes through all
    stages of a pipeline at once.
    """
    engine = program._engine
    engine._executor, engine._job_plan = None, None
    # Our functions branch and loop only over Python's values, so they are traced as they are, without being rewritten.
    # The same holds for the engine's functions that call them.
    paddle.jit.ignore_module([vit_static])
    for name in ("_train", "_eval", "call_loss", "call_metrics"):
        paddle.jit.not_to_static(getattr(ProxyLayer, name))
    if mode == "train":
        with _patched_passes(run_passes), _short_call_stacks():
            program.train()
    else:
        pipeline, engine._strategy.pipeline.enable = engine._strategy.pipeline.enable, False
        with _patched_passes(run_passes), _short_call_stacks():
            program.eval()
        engine._strategy.pipeline.enable = pipeline
        paddle.enable_static()
        if not engine._has_prepared["train"]:
            engine.program_helper.init_pir(engine._pir_dist_main_progs["eval"], engine._place)
        engine._executor = paddle.static.Executor(engine._place)
        paddle.disable_static()
    if engine._executor is not None:
        engine._executor._executor_cache = _PreparedPrograms(engine._executor._executor_cache)
        if engine._place.is_cpu_place():
            keep_freed_memory()
    return engine._executor, engine._job_plan


class SeveralTrainingPrograms:
    """What a program needs to be compiled for training more than once, with other inputs but the same variables.

    The engine compiles each mode once. Weights, optimizer state and all other variables are found in the global scope
    by their names, most of which end with a number that counts the names of the process. So each training program is
    compiled with the counts of the first one; its variables then have the same names, and the engine initializes only
    those that don't exist yet.
    """

    def __init__(self, program: dist.DistModel, layers: Iterable[nn.Layer], shared: Iterable[Any]) -> None:
        """Call this before the first mode is built. `layers`: all that have buffers. `shared`: objects to which the
        optimizer refers, to be used by all of its copies."""
        self._program, self._shared = program, list(shared)
        self._optimizer = self._copied(program._engine._optimizer)
        self._counts: dict[str, int] | None = None  # of names, before the first training program was compiled
        # The engine frees buffers that the program built first doesn't read.
        buffers = [buffer for layer in layers for buffer in layer.buffers()]
        self._buffers = {buffer.name: buffer.numpy() for buffer in buffers if buffer._is_initialized()}
        self._known_buffers: set[str] | None = None  # of the programs built so far

    def _copied(self, optimizer: Any) -> Any:
        """Copy an optimizer that no program has been built with."""
        return copy.deepcopy(optimizer, {id(each): each for each in self._shared})

    @contextmanager
    def building_training(self) -> Iterator[None]:
        """Let `build_mode` build one more training program within the context."""
        engine = self._program._engine
        names = _static_names()
        if self._counts is None:
            self._counts = dict(names.ids)
            yield
            return
        # Sums of micro-batches, 0 between two steps. They have the layout of the gradients, which may be another one.
        for name in engine._pir_dense_main_progs["train"].global_block().kwargs():
            variable = paddle.static.global_scope().find_var(name) if name.endswith("@GRAD@MERGE") else None
            if variable is not None:
                variable.get_tensor()._clear()
        engine._optimizer = self._copied(self._optimizer)
        engine._has_prepared["train"] = False
        init_parameters = ProgramHelper.init_pir
        ProgramHelper.init_pir = lambda *_: None  # the scope has them
        counts = dict(names.ids)
        _set_counts(names, self._counts)
        try:
            yield
        finally:
            _set_counts(names, counts)
            ProgramHelper.init_pir = init_parameters

    def restore_buffers(self) -> None:
        """Set the buffers of the mode that has just been built, as far as they have no values yet.

        The engine doesn't know those that only a later program has, and fills them with something else.
        """
        engine = self._program._engine
        pairs = zip(*engine.program_helper.concrete_program.parameters, strict=True)
        buffers = {buffer.name: value.name for buffer, value in pairs if buffer.name in self._buffers}
        for name, value_name in buffers.items():
            tensor = paddle.static.global_scope().var(value_name).get_tensor()
            is_new = self._known_buffers is not None and name not in self._known_buffers
            if is_new or not tensor._is_initialized():
                tensor.set(self._buffers[name], engine._place)
        self._known_buffers = {*buffers, *(self._known_buffers or ())}


def _static_names() -> Any:
    """Return the generator of unique names of static programs; in dynamic mode Paddle uses another one."""
    paddle.enable_static()
    names, parameter_names = unique_name.switch()
    unique_name.switch(names, parameter_names)
    paddle.disable_static()
    return names


def _set_counts(names: Any, counts: dict[str, int]) -> None:
    names.ids.clear()
    names.ids.update(counts)


class _PreparedPrograms:
    """Replaces the cache of an executor, whose programs no longer change: Paddle's prints them to compare their texts.

    That takes 5 ms in each step of a ViT with 3 blocks, and more than 20 ms with 12.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._prepared: dict[tuple[int, tuple[str, ...], int], tuple[Any, Any]] = {}

    def get_pir_program_and_executor(
        self, program: Any, feed: dict[str, Any], fetch_list: list[Any], *others: Any
    ) -> Any:
        """Return what Paddle has prepared to run `program`, with these names of inputs and number of results."""
        key = (id(program), tuple(feed), len(fetch_list))
        if key not in self._prepared:  # with a reference to the program, so that no other has its id
            self._prepared[key] = program, self._cache.get_pir_program_and_executor(program, feed, fetch_list, *others)
        return self._prepared[key][1]

    def clear(self) -> None:
        """Forget all of it, as the executor asks at its end."""
        self._prepared.clear()
        self._cache.clear()


@contextmanager
def _patched_passes(run_passes: Callable[[Any], None]) -> Iterator[None]:
    """Call `run_passes` on every program that the engine compiles within the context.

    It runs after the engine's pass that removes collectives of groups with one rank. The engine's scaling of
    accumulated gradients is left out: optim/sharded_state.py averages them. Loss scaling is optim/loss_scaling.py's.
    """
    remove_collectives = engine_module.remove_unuseful_comm_op_pass
    changed: list[Any] = []  # the engine calls that pass on a program twice

    def remove_collectives_and_run_passes(program: Any) -> None:
        remove_collectives(program)
        if not any(program is other for other in changed):
            changed.append(program)
            run_passes(program)

    append_scale = gradient_merge._pir_append_scale_op
    update_scale = amp_decorator.update_loss_scaling
    engine_module.remove_unuseful_comm_op_pass = remove_collectives_and_run_passes
    gradient_merge._pir_append_scale_op = lambda *_: None
    amp_decorator.update_loss_scaling = update_loss_scaling
    try:
        yield
    finally:
        engine_module.remove_unuseful_comm_op_pass = remove_collectives
        gradient_merge._pir_append_scale_op = append_scale
        amp_decorator.update_loss_scaling = update_scale


@contextmanager
def _short_call_stacks() -> Iterator[None]:
    """Store only the innermost frames of the Python call stack with each operator created within the context.

    Paddle calls `traceback.extract_stack` for its error messages, which describes about 40 frames for each of thousands
    of operators: a quarter of the time to compile.
    """
    extract_stack = traceback.extract_stack
    traceback.extract_stack = _innermost_frames
    try:
        yield
    finally:
        traceback.extract_stack = extract_stack


def _innermost_frames(f: FrameType | None = None, limit: int | None = None) -> traceback.StackSummary:
    """Return the innermost frames, the innermost last, as `traceback.extract_stack` does."""
    here = inspect.currentframe()
    frame = here.f_back if f is None and here is not None else f
    frames = traceback.StackSummary()
    while frame is not None and len(frames) < (limit or _MAX_CALL_STACK):
        frames.append(_frame_summary(frame.f_code, frame.f_lineno))
        frame = frame.f_back
    frames.reverse()
    return frames


@cache
def _frame_summary(code: CodeType, line: int) -> traceback.FrameSummary:
    return traceback.FrameSummary(code.co_filename, line, code.co_name)


def can_run(built: tuple[Any, Any]) -> bool:
    """Return whether a mode can be executed, not just inspected (plan/fake_world.py). `built`: see `build_mode`."""
    return built[0] is not None


def use_mode(program: dist.DistModel, mode: str, built: tuple[Any, Any]) -> None:
    """Make a mode the current one; `built` is what `build_mode` returned for it."""
    engine = program._engine
    engine._executor, engine._job_plan = built
    if mode == "train":
        program.train()
    else:
        program.eval()


@switch_to_static_graph
def run_without_results(program: dist.DistModel, inputs: list[paddle.Tensor]) -> None:
    """Start the current mode's program. Calling `program` instead would fetch the loss, and so wait for the device."""
    engine = program._engine
    engine._executor.run(engine.main_program, feed=program._make_feeds(inputs), fetch_list=[])


def loss_of(program: dist.DistModel, compiled: Any) -> Any:
    """Return the loss as a value of the compiled program of the mode being built, or None on a stage without it."""
    loss = compiled.get_output_value_by_name(program._engine._loss_names[0])
    return None if pir.is_fake_value(loss) else loss


def place_of(program: dist.DistModel) -> Any:
    """Return the device of the program's variables, after a mode has been built."""
    return program._engine._place


def mark_recompute(layer: nn.Layer, segment: int) -> None:
    """Recompute a layer's forward in the backward pass instead of keeping its activations.

    Marks its operators, as they are traced, for Paddle's pass. `segment` must be unique per layer.
    """
    num_operators: list[int] = []

    def before_forward(layer: Any, inputs: Any) -> None:
        num_operators.append(len(paddle.static.default_main_program().global_block().ops))

    def after_forward(layer: Any, inputs: Any, output: Any) -> None:
        operators = paddle.static.default_main_program().global_block().ops
        for index in range(num_operators.pop(), len(operators)):
            operators[index].set_int_attr("fwd_recompute_id", segment)

    layer.register_forward_pre_hook(before_forward)
    layer.register_forward_post_hook(after_forward)


def compiled_program(program: dist.DistModel) -> Any:
    """Return the current mode's program as this rank executes it: local shapes, collectives as operators."""
    return program._engine._pir_dense_main_progs[program._engine._mode]


def structured_names(program: dist.DistModel) -> dict[str, str]:
    """Map the layers' parameter names to the model's: `linear_3.w_0` to `blocks.0.attn.q.weight`."""
    return dict(program._parameter_to_structured_name)
