"""The update's exchanges between ranks put together in buckets, and begun while the backward still computes.

Paddle 3.3.1 sums each parameter's gradient by itself (199 of them in a ViT-B/16), scatters and gathers ZeRO's parts one
by one, and does all of it after the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import pir

from vit_static.optim.grad_clip import SQUARES
from vit_static.program.passes import BACKWARD, UPDATE, role

# On a card the executor gives what is on a stream of another name a stream of its own, and has those wait that read
# its results.
STREAM = "vit_static_gradients"

Bucket = list[Any]  # operators


@dataclass(frozen=True)
class GradSyncConfig:
    """How gradients are exchanged: so many bytes at a time, while the backward runs or after it, and in which dtype
    (empty: their own)."""

    bucket_bytes: int
    overlap: bool
    dtype: str = ""


def bucket_gradients(program: Any, exchange: GradSyncConfig) -> None:
    """Changes a program as one rank executes it, before it is split into jobs."""
    with paddle.static.program_guard(program), role(UPDATE):
        _fuse_sums(program, exchange, ("pd_op.all_reduce", "pd_op.all_reduce_"), _sum_together)
        _fuse_sums(program, exchange, ("pd_op.reduce_scatter",), _scatter_together)
        _fuse_gathers(program, exchange.bucket_bytes)


class _Places:
    """Where a program's operators stand."""

    def __init__(self, program: Any) -> None:
        self.operations = list(program.global_block().ops)
        self._places = {operation.id(): place for place, operation in enumerate(self.operations)}

    def of(self, operation: Any) -> int:
        return self._places[operation.id()]

    def of_source(self, operation: Any) -> int:
        """Where what it reads is made; -1 for what is there from the beginning."""
        source = operation.operand_source(0).get_defining_op()
        return -1 if source is None else self.of(source)


def _fuse_sums(
    program: Any, exchange: GradSyncConfig, names: tuple[str, ...], together: Callable[[Bucket, str], Any]
) -> None:
    """Puts exchanges of one kind together: those of gradients that the backward makes after the last of a bucket is
    made, others, such as those of accumulated gradients, where the bucket's first was."""
    places = _Places(program)
    exchanges = [op for op in places.operations if op.name() in names and op.op_role == UPDATE]
    early = [
        op
        for op in exchanges
        if exchange.overlap and (place := places.of_source(op)) >= 0 and places.operations[place].op_role == BACKWARD
    ]
    late = [op for op in exchanges if not any(op is other for other in early)]

    def is_too_late(bucket: Bucket, operation: Any) -> bool:
        """What is exchanged must be there where the bucket's first is."""
        return places.of_source(operation) > places.of(bucket[0])

    for bucket in _buckets(sorted(early, key=places.of_source), exchange.bucket_bytes):
        pir.set_insertion_point_after(places.operations[max(map(places.of_source, bucket))])
        # What comes of it stays in the update, where the first of them stood.
        exchanged = together(sorted(bucket, key=places.of), exchange.dtype)
        exchanged.set_execution_stream(STREAM)
        exchanged.set_scheduling_priority(0)
    for bucket in _buckets(late, exchange.bucket_bytes, is_too_late):
        if len(bucket) > 1 or exchange.dtype:
            pir.set_insertion_point(bucket[0])
            together(bucket, exchange.dtype)


def _buckets(
    operations: Iterable[Any], bucket_bytes: int, apart: Callable[[Bucket, Any], bool] = lambda *_: False
) -> list[Bucket]:
    """Operators of one ring and dtype together, in their order, as many as fit; what stays precise by itself."""
    full: list[Bucket] = []
    filling: dict[tuple[Any, ...], Bucket] = {}
    for operation in operations:
        value = operation.operand_source(0)
        given = operation.attrs()
        kind = (given["ring_id"], given.get("reduce_type"), str(value.dtype), _is_precise(value))
        bucket = filling.setdefault(kind, [])
        size = sum(math.prod(op.operand_source(0).shape) for op in [*bucket, operation]) * value.element_size()
        if bucket and (size > bucket_bytes or apart(bucket, operation)):
            full.append(bucket)
            bucket = filling[kind] = []
        bucket.append(operation)
    return [*full, *filling.values()]


