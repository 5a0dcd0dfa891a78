"""An interpreter of compiled programs: all ranks of a mesh in one process, each in program order, on NumPy arrays.

It executes what the GPUs would execute, operator by operator (operators.py), and rounds every result to the dtype that
the program declares. Ranks run until they reach a collective; when all ranks of its group have reached it, it is
performed and they continue. Not modelled: streams (operators with an `execution_stream` run in program order too), the
order in which a GPU adds numbers, and the instructions of its kernels.
"""

from __future__ import annotations

import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import ml_dtypes
import numpy as np
import paddle

from gpu_program.array_operators import Array
from gpu_program.operators import OPERATORS, Operator

DTYPES: dict[Any, Any] = {
    paddle.bool: np.bool_,
    paddle.uint8: np.uint8,
    paddle.int32: np.int32,
    paddle.int64: np.int64,
    paddle.float64: np.float64,
    paddle.float32: np.float32,
    paddle.float16: np.float16,
    paddle.bfloat16: ml_dtypes.bfloat16,
}
_LOW_PRECISION = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

# Attributes that say where an operator comes from and where it runs, not what it computes. The package's own begin with
# its name.
_ANNOTATIONS = {
    *("op_role", "op_callstack", "chunk_id", "struct_name", "stop_gradient", "place", "execution_stream"),
    *("scheduling_priority", "force_record_event", "event_to_record", "events_to_wait", "fwd_recompute_id"),
    *("bwd_recompute_id", "master_grad_cast", "grad_merge_add", "replace_all_uses_with_reshard_var"),
}
_OWN_ATTRIBUTE = "vit_static_"
_REDUCTIONS: dict[int, Callable[[Array, Array], Array]] = {
    **{int(paddle.distributed.ReduceOp.SUM): np.add, int(paddle.distributed.ReduceOp.AVG): np.add},
    **{int(paddle.distributed.ReduceOp.MAX): np.maximum, int(paddle.distributed.ReduceOp.MIN): np.minimum},
}

Value = Array | list[Array] | None


@dataclass(frozen=True)
class Instruction:
    """One operator of a program. Values have an index each; None is an input or a result that isn't there."""

    name: str
    inputs: tuple[int | None, ...]
    results: tuple[int | None, ...]
    types: tuple[list[tuple[Any, tuple[int, ...]]], ...]  # of each result: dtype and shape, several for a vector
    attributes: Mapping[str, Any]
    operator: Operator | None  # None for combine and split, variables, and collectives
    supplied: frozenset[str] = frozenset()  # the keywords of the operator's function that are no attributes
    is_persistable: bool = False  # of a stored or loaded value: it outlives the step


@dataclass(frozen=True)
class Decoded:
    """A compiled program as instructions, and its inputs: the index of a value by the name of its variable."""

    arguments: Mapping[str, int]
    instructions: tuple[Instruction, ...]

    def variable_names(self) -> set[str]:
        """Return the names of the inputs, and of the results that outlive a step."""
        keys = {"builtin.parameter": "parameter_name", "pd_op.data": "name", "builtin.shadow_output": "output_name"}
        named = (one for one in self.instructions if one.name in keys and one.is_persistable)
        return {*self.arguments, *(str(one.attributes[keys[one.name]]) for one in named)}


_SUPPLIED = {"rounded", "new_seed"}  # keywords of an operator's function that are no attributes
_BUILTINS = {"builtin.combine", "builtin.split", "builtin.parameter", "builtin.shadow_output", "pd_op.data"}
_COLLECTIVES = {"pd_op.all_reduce", "pd_op.all_reduce_", "pd_op.all_gather", "pd_op.reduce_scatter"}
_POINT_TO_POINT = {"pd_op.send_v2", "pd_op.recv_v2"}


def decode(program: Any) -> Decoded:
    """Convert a program of Paddle's intermediate representation.

    Raises NotImplementedError for an operator that isn't in the table, and TypeError for an attribute that its function
    doesn't know.
    """
    numbers = count()
    index_of: defaultdict[str, int] = defaultdict(lambda: next(numbers))
    block = program.global_block()
    arguments = {name: index_of[value.id] for name, value in block.kwargs().items()}
    instructions = []
    for op in block.ops:
        operands = [op.operand_source(index) for index in range(op.num_operands())]
        results = [value if value.initialized() else None for value in op.results()]
        name = op.name()
        attributes = {
            key: value
            for key, value in op.attrs().items()
            if key not in _ANNOTATIONS and not key.startswith(_OWN_ATTRIBUTE)
        }
        operator, supplied = None, set()
        if name not in _BUILTINS | _COLLECTIVES | _POINT_TO_POINT:
            operator = OPERATORS.get(name)
            if operator is None:
                raise NotImplementedError(f"{name} isn't in the table of operators.py")
            supplied = _SUPPLIED & _keywords(operator)
            unknown = set(attributes) - _keywords(operator)
            if unknown:
                raise TypeError(f"{name} has attributes that operators.py doesn't know: {sorted(unknown)}")
        stored = operands if name == "builtin.shadow_output" else results
        instructions.append(
            Instruction(
                name,
                tuple(index_of[value.id] if value.initialized() else None for value in operands),
                tuple(None if value is None else index_of[value.id] for value in results),
                tuple([] if value is None else _tensor_types(value.type()) for value in results),
                attributes,
                operator,
                frozenset(supplied),
                is_persistable=len(stored) == 1 and stored[0] is not None and bool(stored[0].persistable),
            )
        )
    return Decoded(arguments, tuple(instructions))


