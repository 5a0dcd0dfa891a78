"""What Paddle's passes leave to be done in a compiled program, as one rank executes it, for it to be quick and small.

Written for Paddle 3.3.1, on its intermediate representation (paddle.pir), which has no public documentation.
"""

from __future__ import annotations

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


def regather_params_in_backward(program: Any) -> None:
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


def fuse_linears(program: Any, with_gelu: bool) -> None:
    """Has cards add a linear layer's bias while they write its product, and sum its gradient while they write the
    weight's: Paddle's pass fused_gemm_epilogue_pass, which takes products in low precision alone.

    `with_gelu` also fuses an MLP's activation, which cuBLASLt computes by the tanh approximation, in training alone.
    """
    readers = []
    if not with_gelu:  # a second reader keeps the pass off what the activation reads
        with paddle.static.program_guard(program):
            for operation in [op for op in program.global_block().ops if op.name() == "pd_op.gelu"]:
                pir.set_insertion_point_after(operation)
                with role(operation.op_role):
                    readers.append(paddle._C_ops.assign(operation.operand_source(0)).get_defining_op())
    _run_pass(program, "fused_gemm_epilogue_pass")
    for reader in readers:
        reader.erase()


def fuse_dropouts(program: Any) -> None:
    """Has cards add a residual to a dropout's output while they write it: Paddle's fused_dropout_add_pass."""
    _run_pass(program, "fused_dropout_add_pass")


def _run_pass(program: Any, name: str) -> None:
    manager = pir.PassManager()
    manager.add_pass(name, {})
    manager.run(program)
    for operation in program.global_block().ops:
        if operation.op_role < 0 and operation.name().startswith("pd_op.fused_"):  # the pass gives them none
            operation.op_role = BACKWARD if operation.name().endswith("_grad") else FORWARD


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