def _is_precise(value: Any) -> bool:
    """Whether it stays in float32 on its way: the sums of squares that clipping needs, and single numbers."""
    made_by = value.get_defining_op()
    return math.prod(value.shape) == 1 or (made_by is not None and made_by.has_attr(SQUARES))


def _sum_together(all_reduces: Bucket, dtype: str) -> Any:
    """One all-reduce, at the insertion point, in the place of several; the operator."""
    values = [operation.operand_source(0) for operation in all_reduces]
    given, own_dtype = all_reduces[0].attrs(), values[0].dtype
    is_lowered = bool(dtype) and not _is_precise(values[0])
    flat = paddle.concat([value.reshape([-1]) for value in values])
    total = paddle._C_ops.all_reduce(flat.astype(dtype) if is_lowered else flat, given["ring_id"], given["reduce_type"])
    exchange = total.get_defining_op()
    pir.set_insertion_point(all_reduces[0])
    total = total.astype(own_dtype) if is_lowered else total
    parts = paddle.split(total, [math.prod(value.shape) for value in values])
    _stand_in(all_reduces, [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)])
    return exchange


def _scatter_together(reduce_scatters: Bucket, dtype: str) -> Any:
    """One reduce-scatter, at the insertion point, in the place of several; the operator."""
    given = reduce_scatters[0].attrs()
    num_ranks, own_dtype = given["nranks"], reduce_scatters[0].operand_source(0).dtype
    shapes = [operation.result(0).shape for operation in reduce_scatters]
    flat = paddle.concat([op.operand_source(0).reshape([num_ranks, -1]) for op in reduce_scatters], axis=1)
    part = paddle._C_ops.reduce_scatter(flat.astype(dtype) if dtype else flat, given["ring_id"], num_ranks)
    exchange = part.get_defining_op()
    pir.set_insertion_point(reduce_scatters[0])
    part = part.astype(own_dtype) if dtype else part
    parts = paddle.split(part, [math.prod(shape) for shape in shapes], axis=1)
    _stand_in(reduce_scatters, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
    return exchange


def _stand_in(operations: Bucket, values: list[Any]) -> None:
    for operation, value in zip(operations, values, strict=True):  # the insertion point goes with the first
        operation.result(0).replace_all_uses_with(value)
        operation.erase()


def _fuse_gathers(program: Any, bucket_bytes: int) -> None:
    """Gathers parameters that were updated in parts together, where the last of a bucket was; what is done with the
    others, which is to store them, comes after that."""
    gathers = [op for op in program.global_block().ops if op.name() == "pd_op.all_gather" and op.op_role == UPDATE]
    for bucket in _buckets(gathers, bucket_bytes):
        if len(bucket) < 2:
            continue
        places = _Places(program)
        last = places.of(bucket[-1])
        behind = places.operations[last + 1]
        readers = sorted({place for gather in bucket for place in _all_readers(gather, places) if place < last})
        num_ranks, ring = bucket[0].attrs()["nranks"], bucket[0].attrs()["ring_id"]
        shapes = [operation.result(0).shape for operation in bucket]
        pir.set_insertion_point_after(bucket[-1])
        flat = paddle.concat([operation.operand_source(0).reshape([1, -1]) for operation in bucket], axis=1)
        whole = paddle._C_ops.all_gather(flat, ring, num_ranks)
        parts = paddle.split(whole, [math.prod(shape) // num_ranks for shape in shapes], axis=1)
        wholes = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        for place in readers:
            places.operations[place].move_before(behind)
        _stand_in(bucket, wholes)


def _all_readers(operation: Any, places: _Places) -> set[int]:
    """Where stands what reads an operator's results, or results of those that do."""
    found: set[int] = set()
    waiting = [operation]
    while waiting:
        for result in waiting.pop().results():
            for reader in result.all_used_ops():
                if places.of(reader) not in found:
                    found.add(places.of(reader))
                    waiting.append(reader)
    return found
