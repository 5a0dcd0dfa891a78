"""All ranks of a run that trains on GPUs, in one process, with the interpreter in place of the GPUs.

Everything except the execution of the compiled programs is the package's and Paddle's own code: the start-up program,
the learning rate, the scalars of a step, the state and its names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import paddle
from paddle.base import core
from paddle.distributed.auto_parallel.static import engine as paddle_engine
from paddle.distributed.auto_parallel.static.helper import ProgramHelper
from paddle.distributed.auto_parallel.static.process_group import get_all_process_groups

from gpu_program.array_operators import Array
from gpu_program.build import GpuCase, build_program, building
from gpu_program.interpreter import Decoded, Instruction, Rank, decode, run_in_lock_step
from vit_static.checkpoint.sharded_state import ShardedReader, write_shard
from vit_static.parallel import gloo
from vit_static.program.program import Program

_initialize, _init_pir = paddle_engine.Engine._initialize, ProgramHelper.init_pir  # before `building` replaces them
Instructions = tuple[Instruction, ...]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass
class _Launch:
    """A call of the executor, which the GPU would perform in the background."""

    mode: str
    feed: dict[str, Array]
    result: Array | None  # receives the criterion's values, if the host asks for them
    seed: int  # of the rank's generator


class _Executor:
    """Takes the place of Paddle's executor for one mode of one rank: records what it is called with."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self.launched: _Launch | None = None

    def run(
        self,
        program: Any,
        feed: Mapping[str, Any],
        fetch_list: list[Any],
        use_program_cache: bool = False,
        return_numpy: bool = True,
    ) -> list[Array]:
        """Return arrays that are filled when the program has run."""
        assert self.launched is None, "the step before hasn't run"
        if hasattr(program, "lr_scheduler"):  # as Paddle's executor does
            scope = paddle.static.global_scope()
            rate = np.array(program.lr_scheduler(), np.float32)
            scope.var(program.lr_name).get_tensor().set(rate, paddle.CPUPlace())
        results = [np.full(value.shape, np.nan, np.float32) for value in fetch_list]
        arrays = {name: np.array(value) for name, value in feed.items()}
        result = results[0] if results else None
        self.launched = _Launch(self._mode, arrays, result, core.default_cpu_generator().initial_seed())
        return results


@dataclass
class _Member:
    """One rank: its program, the variables that Paddle keeps for it, and its decoded jobs by mode."""

    program: Program
    scope: Any
    executors: dict[str, _Executor]
    jobs: dict[str, list[tuple[Decoded, int]]]  # programs, each for a micro-batch
    result_names: dict[str, str]  # of the criterion's values, by mode
    rings: dict[int, tuple[int, ...]]  # the ranks of each group, by ring_id

    def launched(self) -> _Launch:
        """Return what was launched last, and forget it."""
        for executor in self.executors.values():
            if executor.launched is not None:
                launch, executor.launched = executor.launched, None
                return launch
        raise AssertionError("a rank hasn't launched the step that the others have")

    def variables(self, mode: str) -> dict[str, Array]:
        """Return copies of the persistable variables that a mode's programs use."""
        arrays = {}
        for name in {name for program, _ in self.jobs[mode] for name in program.variable_names()}:
            variable = self.scope.find_var(name)
            if variable is not None and variable.get_tensor()._is_initialized():
                arrays[name] = _to_array(variable.get_tensor())
        return arrays

    def store(self, variables: Mapping[str, Array]) -> None:
        """Write variables back, with the dtypes that they have."""
        for name, array in variables.items():
            bits = array.view(np.uint16) if array.dtype == _BFLOAT16 else array  # Paddle's form of bfloat16 in NumPy
            self.scope.var(name).get_tensor().set(bits, paddle.CPUPlace())


def _to_array(tensor: Any) -> Array:
    array = np.array(tensor)
    return array.view(_BFLOAT16) if array.dtype == np.uint16 else array


