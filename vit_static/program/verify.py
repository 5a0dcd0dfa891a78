"""Properties that the compiled program of a rank must have, checked on its operators.

Used by the tests, for the programs of GPUs on any mesh, and by `./run.sh doctor`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import paddle
from paddle.distributed.auto_parallel.static.process_group import get_process_group

from vit_static.optim.grad_clip import CLIPPED_GRADIENT, SQUARED_GRADIENT
from vit_static.program.ir import BACKWARD, COLLECTIVE_KINDS, UPDATE
from vit_static.program.precision import Precision

_HALF_DTYPES = (paddle.float16, paddle.bfloat16)
# Operators through which a gradient passes on its way from the backward pass to the optimizer.
_CARRIERS = {
    *("pd_op.cast", "pd_op.scale", "pd_op.reshape", "pd_op.reshape_grad", "pd_op.transpose", "pd_op.transpose_grad"),
    *("pd_op.concat", "pd_op.split", "pd_op.split_with_num", "pd_op.slice", "pd_op.assign"),
    *("pd_op.all_reduce", "pd_op.all_reduce_", "pd_op.reduce_scatter"),
    *("pd_op.add_n", "builtin.combine", "builtin.split"),
}
_SUMS = {"pd_op.all_reduce", "pd_op.all_reduce_", "pd_op.reduce_scatter"}
_VIEWS = {"pd_op.all_reduce_", "pd_op.add_"}
# Collectives that Paddle may insert and that `plan` doesn't know.
_COLLECTIVE_WORDS = ("all_reduce", "all_gather", "all_to_all", "reduce_scatter", "broadcast", "send", "recv", "c_")


@dataclass(frozen=True)
class Expected:
    """Properties of a program by which it is checked."""

    precision: Precision
    is_training: bool
    dp_ranks: tuple[int, ...]  # ranks that hold the same part of the model as this one, this one among them
    uses_flash_attention: bool
    reduce_dtype: str = "float32"  # in which gradients are summed over ranks


def violations(program: Any, expected: Expected, ranks_of: Callable[[int], tuple[int, ...]] | None = None) -> list[str]:
    """Return a sentence for each property that the program lacks; an empty list if it has all.

    `ranks_of` returns the ranks of a process group by its ring_id; default: Paddle's process groups.
    """
    reader = _Program(program, ranks_of or (lambda ring: tuple(get_process_group(ring).ranks)))
    checks: list[Callable[[_Program, Expected], Iterator[str]]] = [
        _operands_are_defined_before_use,
        _collectives_are_known,
        _nothing_is_copied_to_the_host,
        _attention_is_fused,
        _streams_are_ordered,
    ]
    if expected.is_training:
        checks += [_state_is_float32, _gradients_are_marked, _gradients_are_exchanged_once]
        if expected.precision.dtype == "float16":
            checks += [_norm_is_unscaled_once]
    return [problem for check in checks for problem in check(reader, expected)]


class _Program:
    """A program's operators with their positions, and which values share memory."""

    def __init__(self, program: Any, ranks_of: Callable[[int], tuple[int, ...]]) -> None:
        self.ops = list(program.global_block().ops)
        self.ranks_of = ranks_of
        self.positions = {op.id(): position for position, op in enumerate(self.ops)}
        self.parameters = {
            op.attrs()["parameter_name"]: op.result(0) for op in self.ops if op.name() == "builtin.parameter"
        }
        # Variables that outlive a step, except parameters: optimizer state, sums over micro-batches.
        self.stored = {
            op.attrs()["name"]: op.result(0)
            for op in self.ops
            if op.name() == "pd_op.data" and op.result(0).persistable
        }
        self._unscalings = [
            (position, {value.id for value in self.tensors(op.operand_source(0))})
            for position, op in enumerate(self.ops)
            if op.name() == "pd_op.check_finite_and_unscale_"
        ]

    def producer(self, value: Any) -> Any:
        """Return the operator that computes a value, or None for an input of the program."""
        op = value.get_defining_op()
        return None if op is None or op.id() not in self.positions else op

    def stream(self, op: Any) -> str:
        """Return the name of the stream that an operator has for itself; empty for the common one."""
        return op.str_attr("execution_stream") if op.has_attr("execution_stream") else ""

    def tensors(self, value: Any) -> list[Any]:
        """Return the tensors of a vector of them, or the tensor itself."""
        op = self.producer(value)
        return _operands(op) if op is not None and op.name() == "builtin.combine" else [value]

    def memory(self, values: Iterable[Any]) -> set[str]:
        """Return the identifiers of the values' memory, which views share."""
        return {self._memory(tensor) for value in values for tensor in self.tensors(value)}

    def _memory(self, tensor: Any) -> str:
        op = self.producer(tensor)
        return self._memory(op.operand_source(0)) if op is not None and op.name() in _VIEWS else str(tensor.id)

    def num_unscalings(self, value: Any, before: int) -> int:
        """Return how often Paddle's operator has unscaled a value in place before a position."""
        return sum(1 for position, ids in self._unscalings if position < before and value.id in ids)

    def additions_to(self, value: Any, before: int) -> list[Any]:
        """Return the operators that add to a value in place before a position."""
        return [op for op in self.ops[:before] if op.name() == "pd_op.add_" and op.operand_source(0).id == value.id]

    def group(self, op: Any) -> tuple[int, ...]:
        return tuple(sorted(self.ranks_of(op.attrs()["ring_id"])))


