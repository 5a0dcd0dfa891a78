"""Editing Paddle's intermediate representation: operator roles, insertion points, cloning.

Written for Paddle 3.3.1. `paddle.pir` has no public documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paddle import pir

FORWARD, BACKWARD, UPDATE = 0, 1, 2  # roles of operators
# Collectives by the names of their operators.
COLLECTIVE_KINDS = {
    "pd_op.all_reduce": "all_reduce",
    "pd_op.all_reduce_": "all_reduce",
    "pd_op.all_gather": "all_gather",
    "pd_op.reduce_scatter": "reduce_scatter",
    "pd_op.send_v2": "send",
    "pd_op.recv_v2": "receive",
}


_RESHAPING = {
    *("pd_op.all_gather", "pd_op.concat", "pd_op.split", "pd_op.split_with_num", "pd_op.transpose", "pd_op.reshape"),
    *("builtin.combine", "builtin.split"),
}


def is_read_by_marked(operation: Any, attribute: str) -> bool:
    """Return whether an operator with this attribute reads the results, gathered and reshaped or as they are."""
    pending = [operation]
    while pending:
        for result in pending.pop().results():
            for reader in result.all_used_ops():
                if reader.has_attr(attribute):
                    return True
                if reader.name() in _RESHAPING:
                    pending.append(reader)
    return False


@contextmanager
def operator_role(role: int) -> Iterator[None]:
    """Give this role to the operators that are added within the context."""
    previous = pir.get_op_role()
    pir.set_op_role(role)
    try:
        yield
    finally:
        pir.set_op_role(previous)


@contextmanager
def insert_before(operation: Any) -> Iterator[None]:
    """Add operators before this one, in its role, within the context."""
    pir.set_insertion_point(operation)
    with operator_role(operation.op_role):
        yield


def clone_for_backward(chain: list[Any], value: Any, readers: list[Any], operations: list[Any]) -> None:
    """Compute a value a second time for some of its readers in the backward pass.

    Clones `chain`, the operators that compute `value` from parameters or kept activations, in front of the first of
    `readers`, which then read the clone's result. `operations` are all of the program, in order.
    """
    reader_ids = {reader.id() for reader in readers}
    pir.set_insertion_point(next(operation for operation in operations if operation.id() in reader_ids))
    mapping = pir.IrMapping()
    unique = {operation.id(): operation for operation in chain}
    for operation in chain:
        for index in range(operation.num_operands()):
            source = operation.operand_source(index)
            if source.get_defining_op().id() not in unique:  # an input of the chain, which the clone shares
                mapping.add(source, source)
    for operation in unique.values():
        clone = operation.clone(mapping, pir.CloneOptions(False, True, True))
        clone.op_role = BACKWARD
    value.replace_grad_users_with(mapping.look_up(value), set(readers))