class World:
    """The ranks of a mesh. Each launches a step; when all have, it is executed."""

    def __init__(self, case: GpuCase, modes: tuple[str, ...] = ("train",)) -> None:
        self.case = case
        self._members = [self._build(rank, modes) for rank in range(case.shape.world_size)]

    def compiled(self) -> Any:
        """Return the first rank's training program."""
        return self._members[0].program.compiled("train")

    def _build(self, rank: int, modes: tuple[str, ...]) -> _Member:
        scope = paddle.static.Scope()
        with self._as_rank(rank, scope):
            program = build_program(self.case, rank)
            member = _Member(program, scope, {}, {}, {}, {})
            for mode in modes:
                compiled = program.compiled(mode)
                plan = program._built[mode][1]
                member.executors[mode] = _Executor(mode)
                program._built[mode] = member.executors[mode], plan
                member.jobs[mode] = _decode_jobs(compiled, plan)
                member.result_names[mode] = program._program._engine._loss_names[0]
            program._mode = None  # the next step enters its mode, and with it the executor above
            member.rings |= {group.id: tuple(group.ranks) for group in get_all_process_groups()}
        return member

    @contextmanager
    def _as_rank(self, rank: int, scope: Any) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(paddle.static.scope_guard(scope))
            stack.enter_context(building(self.case.shape, rank))
            # The start-up program runs on the CPU: it fills and converts the initial state.
            stack.enter_context(patch.object(paddle_engine.Engine, "_initialize", _initialize))
            stack.enter_context(patch.object(ProgramHelper, "init_pir", _init_pir))
            stack.enter_context(patch.object(gloo, "_paddle_reshard", core.reshard))
            stack.enter_context(patch.object(core, "reshard", gloo._reshard))
            stack.enter_context(patch.object(paddle._legacy_C_ops, "barrier", lambda *_: None))
            yield

    @contextmanager
    def rewritten(self, function: Callable[[Instructions], Instructions]) -> Iterator[None]:
        """Replace the instructions of each training program by function(instructions) within the context."""
        originals = [member.jobs["train"] for member in self._members]
        for member in self._members:
            changed: dict[int, Decoded] = {}
            for program, _ in member.jobs["train"]:
                if id(program) not in changed:
                    changed[id(program)] = replace(program, instructions=function(program.instructions))
            member.jobs["train"] = [(changed[id(program)], number) for program, number in member.jobs["train"]]
        try:
            yield
        finally:
            for member, original in zip(self._members, originals, strict=True):
                member.jobs["train"] = original

    def operator_names(self) -> set[str]:
        """Return the names of all operators of the programs."""
        jobs = [job for member in self._members for jobs in member.jobs.values() for job in jobs]
        return {instruction.name for program, _ in jobs for instruction in program.instructions}

    def on_each_rank(self, function: Callable[[Program, int], Any]) -> list[Any]:
        """Return function(program, rank) for each rank, called as this rank."""
        results = []
        for rank, member in enumerate(self._members):
            with self._as_rank(rank, member.scope):
                results.append(function(member.program, rank))
        return results

    def train_step(self, images: Array, labels: Array, step: int) -> tuple[float, float]:
        """Take a step on a global batch. Returns the loss, and the norm of the gradients before clipping."""

        def launch(program: Program, rank: int) -> Any:
            return program.train_step(*self._part(rank, images, labels), step)

        losses = self.on_each_rank(launch)
        self._run()
        read = self.on_each_rank(lambda program, rank: (program.loss_value(losses[rank]), program.grad_norm()))
        on_last_stage = [loss for rank, (loss, _) in enumerate(read) if self._stage(rank) == self.case.shape.pp - 1]
        return float(np.mean(on_last_stage)), read[0][1]

    def eval_step(self, images: Array, labels: Array) -> Array:
        """Return the criterion's values for a global batch, [B, 4]."""
        values = self.on_each_rank(lambda program, rank: program.eval_step(*self._part(rank, images, labels)))
        self._run()
        shape = self.case.shape
        first = (shape.pp - 1) * shape.dp * shape.mp  # of the last stage
        return np.concatenate(values[first :: shape.mp])

    def _stage(self, rank: int) -> int:
        return rank // (self.case.shape.dp * self.case.shape.mp)

    def _part(self, rank: int, images: Array, labels: Array) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return a rank's part of a batch."""
        dp_rank = rank // self.case.shape.mp % self.case.shape.dp
        parts = (np.split(array, self.case.shape.dp)[dp_rank] for array in (images, labels))
        return tuple(paddle.to_tensor(part) for part in parts)

    def _run(self) -> None:
        """Execute what the ranks have launched."""
        launches = [member.launched() for member in self._members]
        tasks, feeds_of_ranks, memories = [], [], []
        for member, launch in zip(self._members, launches, strict=True):
            jobs = member.jobs[launch.mode]
            num_micro_batches = 1 + max(micro_batch for _, micro_batch in jobs)
            feeds = [
                {name: np.split(array, num_micro_batches)[number] for name, array in launch.feed.items()}
                for number in range(num_micro_batches)
            ]
            memory = member.variables(launch.mode)
            tasks.append(Rank(memory, np.random.default_rng(launch.seed)).run(jobs, feeds))
            feeds_of_ranks.append(feeds)
            memories.append(memory)
        run_in_lock_step(tasks, [member.rings for member in self._members])
        for member, launch, feeds, memory in zip(self._members, launches, feeds_of_ranks, memories, strict=True):
            member.store(memory)
            if launch.result is not None:
                (feed,) = feeds
                launch.result[...] = feed[member.result_names[launch.mode]]

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Replace the weights by their moving average within the context."""
        managers = self.on_each_rank(lambda program, rank: program.ema_weights())
        self.on_each_rank(lambda program, rank: managers[rank].__enter__())
        try:
            yield
        finally:
            self.on_each_rank(lambda program, rank: managers[rank].__exit__(None, None, None))

    # State

    def state(self) -> dict[str, Array]:
        """Return the state by canonical name (program/state.py), each tensor gathered from the ranks that hold it."""
        gathered: dict[str, Array] = {}

        def gather(program: Program, rank: int) -> None:
            shard = program.shard()
            for name, array in shard.arrays.items():
                start, full_shape = shard.slices[name]
                full = gathered.setdefault(name, np.zeros(full_shape, array.dtype))
                full[tuple(slice(first, first + length) for first, length in zip(start, array.shape, strict=True))] = (
                    array
                )

        self.on_each_rank(gather)
        return gathered

    def save(self, folder: Path) -> list[Path]:
        """Write each rank's shard of the state, as a checkpoint has it, and return the files."""
        paths = [folder / f"{rank}.safetensors" for rank in range(self.case.shape.world_size)]
        self.on_each_rank(lambda program, rank: write_shard(program.shard(), paths[rank], {}))
        return paths

    def restore(self, paths: list[Path]) -> None:
        """Load the state from shards that any mesh has written."""
        self.on_each_rank(lambda program, rank: program.restore(ShardedReader(paths)))


def _decode_jobs(compiled: Any, plan: Any) -> list[tuple[Decoded, int]]:
    """Return the programs that the executor runs in a step, in order, each with the number of its micro-batch."""
    if plan is None:
        return [(decode(compiled), 0)]
    programs = {kind: decode(plan.ir_program(kind)) for kind in plan.job_types()}
    return [(programs[job.type()], job.micro_batch_id()) for job in plan.job_list()]