def _operands(op: Any) -> list[Any]:
    return [value for value in op.operands_source() if value is not None and value.initialized()]


def _short(op: Any) -> str:
    return str(op.name()).removeprefix("pd_op.").removeprefix("builtin.")


def _operands_are_defined_before_use(program: _Program, expected: Expected) -> Iterator[str]:
    for position, op in enumerate(program.ops):
        for value in _operands(op):
            producer = program.producer(value)
            if producer is not None and program.positions[producer.id()] >= position:
                yield f"operator {position} ({_short(op)}) reads a result of {_short(producer)}, which comes later"


def _collectives_are_known(program: _Program, expected: Expected) -> Iterator[str]:
    for position, op in enumerate(program.ops):
        is_collective = op.has_attr("ring_id") or _short(op).startswith(_COLLECTIVE_WORDS)
        if is_collective and op.name() not in COLLECTIVE_KINDS:
            yield f"operator {position} ({_short(op)}) is a collective that `plan` doesn't count"


def _nothing_is_copied_to_the_host(program: _Program, expected: Expected) -> Iterator[str]:
    for position, op in enumerate(program.ops):
        if _short(op).startswith("memcpy"):
            yield f"operator {position} ({_short(op)}) copies between device and host, which waits for the device"


def _attention_is_fused(program: _Program, expected: Expected) -> Iterator[str]:
    names = Counter(_short(op) for op in program.ops)
    if names["memory_efficient_attention"]:
        yield "attention runs in memory_efficient_attention, which has no sharding rule"
    if not expected.uses_flash_attention:
        return
    if not names["flash_attn"]:
        yield "no flash_attn: attention isn't fused"
    num_plain = sum(1 for op in program.ops if _short(op) == "softmax" and len(op.result(0).shape) == 4)
    if num_plain:
        yield f"{num_plain} attention layers compute their weights by a softmax of their own"
    for op in program.ops:
        if _short(op) == "flash_attn":
            for name, value in zip("qkv", _operands(op)[:3], strict=True):
                if value.dtype not in _HALF_DTYPES:
                    yield f"flash_attn reads {name} in {value.dtype}"
                if _is_gathered(program, value):
                    yield f"{name} of flash_attn is gathered over ranks"


def _is_gathered(program: _Program, value: Any) -> bool:
    """Return whether a collective stands between a value and the product or addition that computes it."""
    op = program.producer(value)
    if op is None:
        return False
    if op.name() in COLLECTIVE_KINDS:
        return True
    return op.name() in _CARRIERS and any(_is_gathered(program, operand) for operand in _operands(op))


def _state_is_float32(program: _Program, expected: Expected) -> Iterator[str]:
    """Check optimizer state, master weights and sums over micro-batches; half precision is for parameters alone."""
    for name, value in program.stored.items():
        if value.dtype in _HALF_DTYPES:
            yield f"{name} is stored in {value.dtype}"
    for name, parameter in _trained_parameters(program).items():
        has_master = any(re.fullmatch(rf"{re.escape(name)}_fp32_master_\d+", other) for other in program.stored)
        if parameter.dtype in _HALF_DTYPES and not has_master:
            yield f"parameter {name} in {parameter.dtype} has no float32 master copy"


