"""Gradient buckets: few large collectives in place of one per parameter, overlapped with the backward pass.

Paddle 3.3.1 all-reduces each parameter's gradient by itself (199 of them in a ViT-B/16), does the same with ZeRO's
reduce-scatters and all-gathers, and runs all of them after the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import pir

from vit_static.optim.grad_clip import SQUARES
from vit_static.optim.muon import NEWTON_SCHULZ
from vit_static.program.ir import BACKWARD, UPDATE, is_read_by_marked, operator_role

# On a GPU the executor gives operators whose stream has another name a stream of their own, and makes the readers of
# their results wait.
STREAM = "vit_static_gradients"

Bucket = list[Any]  # operators


@dataclass(frozen=True)
class GradSyncConfig:
    """How gradients are exchanged: bucket size, overlap with the backward pass, dtype on the wire."""

    bucket_bytes: int
    overlap: bool
    dtype: str = ""  # empty: the gradients' own


def bucket_gradients(program: Any, sync: GradSyncConfig) -> None:
    """Combine the collectives of the update into buckets. Changes the program."""
    with paddle.static.program_guard(program), operator_role(UPDATE):
        _bucket_reductions(program, sync, ("pd_op.all_reduce", "pd_op.all_reduce_"), _all_reduce_bucket)
        _bucket_reductions(program, sync, ("pd_op.reduce_scatter",), _reduce_scatter_bucket)
        _bucket_gathers(program, sync.bucket_bytes)


class _Positions:
    """Positions of a program's operators."""

    def __init__(self, program: Any) -> None:
        self.operations = list(program.global_block().ops)
        self._positions = {operation.id(): position for position, operation in enumerate(self.operations)}

    def of(self, operation: Any) -> int:
        return self._positions[operation.id()]

    def of_source(self, operation: Any) -> int:
        """Return the position of the operator that computes the first operand; -1 for an input of the program."""
        source = operation.operand_source(0).get_defining_op()
        return -1 if source is None else self.of(source)


def _bucket_reductions(
    program: Any, sync: GradSyncConfig, names: tuple[str, ...], reduce_bucket: Callable[[Bucket, str], Any]
) -> None:
    """Combine reductions of one kind.

    A gradient that is partial over two axes of the mesh, such as that of a norm of single heads, is reduced twice: its
    second reduction is combined with other second ones.
    """
    reductions = [op for op in program.global_block().ops if op.name() in names and op.op_role == UPDATE]
    identities = {operation.id() for operation in reductions}

    def is_second(operation: Any) -> bool:
        source = operation.operand_source(0).get_defining_op()
        return source is not None and source.id() in identities

    second = [operation for operation in reductions if is_second(operation)]
    first = [operation for operation in reductions if not any(operation is other for other in second)]
    for group in filter(None, (first, second)):
        _bucket_independent(program, group, sync, reduce_bucket)


def _bucket_independent(
    program: Any, reductions: list[Any], sync: GradSyncConfig, reduce_bucket: Callable[[Bucket, str], Any]
) -> None:
    """Combine reductions that don't read each other's results.

    With overlap, a bucket of gradients from the backward pass starts when the last of them is computed. All others,
    such as accumulated gradients, start where the first of their bucket was.
    """
    positions = _Positions(program)
    early = [op for op in reductions if sync.overlap and _is_from_backward(op, positions)]
    late = [op for op in reductions if not any(op is other for other in early)]

    def is_computed_later(bucket: Bucket, operation: Any) -> bool:
        """Return whether the operand doesn't exist yet where the bucket's first reduction is."""
        return positions.of_source(operation) > positions.of(bucket[0])

    for bucket in _buckets(sorted(early, key=positions.of_source), sync.bucket_bytes):
        pir.set_insertion_point_after(positions.operations[max(map(positions.of_source, bucket))])
        # The readers of the result stay in the update, where the first of the reductions was.
        reduction = reduce_bucket(sorted(bucket, key=positions.of), sync.dtype)
        reduction.set_execution_stream(STREAM)
        reduction.set_scheduling_priority(0)
    for bucket in _buckets(late, sync.bucket_bytes, is_computed_later):
        if len(bucket) > 1 or sync.dtype:
            pir.set_insertion_point(bucket[0])
            reduce_bucket(bucket, sync.dtype)


def _is_from_backward(operation: Any, positions: _Positions) -> bool:
    position = positions.of_source(operation)
    return position >= 0 and positions.operations[position].op_role == BACKWARD


