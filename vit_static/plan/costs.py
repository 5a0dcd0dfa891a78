"""What a compiled program costs the rank that executes it: collectives, memory, operations. Read off its operators.

The sizes of parameters, gradients, optimizer state and collectives are the program's own and exact. The peak of the
activations is an estimate: every result lives from its operator to the last that reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from paddle.distributed.auto_parallel.static.process_group import get_process_group

_ROLES = {0: "forward", 1: "backward", 2: "update"}
_KINDS = {
    "pd_op.all_reduce": "all_reduce",
    "pd_op.all_reduce_": "all_reduce",
    "pd_op.all_gather": "all_gather",
    "pd_op.reduce_scatter": "reduce_scatter",
    "pd_op.send_v2": "send",
    "pd_op.recv_v2": "receive",
}
_ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
# What gives its operand another shape, or holds several together, and takes no memory of its own.
_ALIASES = {
    *("pd_op.reshape", "pd_op.reshape_grad", "pd_op.flatten", "pd_op.flatten_grad", "pd_op.squeeze"),
    *("pd_op.unsqueeze", "pd_op.unsqueeze_grad", "pd_op.assign", "builtin.combine", "builtin.split"),
    *("builtin.shadow_output", "pd_op.share_data_"),
}

# Whose operands, these many from the first, are there for their shape: nothing keeps what they held.
_SHAPE_ONLY = {
    **dict.fromkeys(("pd_op.add_grad", "pd_op.subtract_grad"), 2),
    **dict.fromkeys(("pd_op.reshape_grad", "pd_op.flatten_grad", "pd_op.unsqueeze_grad", "pd_op.slice_grad"), 1),
    **dict.fromkeys(("pd_op.concat_grad", "pd_op.sum_grad", "pd_op.mean_grad", "pd_op.expand_grad"), 1),
    **dict.fromkeys(("pd_op.full_like", "pd_op.shape"), 1),
}


@dataclass(frozen=True)
class Collective:
    """One exchange with other ranks. `num_bytes` is what this rank puts in; of a receive, what it gets."""

    kind: str  # all_reduce, all_gather, reduce_scatter, send, receive
    role: str  # forward, backward (both once a micro-batch), update (once a step)
    ranks: tuple[int, ...]
    num_bytes: int

    def bytes_on_the_wire(self) -> float:
        """What this rank sends in a ring's algorithm, which is the least: of n ranks, 2 (n-1)/n of an all-reduce."""
        n = len(self.ranks)
        share = {"all_reduce": 2 * (n - 1) / n, "all_gather": n - 1, "reduce_scatter": (n - 1) / n}
        return share.get(self.kind, 1) * self.num_bytes


@dataclass(frozen=True)
class Operator:
    """What an operator of the program moves and multiplies, in bytes and in operations."""

    role: str
    num_bytes: int
    num_flops: int