def _trained_parameters(program: _Program) -> dict[str, Any]:
    """Return the parameters that have optimizer state, by name."""
    return {
        name: value
        for name, value in program.parameters.items()
        if any(other.startswith(f"{name}_") for other in program.stored)
    }


def _gradients_are_marked(program: _Program, expected: Expected) -> Iterator[str]:
    """Check that each trained parameter has one clipped gradient and one in the norm, which the next check follows."""
    uses = Counter(
        (use, op.attrs()[use]) for op in program.ops for use in (CLIPPED_GRADIENT, SQUARED_GRADIENT) if op.has_attr(use)
    )
    for name in _trained_parameters(program):
        for use in (CLIPPED_GRADIENT, SQUARED_GRADIENT):
            if uses[use, name] != 1:
                yield f"{name}: its gradient is used {uses[use, name]} times as {use}"


def _norm_is_unscaled_once(program: _Program, expected: Expected) -> Iterator[str]:
    """Check the stage that computes the norm: a square root of a sum, divided by the loss scale."""
    norms = [op.result(0) for op in program.ops if op.name() == "pd_op.sqrt" and _is_norm(program, op)]
    for norm in norms:
        divisions = [reader for reader in norm.all_used_ops() if reader.name() == "pd_op.divide"]
        num_unscalings = sum(_depends_on_loss_scale(program, op.operand_source(1)) for op in divisions)
        if num_unscalings != 1:
            yield f"the norm of the gradients is unscaled {num_unscalings} times"


def _is_norm(program: _Program, op: Any) -> bool:
    """Return whether an operator is the root of the sum of all groups' squares."""
    source = program.producer(op.operand_source(0))
    return op.op_role == UPDATE and source is not None and source.name() == "pd_op.sum" and op.result(0).shape == [1]


@dataclass(frozen=True)
class _Path:
    """The way of a gradient from the backward pass to an operator of the update."""

    source: int  # position of the operator of the backward pass
    exchanges: tuple[Any, ...] = ()  # sums over the data-parallel ranks
    num_unscalings: int = 0  # by Paddle's in-place operator


def _gradients_are_exchanged_once(program: _Program, expected: Expected) -> Iterator[str]:
    """Check that every gradient is summed over the data-parallel ranks once, in the right dtype, and unscaled once.

    Follows the gradient of each parameter backward, from its clipping and from the norm to the backward pass.
    """
    num_expected = 1 if len(expected.dp_ranks) > 1 else 0
    exchanges_of: dict[tuple[str, int], set[int]] = defaultdict(set)  # by parameter and gradient
    for op in program.ops:
        for use in (CLIPPED_GRADIENT, SQUARED_GRADIENT):
            if not op.has_attr(use):
                continue
            name = op.attrs()[use]
            paths = list(_paths(program, _operands(op)[0], program.positions[op.id()], expected.dp_ranks))
            if not paths:
                yield f"{name}: no gradient from the backward pass reaches {use}"
            for path in paths:
                exchanges_of[name, path.source].update(exchange.id() for exchange in path.exchanges)
                if len(path.exchanges) != num_expected:
                    yield f"{name}: its gradient is exchanged {len(path.exchanges)} times before {use}"
                for exchange in path.exchanges:
                    dtype = str(exchange.operand_source(0).dtype).removeprefix("paddle.")
                    if dtype != expected.reduce_dtype:
                        yield f"{name}: its gradient is summed over ranks in {dtype}, not {expected.reduce_dtype}"
                if expected.precision.dtype == "float16" and use == CLIPPED_GRADIENT:
                    num_unscalings = path.num_unscalings + _num_unscalings(program, op.operand_source(1))
                    if num_unscalings != 1:
                        yield f"{name}: its gradient is unscaled {num_unscalings} times before it is used"
    for (name, _), exchanges in exchanges_of.items():
        if len(exchanges) > 1:
            yield f"{name}: its gradient is exchanged by {len(exchanges)} collectives"