def _buckets(
    operations: Iterable[Any], bucket_bytes: int, must_split: Callable[[Bucket, Any], bool] = lambda *_: False
) -> list[Bucket]:
    """Group operators of the same ring and dtype, in their order, up to `bucket_bytes` per bucket.

    Values that must stay in float32 have buckets of their own.
    """
    full: list[Bucket] = []
    filling: dict[tuple[Any, ...], Bucket] = {}
    for operation in operations:
        value = operation.operand_source(0)
        attributes = operation.attrs()
        kind = (attributes["ring_id"], attributes.get("reduce_type"), str(value.dtype), _needs_float32(value))
        bucket = filling.setdefault(kind, [])
        size = sum(math.prod(op.operand_source(0).shape) for op in [*bucket, operation]) * value.element_size()
        if bucket and (size > bucket_bytes or must_split(bucket, operation)):
            full.append(bucket)
            bucket = filling[kind] = []
        bucket.append(operation)
    return [*full, *filling.values()]


def _needs_float32(value: Any) -> bool:
    """Return whether a value keeps its dtype on the wire: the sums of squares for clipping, and scalars."""
    source = value.get_defining_op()
    return math.prod(value.shape) == 1 or (source is not None and source.has_attr(SQUARES))


def _all_reduce_bucket(all_reduces: Bucket, dtype: str) -> Any:
    """Replace all-reduces by one at the insertion point, and return it."""
    values = [operation.operand_source(0) for operation in all_reduces]
    attributes, value_dtype = all_reduces[0].attrs(), values[0].dtype
    is_cast = bool(dtype) and not _needs_float32(values[0])
    flat = paddle.concat([value.reshape([-1]) for value in values])
    flat = flat.astype(dtype) if is_cast else flat
    total = paddle._C_ops.all_reduce(flat, attributes["ring_id"], attributes["reduce_type"])
    reduction = total.get_defining_op()
    pir.set_insertion_point(all_reduces[0])
    total = total.astype(value_dtype) if is_cast else total
    parts = paddle.split(total, [math.prod(value.shape) for value in values])
    _replace_results(all_reduces, [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)])
    return reduction


def _reduce_scatter_bucket(reduce_scatters: Bucket, dtype: str) -> Any:
    """Replace reduce-scatters by one at the insertion point, and return it."""
    attributes = reduce_scatters[0].attrs()
    num_ranks, value_dtype = attributes["nranks"], reduce_scatters[0].operand_source(0).dtype
    shapes = [operation.result(0).shape for operation in reduce_scatters]
    flat = paddle.concat([op.operand_source(0).reshape([num_ranks, -1]) for op in reduce_scatters], axis=1)
    part = paddle._C_ops.reduce_scatter(flat.astype(dtype) if dtype else flat, attributes["ring_id"], num_ranks)
    reduction = part.get_defining_op()
    pir.set_insertion_point(reduce_scatters[0])
    part = part.astype(value_dtype) if dtype else part
    parts = paddle.split(part, [math.prod(shape) for shape in shapes], axis=1)
    _replace_results(reduce_scatters, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
    return reduction


def _replace_results(operations: Bucket, values: list[Any]) -> None:
    for operation, value in zip(operations, values, strict=True):  # erasing the first moves the insertion point
        operation.result(0).replace_all_uses_with(value)
        operation.erase()


def _bucket_gathers(program: Any, bucket_bytes: int) -> None:
    """Combine the all-gathers of updated parameter shards, at the position of the bucket's last.

    The operators that read the other gathers' results, which store them, move behind it. Those of Muon's matrices stay
    as they are: updated parameters depend on them, and together they would take more memory.
    """
    gathers = [
        operation
        for operation in program.global_block().ops
        if operation.name() == "pd_op.all_gather"
        and operation.op_role == UPDATE
        and not is_read_by_marked(operation, NEWTON_SCHULZ)
    ]
    for bucket in _buckets(gathers, bucket_bytes):
        if len(bucket) < 2:
            continue
        positions = _Positions(program)
        last = positions.of(bucket[-1])
        next_operation = positions.operations[last + 1]
        readers = {position for gather in bucket for position in _all_readers(gather, positions) if position < last}
        num_ranks, ring = bucket[0].attrs()["nranks"], bucket[0].attrs()["ring_id"]
        shapes = [operation.result(0).shape for operation in bucket]
        pir.set_insertion_point_after(bucket[-1])
        flat = paddle.concat([operation.operand_source(0).reshape([1, -1]) for operation in bucket], axis=1)
        gathered = paddle._C_ops.all_gather(flat, ring, num_ranks)
        parts = paddle.split(gathered, [math.prod(shape) // num_ranks for shape in shapes], axis=1)
        parameters = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        for position in sorted(readers):
            positions.operations[position].move_before(next_operation)
        _replace_results(bucket, parameters)


def _all_readers(operation: Any, positions: _Positions) -> set[int]:
    """Return the positions of all operators that depend on an operator's results."""
    dependent: set[int] = set()
    pending = [operation]
    while pending:
        for result in pending.pop().results():
            for reader in result.all_used_ops():
                if positions.of(reader) not in dependent:
                    dependent.add(positions.of(reader))
                    pending.append(reader)
    return dependent
