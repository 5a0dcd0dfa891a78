"""What Paddle's passes leave to be done in a compiled program, as one rank executes it, for it to be quick and small.

Written for Paddle 3.3.1, on its intermediate representation (paddle.pir), which has no public documentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import pir

FORWARD, BACKWARD, UPDATE = 0, 1, 2  # roles of operators
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
        if operation.op_role != FORWARD and operation.name() != "builtin.parameter":
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
    backward = {operation.id() for operation in operations if operation.op_role == BACKWARD}
    for operation in operations:
        for value in operation.results():
            chain = gathering.get(value.id, [])
            if not any(op.name() == "pd_op.all_gather" for op in chain):
                continue
            readers = [op for op in value.all_used_ops() if op.id() in backward]
            if readers:
                clone_before(chain, value, readers, operations)


def clone_before(chain: list[Any], value: Any, readers: list[Any], operations: list[Any]) -> None:
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
        copy.op_role = BACKWARD
    value.replace_grad_users_with(copies.look_up(value), set(readers))


def fuse_all_reduces(program: Any, bucket_bytes: int) -> None:
    """Sums gradients over the ranks together, in buckets of so many bytes, where Paddle sums them one by one."""
    operations = list(program.global_block().ops)
    index_of = {operation.id(): index for index, operation in enumerate(operations)}
    buckets: dict[tuple[Any, ...], list[Any]] = {}  # the open one of each kind
    full = []
    for operation in operations:
        if operation.name() not in ("pd_op.all_reduce", "pd_op.all_reduce_") or operation.op_role != UPDATE:
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
    with paddle.static.program_guard(program), role(UPDATE):
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
def before(operation: Any) -> Iterator[None]:
    """Inside, operators are added before this one, in its role."""
    pir.set_insertion_point(operation)
    with role(operation.op_role):
        yield


@contextmanager
def role(role: int) -> Iterator[None]:
    """Inside, operators that are added get this role."""
    before = pir.get_op_role()
    pir.set_op_role(role)
    try:
        yield
    finally:
        pir.set_op_role(before)