def _tensor_types(type_: Any) -> list[tuple[Any, tuple[int, ...]]]:
    vector = type_.as_vec_type()
    elements = [type_] if vector is None else vector.as_list()
    return [(DTYPES[element.dtype], tuple(element.shape)) for element in elements]


@cache
def _keywords(operator: Operator) -> set[str]:
    if isinstance(operator.function, np.ufunc) or operator.function is np.where:
        return set()  # NumPy's keywords are others
    parameters = inspect.signature(operator.function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


# One rank


@dataclass(frozen=True)
class Request:
    """A collective that a rank has reached."""

    name: str
    attributes: Mapping[str, Any]
    value: Array | None  # None for a receive
    type_: tuple[Any, tuple[int, ...]] | None  # of the result; None for a send

    @property
    def ring(self) -> int:
        return int(self.attributes["ring_id"])

    def __str__(self) -> str:
        return f"{self.name} on ring {self.ring}"


Collectives = Generator[Request, Array | None, None]  # yields what a rank has reached, and is sent the result


@dataclass
class Rank:
    """The memory of one rank, and its execution of programs."""

    variables: MutableMapping[str, Array]  # what outlives a step, by name
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))  # for dropout

    def run(self, jobs: Sequence[tuple[Decoded, int]], feeds: Sequence[MutableMapping[str, Array]]) -> Collectives:
        """Execute programs, each for a micro-batch.

        `feeds` are the inputs of each micro-batch, by name. The results that aren't persistable are added to them: with
        several programs per step, one reads there what another left.
        """
        for program, micro_batch in jobs:
            yield from self._run(program, feeds[micro_batch])

    def _run(self, program: Decoded, local: MutableMapping[str, Array]) -> Collectives:
        values: dict[int, Value] = {
            index: local[name] if name in local else self.variables[name] for name, index in program.arguments.items()
        }
        for instruction in program.instructions:
            try:
                inputs = [None if index is None else values[index] for index in instruction.inputs]
            except KeyError:
                raise RuntimeError(f"{instruction.name} reads a value that no operator before it computes") from None
            if instruction.operator is not None:
                results = self._compute(instruction, inputs)
            elif instruction.name in _BUILTINS:
                results = self._builtin(instruction, inputs, local)
            else:
                results = yield from _communicate(instruction, inputs)
            for index, result in zip(instruction.results, results, strict=True):
                if index is not None:
                    values[index] = result

    def _builtin(
        self, instruction: Instruction, inputs: list[Any], local: MutableMapping[str, Array]
    ) -> Sequence[Value]:
        attributes, memory = instruction.attributes, self.variables if instruction.is_persistable else local
        match instruction.name:
            case "builtin.combine":
                return [inputs]
            case "builtin.split":
                return inputs[0]
            case "builtin.parameter":
                return [self.variables[attributes["parameter_name"]]]
            case "pd_op.data":
                return [memory[attributes["name"]]]
            case _:  # builtin.shadow_output
                memory[attributes["output_name"]] = inputs[0]
                return []

    def _compute(self, instruction: Instruction, inputs: list[Value]) -> list[Value]:
        operator, keywords = instruction.operator, dict(instruction.attributes)
        assert operator is not None
        if "new_seed" in instruction.supplied:
            keywords["new_seed"] = lambda: int(self.generator.integers(1, 2**31))
        if "rounded" in instruction.supplied:
            dtype = inputs[0].dtype
            keywords["rounded"] = lambda x: x.astype(dtype).astype(np.float32)
        results = operator.function(*map(_in_float32, inputs), **keywords)
        results = results if isinstance(results, tuple) else (results,)
        return [self._store(instruction, number, result, inputs) for number, result in enumerate(results)]

    @staticmethod
    def _store(instruction: Instruction, number: int, result: Value, inputs: list[Value]) -> Value:
        """Round a result to its declared dtype, and write it to its memory."""
        operator, types = instruction.operator, instruction.types[number]
        if result is None or not types:
            return None
        is_vector = isinstance(result, list)
        elements = result if is_vector else [result]
        if number in operator.always_float32:
            types = [(np.float32, shape) for _, shape in types]
        rounded = [element.astype(dtype) for element, (dtype, _) in zip(elements, types, strict=True)]
        if number in operator.in_place:
            memory = inputs[operator.in_place[number]]
            for target, element in zip(memory if is_vector else [memory], rounded, strict=True):
                expected = target.dtype, target.shape  # an accumulated gradient is sharded, and declared as a whole
                assert (element.dtype, element.shape) == expected, f"{instruction.name}: {element.shape} in {expected}"
                target[...] = element
            return memory
        for element, (_, shape) in zip(rounded, types, strict=True):
            assert element.shape == shape, f"{instruction.name}: {element.shape}, and the program declares {shape}"
        return rounded if is_vector else rounded[0]


