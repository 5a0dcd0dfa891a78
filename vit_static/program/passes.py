"""Extra passes over the compiled program: aliases, ZeRO-3 re-gather, float32 gradients, fused layers and dropout.

pass_list.py says which of them apply, and in which order.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import pir
from paddle.distributed.auto_parallel.static.process_group import get_process_group

from vit_static.program.ir import BACKWARD, FORWARD, clone_for_backward, insert_before, operator_role

_ALIGNED_SIZE = 8  # elements of 2 bytes: Tensor Cores read 16 bytes at a time

# Operators that only gather, cut, reorder or convert parameters.
_GATHER_CHAIN = {
    *("pd_op.all_gather", "pd_op.concat", "pd_op.split", "pd_op.split_with_num", "pd_op.transpose", "pd_op.reshape"),
    *("pd_op.cast", "pd_op.assign", "pd_op.full", "pd_op.full_int_array", "builtin.split", "builtin.combine"),
}
_SUMS = ("pd_op.all_reduce", "pd_op.all_reduce_", "pd_op.reduce_scatter")
_MASTER_CAST = "master_grad_cast"  # Paddle's attribute of the casts of gradients to float32


def remove_aliases(program: Any) -> None:
    """Replace the results of `share_data_` by the values whose memory they share.

    Where Paddle reshards a value to placements with the same local part, it makes such an alias. Its in-place pass
    looks at each value's own readers, so it overwrites a value that is still read under its alias: in tensor-parallel
    and pipeline meshes, `1 - targets` replaced the targets of binary cross-entropy, whose gradient was then wrong.
    """
    for operation in list(program.global_block().ops):
        if operation.name() == "pd_op.share_data_":
            operation.result(0).replace_all_uses_with(operation.operand_source(0))
            operation.erase()


def regather_params_in_backward(program: Any) -> None:
    """Gather sharded parameters a second time in the backward pass, so that none stays gathered in between.

    This is the purpose of ZeRO stage 3; Paddle gathers each parameter once and keeps it for the backward pass.
    """
    operations = list(program.global_block().ops)
    chains: dict[str, list[Any]] = {}  # by value id: the operators that compute it from parameters alone, in order
    for operation in operations:
        if operation.op_role != FORWARD and operation.name() != "builtin.parameter":
            continue
        operands = [operation.operand_source(index) for index in range(operation.num_operands())]
        if operation.name() in _GATHER_CHAIN and all(operand.id in chains for operand in operands):
            chain = [op for operand in operands for op in chains[operand.id]] + [operation]
        elif operation.name() == "builtin.parameter" or (
            operation.name() == "pd_op.data" and operation.result(0).persistable
        ):
            chain = []
        else:
            continue
        chains.update({value.id: chain for value in operation.results()})
    backward_ids = {operation.id() for operation in operations if operation.op_role == BACKWARD}
    for operation in operations:
        for value in operation.results():
            chain = chains.get(value.id, [])
            if not any(op.name() == "pd_op.all_gather" for op in chain):
                continue
            readers = [op for op in value.all_used_ops() if op.id() in backward_ids]
            if readers:
                clone_for_backward(chain, value, readers, operations)


def sum_gradients_in(dtype: str, program: Any, dp_ranks: tuple[int, ...]) -> None:
    """Sum gradients over the data-parallel ranks in `dtype` (empty: float32), where Paddle does so in another.

    It does for a gradient whose shape changes, as that of the patch embedding, in ZeRO stage 3, and without master
    gradients. A `dtype` other than float32 is for the backward pass alone: buckets convert the sums of the update.
    """
    with paddle.static.program_guard(program):
        # Chosen before the loop erases operators: an erased one must not be read, not even for its name.
        sums = [operation for operation in program.global_block().ops if operation.name() in _SUMS]
        for operation in sums:
            if dtype and operation.op_role != BACKWARD:
                continue
            attributes, value, total = operation.attrs(), operation.operand_source(0), operation.result(0)
            is_over_dp = tuple(sorted(get_process_group(attributes["ring_id"]).ranks)) == dp_ranks
            if not is_over_dp or value.dtype == getattr(paddle, dtype or "float32"):
                continue
            with insert_before(operation):
                converted = paddle.cast(value, dtype or "float32")
                if operation.name() == "pd_op.reduce_scatter":
                    summed = paddle._C_ops.reduce_scatter(converted, attributes["ring_id"], attributes["nranks"])
                else:
                    summed = paddle._C_ops.all_reduce(converted, attributes["ring_id"], attributes["reduce_type"])
                for reader in total.all_used_ops():
                    if reader.name() == "pd_op.cast" and reader.result(0).dtype == summed.dtype:
                        reader.result(0).replace_all_uses_with(summed)
                        reader.erase()
                if total.all_used_ops():
                    total.replace_all_uses_with(paddle.cast(summed, value.dtype))
            operation.erase()


def cast_master_gradients_early(program: Any) -> None:
    """Cast each gradient to float32 behind the operator that computes it, as part of the backward pass.

    Paddle casts all of them after the backward pass, so that none could be exchanged before its end.
    """
    operations = list(program.global_block().ops)
    casts = [operation for operation in operations if operation.has_attr(_MASTER_CAST)]
    others = [operation for operation in operations if not operation.has_attr(_MASTER_CAST)]
    positions = {operation.id(): position for position, operation in enumerate(others)}
    for cast in casts:
        producer = cast.operand_source(0).get_defining_op()
        if producer.op_role == BACKWARD:
            cast.op_role = BACKWARD
            cast.move_before(others[positions[producer.id()] + 1])


def fuse_linears(program: Any, fuse_gelu: bool) -> None:
    """Add a linear layer's bias within its matrix product, and reduce the bias gradient within the weight gradient.

    Runs Paddle's fused_gemm_epilogue_pass, which only matches products in low precision. `fuse_gelu` also fuses the
    MLP's activation in training; cuBLASLt computes it by the tanh approximation. Layers whose numbers of inputs and
    outputs aren't multiples of 8 stay as they are, such as a head of 21,841 classes: cuBLASLt may have no algorithm
    with an epilogue for rows that don't start at multiples of 16 bytes.
    """
    operations = list(program.global_block().ops)
    unfused = [_value_between(operation) for operation in operations if _is_unaligned_linear(operation)]
    if not fuse_gelu:
        unfused += [operation.operand_source(0) for operation in operations if operation.name() == "pd_op.gelu"]
    extra_readers = []  # the pass leaves out operators with a value between them that has a second reader
    with paddle.static.program_guard(program):
        for value in unfused:
            pir.set_insertion_point_after(value.get_defining_op())
            with operator_role(value.get_defining_op().op_role):
                extra_readers.append(paddle._C_ops.assign(value).get_defining_op())
    _run_paddle_pass(program, "fused_gemm_epilogue_pass")
    for reader in extra_readers:
        reader.erase()


def _is_unaligned_linear(operation: Any) -> bool:
    """Return whether this is the product of a linear layer, or its gradient, with other than multiples of 8."""
    if operation.name() not in ("pd_op.matmul", "pd_op.matmul_grad"):
        return False
    weight_shape = operation.operand_source(1).shape
    return len(weight_shape) == 2 and not is_fused_linear(*weight_shape)


def is_fused_linear(num_inputs: int, num_outputs: int) -> bool:
    """Return whether `fuse_linears` fuses a linear layer with these sizes, or this part of it on a rank."""
    return num_inputs % _ALIGNED_SIZE == 0 and num_outputs % _ALIGNED_SIZE == 0


def _value_between(product: Any) -> Any:
    """Return the value between a product and the addition of the bias, or between the gradients of both."""
    return product.result(0) if product.name() == "pd_op.matmul" else product.operand_source(2)


def complete_norm_gradients(program: Any) -> None:
    """Let LayerNorm's gradient on a CPU compute those of scale and shift, too, where they are frozen.

    Without either of them Paddle 3.3.1's CPU kernel computes a wrong gradient of the input, and raises no error.
    """
    with paddle.static.program_guard(program):
        for operation in list(program.global_block().ops):
            if operation.name() != "pd_op.layer_norm_grad" or any(
                value.initialized() for value in operation.results()[1:]
            ):
                continue
            operands = [operation.operand_source(index) for index in range(operation.num_operands())]
            attributes = operation.attrs()
            with insert_before(operation):
                x_grad, *_ = paddle._C_ops.layer_norm_grad(
                    *operands, attributes["epsilon"], attributes["begin_norm_axis"]
                )
            operation.result(0).replace_all_uses_with(x_grad)
            operation.erase()


def fuse_dropouts(program: Any) -> None:
    """Add the residual within the dropout kernel, by Paddle's fused_dropout_add_pass."""
    _run_paddle_pass(program, "fused_dropout_add_pass")


def _run_paddle_pass(program: Any, name: str) -> None:
    manager = pir.PassManager()
    manager.add_pass(name, {})
    manager.run(program)
    for operation in program.global_block().ops:
        if operation.op_role < 0 and operation.name().startswith("pd_op.fused_"):  # Paddle's pass sets no role
            # A forward operator that is recomputed belongs to the backward pass, as what it reads does.
            is_backward = operation.name().endswith("_grad") or any(
                value.initialized() and value.get_defining_op().op_role == BACKWARD
                for value in operation.operands_source()
            )
            operation.op_role = BACKWARD if is_backward else FORWARD