@dataclass(frozen=True)
class Costs:
    """Of one rank. Bytes; `forward_kept` is what a micro-batch's forward leaves for its backward."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int  # of one micro-batch at the peak, without gradients and what else is counted above
    forward_kept: int
    peak_of_a_step: int  # of all but parameters and optimizer state: gradients and activations as they come and go
    collectives: tuple[Collective, ...]
    operators: tuple[Operator, ...]

    def flops(self, num_micro_batches: int) -> int:
        return sum(op.num_flops * scale_costs(op.role, num_micro_batches) for op in self.operators)

    def activations_at_once(self, num_in_flight: int) -> int:
        """Of so many micro-batches in flight: all but one hold only what their forward has kept."""
        return self.activations + (num_in_flight - 1) * self.forward_kept

    def memory(self, num_in_flight: int) -> int:
        """Of all at the peak: what is kept between steps, and what a step adds to it."""
        return self.parameters + self.optimizer_state + self.peak_of_a_step + (num_in_flight - 1) * self.forward_kept


def scale_costs(role: str, num_micro_batches: int) -> int:
    """How often in a step an operator of this role runs."""
    return 1 if role == "update" else num_micro_batches


@dataclass(frozen=True)
class CostModel:
    """How a float32 program is counted for the precision that it would run in.

    `item_size`: of what O2 keeps in half precision: parameters, activations, their gradients. The master copies are
    then added to the optimizer's state. `master_gradients`: gradients are summed and clipped in float32 nevertheless.
    `fused_tokens`: attention's scores, [.., tokens, tokens], are taken as a fused kernel has them (FlashAttention,
    arXiv 2205.14135): never in memory, and multiplied once more in the backward.
    """

    item_size: int = 4
    master_gradients: bool = True
    fused_tokens: int | None = None

    def gradient_size(self) -> int:
        return 4 if self.master_gradients else self.item_size

    def num_bytes(self, value: Any, item_size: int) -> int:
        """Of the part that this rank holds, floats of `item_size`."""
        if value.type().as_vec_type() or self.are_fused_scores(value):
            return 0
        dtype = str(value.dtype).rsplit(".", 1)[-1].lower()
        size = item_size if dtype == "float32" else _ITEM_SIZES[dtype]
        return math.prod(abs(length) for length in value.shape) * size

    def are_fused_scores(self, value: Any) -> bool:
        if self.fused_tokens is None or value.type().as_vec_type() or len(value.shape) != 4:
            return False
        return list(value.shape[-2:]) == [self.fused_tokens, self.fused_tokens]


FLOAT32 = CostModel()


def collectives(program: Any, counting: CostModel = CostModel()) -> list[Collective]:
    """Those of a program of this rank, in its order; before cpu_collectives.py has replaced them."""
    found = []
    for op in program.global_block().ops:
        kind = _KINDS.get(op.name())
        if kind is not None:
            ranks = tuple(get_process_group(op.attrs()["ring_id"]).ranks)
            moved = op.result(0) if kind == "receive" else op.operand_source(0)
            # In the update parameters are gathered, all else are gradients and their norms.
            is_gradient = _role(op) == "update" and kind != "all_gather"
            size = counting.gradient_size() if is_gradient else counting.item_size
            found.append(Collective(kind, _role(op), ranks, counting.num_bytes(moved, size)))
    return found


def program_costs(program: Any, parameter_names: Iterable[str], counting: CostModel = CostModel()) -> Costs:
    """The costs of a training program of this rank; `parameter_names` are the layers' own (structured_names)."""
    ops = list(program.global_block().ops)
    names = set(parameter_names)
    stored = {op.result(0).name: op.result(0) for op in ops if _is_stored(op)}
    parameters = [value for name, value in stored.items() if name in names]
    state = [
        value
        for name, value in stored.items()
        if name not in names and "@GRAD" not in name and any(name.startswith(f"{own}_") for own in names)
    ]
    optimizer_state = sum(counting.num_bytes(value, 4) for value in state)
    if counting.item_size < 4:  # a master copy of each, split as its moment is
        optimizer_state += sum(counting.num_bytes(v, 4) for v in state if re.search("_(moment1|velocity)_", v.name))
    block = program.global_block()
    merged = sum(
        counting.num_bytes(value, counting.gradient_size())
        for name, value in block.kwargs().items()
        if name.endswith("@GRAD@MERGE")
    )
    found = _temporaries(ops, counting)
    return Costs(
        sum(counting.num_bytes(value, counting.item_size) for value in parameters),
        max(merged, found.gradients),
        optimizer_state,
        found.activations,
        found.forward_kept,
        merged + found.peak,
        tuple(collectives(program, counting)),
        tuple(
            Operator(_role(op), _bytes_moved(op, counting), _flops(op, counting))
            for op in ops
            if op.name() not in _ALIASES
        ),
    )


def by_kind(found: Iterable[Collective], num_micro_batches: int) -> dict[tuple[str, str, tuple[int, ...]], list[int]]:
    """Count and bytes a step, by kind, role and group."""
    table: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for collective in found:
        row = table.setdefault((collective.kind, collective.role, collective.ranks), [0, 0])
        repeated = scale_costs(collective.role, num_micro_batches)
        row[0] += repeated
        row[1] += repeated * collective.num_bytes
    return table