def _in_float32(value: Value) -> Value:
    if isinstance(value, list):
        return [_in_float32(element) for element in value]
    return value.astype(np.float32) if value is not None and value.dtype in _LOW_PRECISION else value


def _communicate(instruction: Instruction, inputs: list[Value]) -> Generator[Request, Array | None, list[Value]]:
    value = inputs[0] if inputs else None
    type_ = instruction.types[0][0] if instruction.types else None
    result = yield Request(instruction.name, instruction.attributes, None if value is None else value.copy(), type_)
    if type_ is None:
        return []
    dtype, shape = type_
    assert (result.dtype, result.shape) == (dtype, shape), f"{instruction.name}: {result.dtype} {result.shape}"
    if instruction.name == "pd_op.all_reduce_":
        value[...] = result
        return [value]
    return [result]


# All ranks


def run_in_lock_step(tasks: Sequence[Collectives], rings: Sequence[Mapping[int, tuple[int, ...]]]) -> None:
    """Run one task per rank to its end. `rings`: for each rank, the ranks of each group by ring_id.

    (Two groups that have no rank in common may have the same ring_id.) Raises RuntimeError if ranks wait for each other
    forever, or disagree about a collective.
    """
    with np.errstate(all="ignore"):  # overflows and NaNs are part of float16's loss scaling
        _run_in_lock_step(tasks, rings)


def _run_in_lock_step(tasks: Sequence[Collectives], rings: Sequence[Mapping[int, tuple[int, ...]]]) -> None:
    waiting: dict[int, Request] = {}
    sent: defaultdict[tuple[int, int, int], deque[Array]] = defaultdict(deque)  # by ring_id, sender, receiver
    ready: deque[tuple[int, Array | None]] = deque((rank, None) for rank in range(len(tasks)))
    while ready:
        rank, answer = ready.popleft()
        try:
            request = tasks[rank].send(answer)
        except StopIteration:
            continue
        members = rings[rank][request.ring]
        if request.name == "pd_op.send_v2":  # without waiting for the receiver
            other = members[request.attributes["peer"]]
            channel = request.ring, rank, other
            sent[channel].append(request.value)
            ready.append((rank, None))
            if other in waiting and channel == _channel(waiting[other], other, rings[other]):
                del waiting[other]
                ready.append((other, sent[channel].popleft()))
        elif request.name == "pd_op.recv_v2":
            channel = _channel(request, rank, rings[rank])
            if sent[channel]:
                ready.append((rank, sent[channel].popleft()))
            else:
                waiting[rank] = request
        else:
            waiting[rank] = request
            arrived = [
                member for member in members if _is_in(waiting.get(member), request.ring, members, rings[member])
            ]
            if len(arrived) == len(members):
                results = _perform([waiting.pop(member) for member in members])
                ready.extend(zip(members, results, strict=True))
    if waiting:
        raise RuntimeError("deadlock: " + "; ".join(f"rank {rank} in {waiting[rank]}" for rank in sorted(waiting)))


def _channel(request: Request, rank: int, rings: Mapping[int, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """Return the ring_id, sender and receiver of a receive; None for another collective."""
    if request.name != "pd_op.recv_v2":
        return None
    return request.ring, rings[request.ring][request.attributes["peer"]], rank


def _is_in(request: Request | None, ring: int, members: tuple[int, ...], rings: Mapping[int, tuple[int, ...]]) -> bool:
    """Return whether a rank, with its groups `rings`, has reached a collective of this group."""
    if request is None or request.name in _POINT_TO_POINT:
        return False
    return request.ring == ring and rings[ring] == members


def _perform(requests: Sequence[Request]) -> list[Array]:
    """Perform a collective, and return the result of each rank, in the order of the group."""
    first = requests[0]
    for request in requests:
        signature = [(one.name, one.attributes, one.value.shape, one.value.dtype) for one in (first, request)]
        if signature[0] != signature[1]:
            raise RuntimeError(f"ranks of a group disagree: {signature[0]} and {signature[1]}")
    values, num_ranks = [request.value for request in requests], len(requests)
    if first.name == "pd_op.all_gather":
        gathered: np.ndarray = np.concatenate(values)
        return [gathered.copy() for _ in requests]
    total = _reduce(values, int(first.attributes.get("reduce_type", paddle.distributed.ReduceOp.SUM)))
    if first.name == "pd_op.reduce_scatter":
        return [part.copy() for part in np.split(total, num_ranks)]
    return [total.copy() for _ in requests]


def _reduce(values: Sequence[Array], kind: int) -> Array:
    """Reduce in the order of the ranks. In half precision each partial result is rounded."""
    dtype = values[0].dtype
    total = values[0]
    for value in values[1:]:
        total = _REDUCTIONS[kind](_in_float32(total), _in_float32(value)).astype(dtype)
    if kind == int(paddle.distributed.ReduceOp.AVG):
        total = (_in_float32(total) / len(values)).astype(dtype)
    return total