def _paths(
    program: _Program, value: Any, read_at: int, dp_ranks: tuple[int, ...], part: tuple[int, int] | None = None
) -> Iterator[_Path]:
    """Yield the ways on which a gradient comes to its reader at position `read_at`.

    `part`: of a bucket, which is concatenated, exchanged and split, the index of the gradient and their number.
    """
    op = program.producer(value)
    if op is None or op.name() == "pd_op.data":  # a sum over micro-batches, to which gradients were added in place
        for addition in program.additions_to(value, read_at):
            yield from _paths(program, addition.operand_source(1), program.positions[addition.id()], dp_ranks)
        return
    position = program.positions[op.id()]
    num_unscalings = program.num_unscalings(value, read_at)
    if op.name() not in _CARRIERS:
        if op.op_role == BACKWARD:
            yield _Path(position, (), num_unscalings)
            return
        tensors = [operand for operand in _operands(op) if math.prod(operand.shape) > 1]
        operands = tensors if op.op_role == UPDATE else []
    elif op.name() == "builtin.combine":
        operands = _operands(op)
        if part is not None and part[1] == len(operands):
            operands = [operands[part[0]]]
        part = None
    else:
        if op.name() == "builtin.split":
            part = next(i for i, result in enumerate(op.results()) if result.id == value.id), len(op.results())
        # One operand is the gradient: the last of a backward operator's.
        operands = _operands(op)[-1:] if op.name().endswith("_grad") else _operands(op)[:1]
    is_exchange = op.name() in _SUMS and program.group(op) == dp_ranks
    for operand in operands:
        for path in _paths(program, operand, position, dp_ranks, part):
            exchanges = (*path.exchanges, op) if is_exchange else path.exchanges
            yield _Path(path.source, exchanges, path.num_unscalings + num_unscalings)


def _num_unscalings(program: _Program, factor: Any) -> int:
    """Return how often the factor of the gradients has been divided by the loss scale."""
    op = program.producer(factor)
    if op is None:
        return 0
    if op.name() == "pd_op.recv_v2":  # of another pipeline stage, whose program is checked there
        return 1
    if op.name() == "pd_op.where":  # the factor, or NaN if the step is skipped
        return _num_unscalings(program, op.operand_source(1))
    if op.name() == "pd_op.divide" and _depends_on_loss_scale(program, op.operand_source(1)):
        is_bound = not _depends_on_loss_scale(program, op.operand_source(0))
        maximum = program.producer(op.operand_source(1))
        by_norm = maximum is not None and maximum.name() == "pd_op.maximum"
        return 0 if is_bound and by_norm else 1 + _num_unscalings(program, op.operand_source(0))
    return _num_unscalings(program, op.operand_source(0)) if op.name() in ("pd_op.cast", "pd_op.assign") else 0


def _depends_on_loss_scale(program: _Program, value: Any) -> bool:
    pending, seen = [value], set()
    while pending:
        op = program.producer(pending.pop())
        if op is None or op.id() in seen:
            continue
        seen.add(op.id())
        if op.name() == "pd_op.data" and op.attrs()["name"].startswith("loss_scaling"):
            return True
        if op.op_role == UPDATE:
            pending += _operands(op)
    return False


def _streams_are_ordered(program: _Program, expected: Expected) -> Iterator[str]:
    """Check that no operator changes memory that another stream uses at the same time, or reads what that one writes.

    An operator on a stream of its own starts after the operators that compute its operands, and whatever precedes them
    on their stream; another stream waits for it where it first reads its results. What stands in between runs at an
    unknown time relative to it.
    """
    for position, op in enumerate(program.ops):
        stream = program.stream(op)
        if not stream:
            continue
        producers = filter(None, (program.producer(value) for value in _operands(op)))
        first = 1 + max((program.positions[producer.id()] for producer in producers), default=-1)
        readers = [program.positions[reader.id()] for result in op.results() for reader in result.all_used_ops()]
        last = min(readers, default=len(program.ops))
        reads, writes = program.memory(_operands(op)), program.memory(op.results())
        for other_position in range(first, last):
            other = program.ops[other_position]
            if program.stream(other) == stream:
                continue
            other_writes, other_reads = program.memory(_written(other)), program.memory(_operands(other))
            if other_writes & (reads | writes) or other_reads & writes:
                yield (
                    f"operator {other_position} ({_short(other)}) uses memory of operator {position} ({_short(op)}), "
                    f"which may be running on the stream {stream}"
                )


def _written(op: Any) -> list[Any]:
    """Return the results of an operator, and the operands that it may change in place."""
    results = [value for value in op.results() if value.initialized()]
    return results + (_operands(op) if op.name().endswith("_") else [])