@dataclass(frozen=True)
class _Temporaries:
    """Bytes alive at a time, of a micro-batch and the update after it."""

    gradients: int  # what the backward hands over to the update
    activations: int  # the peak of the rest, through forward and backward
    forward_kept: int  # of it, what is alive between the two
    peak: int  # of all together


def _temporaries(ops: list[Any], counting: CostModel) -> _Temporaries:
    owner: dict[int, int] = {}  # an alias's memory is its operand's
    values: dict[int, Any] = {}
    born: dict[int, int] = {}
    last_read: dict[int, int] = {}
    first_backward = next((i for i, op in enumerate(ops) if _role(op) == "backward"), len(ops))
    # Not where the update's first operator stands: exchanges of gradients may begin earlier (buckets.py).
    after_backward = 1 + max((i for i, op in enumerate(ops) if _role(op) == "backward"), default=len(ops))
    for index, op in enumerate(ops):
        operands = [_identity(value) for value in _operands(op)]
        for operand in operands[_SHAPE_ONLY.get(op.name(), 0) :]:
            last_read[owner.get(operand, operand)] = index
        in_place = op.name().endswith("_") or op.name() in _ALIASES
        for value in op.results():
            if not value.initialized():
                continue
            identity = _identity(value)
            if in_place and operands:
                whose = operands[-1 if op.name().endswith("_grad") else 0]
                owner[identity] = owner.get(whose, whose)
            elif not _is_stored(op) and not value.type().as_vec_type():
                values[identity], born[identity] = value, index
    change_of_all, change_of_activations = [0] * (len(ops) + 1), [0] * (len(ops) + 1)
    gradients = kept = 0
    for identity, value in values.items():
        first, last = born[identity], last_read.get(identity, born[identity])
        is_gradient = first_backward <= first < after_backward <= last
        in_update = _role(ops[first]) == "update"
        size = counting.num_bytes(value, counting.gradient_size() if is_gradient or in_update else counting.item_size)
        changes = [change_of_all] if is_gradient or in_update else [change_of_all, change_of_activations]
        for change in changes:
            change[first] += size
            change[last + 1] -= size
        gradients += size if is_gradient else 0
        kept += size if first < first_backward <= last else 0
    return _Temporaries(gradients, max(accumulate(change_of_activations)), kept, max(accumulate(change_of_all)))


def _is_stored(op: Any) -> bool:
    return op.name() == "builtin.parameter" or (op.name() == "pd_op.data" and op.result(0).persistable)


def _role(op: Any) -> str:
    return _ROLES.get(op.op_role, "forward")


def _operands(op: Any) -> list[Any]:
    values = (op.operand_source(index) for index in range(op.num_operands()))
    return [value for value in values if value is not None and value.initialized()]


def _identity(value: Any) -> int:
    return int(value.id, 16)


def _bytes_moved(op: Any, counting: CostModel) -> int:
    if op.name() in _KINDS or op.name() in ("pd_op.data", "builtin.parameter"):
        return 0
    values = [*_operands(op), *(value for value in op.results() if value.initialized())]
    size = 4 if _role(op) == "update" else counting.item_size
    return sum(counting.num_bytes(value, size) for value in values)


def _flops(op: Any, counting: CostModel) -> int:
    """Of matrix products, the multiply-adds counted as two; the rest takes no longer than what it moves."""
    name = op.name()
    if name == "pd_op.matmul":
        return _product_flops(op.operand_source(0), op.result(0), bool(op.attrs().get("transpose_x")))
    if name == "pd_op.matmul_grad":
        # For each gradient that is asked for, a product of the same size as the forward's.
        out = op.operand_source(2)
        forward = _product_flops(op.operand_source(0), out, bool(op.attrs().get("transpose_x")))
        return forward * (counting.are_fused_scores(out) + sum(1 for value in op.results() if value.initialized()))
    return 0


def _product_flops(left: Any, out: Any, transpose_left: bool) -> int:
    return 2 * math.prod(out.shape) * left.shape[-2 if transpose_left else -1]
