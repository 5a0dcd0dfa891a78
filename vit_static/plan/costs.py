"""Costs of a compiled program for the rank that executes it: collectives, memory, floating-point operations.

They are counted from the program's operators. The sizes of parameters, gradients, optimizer state and collectives are
exact. The activation peak is an estimate: every result lives from its operator to the last one that reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from paddle.distributed.auto_parallel.static.process_group import get_process_group

from vit_static.optim.muon import NEWTON_SCHULZ
from vit_static.optim.schedule_free import OFFSET
from vit_static.program.distillation import TEACHER_PREFIX
from vit_static.program.ir import BACKWARD, COLLECTIVE_KINDS, FORWARD, UPDATE, is_read_by_marked

_ROLES = {FORWARD: "forward", BACKWARD: "backward", UPDATE: "update"}
_ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
# Operators that give their operand another shape, or combine several, without memory of their own.
_ALIASES = {
    *("pd_op.reshape", "pd_op.reshape_grad", "pd_op.flatten", "pd_op.flatten_grad", "pd_op.squeeze"),
    *("pd_op.unsqueeze", "pd_op.unsqueeze_grad", "pd_op.assign", "builtin.combine", "builtin.split"),
    "builtin.shadow_output",
}
# Operators whose first operands, this many, are only read for their shape, so their values need not be kept.
_SHAPE_ONLY = {
    **dict.fromkeys(("pd_op.add_grad", "pd_op.subtract_grad"), 2),
    **dict.fromkeys(("pd_op.reshape_grad", "pd_op.flatten_grad", "pd_op.unsqueeze_grad", "pd_op.slice_grad"), 1),
    **dict.fromkeys(("pd_op.concat_grad", "pd_op.sum_grad", "pd_op.mean_grad", "pd_op.expand_grad"), 1),
    **dict.fromkeys(("pd_op.full_like", "pd_op.shape"), 1),
}


@dataclass(frozen=True)
class Collective:
    """One collective with other ranks."""

    kind: str  # all_reduce, all_gather, reduce_scatter, send, receive
    role: str  # forward, backward (both once per micro-batch), update (once per step)
    ranks: tuple[int, ...]
    num_bytes: int  # this rank's input; for a receive, its output

    def bytes_on_the_wire(self) -> float:
        """Return the bytes that this rank sends in the ring algorithm, which is the minimum.

        For an all-reduce over n ranks that is 2 (n-1)/n of its input.
        """
        n = len(self.ranks)
        share = {"all_reduce": 2 * (n - 1) / n, "all_gather": n - 1, "reduce_scatter": (n - 1) / n}
        return share.get(self.kind, 1) * self.num_bytes


@dataclass(frozen=True)
class Operator:
    """Memory traffic and floating-point operations of one operator."""

    role: str
    num_bytes: int
    num_flops: int


@dataclass(frozen=True)
class Costs:
    """Costs of one rank; memory in bytes."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int  # peak of one micro-batch, without gradients
    kept_activations: int  # of a micro-batch between its forward and its backward pass
    step_peak: int  # peak of gradients and activations together, as they are allocated and freed
    collectives: tuple[Collective, ...]
    operators: tuple[Operator, ...]
    teacher: int = 0  # parameters of a teacher, which are none of the model's

    def flops(self, num_micro_batches: int) -> int:
        """Return the floating-point operations per step."""
        return sum(op.num_flops * runs_per_step(op.role, num_micro_batches) for op in self.operators)

    def activations_in_flight(self, num_in_flight: int) -> int:
        """Return the peak of this many micro-batches: all but one hold only what they keep for the backward pass."""
        return self.activations + (num_in_flight - 1) * self.kept_activations

    def memory(self, num_in_flight: int) -> int:
        """Return the total peak, with this many micro-batches in flight."""
        return (
            self.parameters
            + self.teacher
            + self.optimizer_state
            + self.step_peak
            + (num_in_flight - 1) * self.kept_activations
        )


def runs_per_step(role: str, num_micro_batches: int) -> int:
    """Return how often an operator of this role runs per step."""
    return 1 if role == "update" else num_micro_batches


@dataclass(frozen=True)
class CostModel:
    """Counts a float32 program as if it ran in another precision."""

    # Bytes per value that O2 keeps in half precision: parameters, activations and their gradients. With 2, master
    # copies are added to the optimizer state.
    item_size: int = 4
    master_gradients: bool = True  # gradients are reduced and clipped in float32 in any case
    # The numbers of queries M and keys N, of the model and of its teacher, if a fused kernel computes attention
    # (FlashAttention, arXiv 2205.14135): the scores [..., M, N] are never in memory, and computed a second time in the
    # backward pass.
    fused_scores: tuple[tuple[int, int], ...] = ()
    newton_schulz_size: int = 4  # bytes per value of the matrices that Muon gathers and orthogonalizes
    # Ranks that hold the same part of the model: sums over them in the backward pass are of gradients.
    dp_ranks: tuple[int, ...] = ()

    def gradient_size(self) -> int:
        """Return the bytes per value of a gradient."""
        return 4 if self.master_gradients else self.item_size

    def num_bytes(self, value: Any, item_size: int) -> int:
        """Return the bytes of the part that this rank holds, with floats of `item_size` bytes."""
        if value.type().as_vec_type() or self.are_fused_scores(value):
            return 0
        dtype = str(value.dtype).rsplit(".", 1)[-1].lower()
        size = item_size if dtype == "float32" else _ITEM_SIZES[dtype]
        return math.prod(abs(length) for length in value.shape) * size

    def are_fused_scores(self, value: Any) -> bool:
        """Return whether a value holds attention scores that a fused kernel never stores."""
        if not self.fused_scores or value.type().as_vec_type() or len(value.shape) != 4:
            return False
        return tuple(value.shape[-2:]) in self.fused_scores


def collectives(program: Any, cost_model: CostModel = CostModel()) -> list[Collective]:
    """Return the collectives of a program of this rank, in order, before parallel/gloo.py replaces them."""
    counted = []
    for op in program.global_block().ops:
        kind = COLLECTIVE_KINDS.get(op.name())
        if kind is not None:
            ranks = tuple(get_process_group(op.attrs()["ring_id"]).ranks)
            value = op.result(0) if kind == "receive" else op.operand_source(0)
            # In the update, all-gathers are for parameters or Muon's matrices, others for gradients and their norms.
            is_over_dp = kind in ("all_reduce", "reduce_scatter") and tuple(sorted(ranks)) == cost_model.dp_ranks
            is_gradient = (_role(op) == "update" and kind != "all_gather") or (_role(op) == "backward" and is_over_dp)
            size = cost_model.gradient_size() if is_gradient else cost_model.item_size
            if kind == "all_gather" and is_read_by_marked(op, NEWTON_SCHULZ):
                size = cost_model.newton_schulz_size
            counted.append(Collective(kind, _role(op), ranks, cost_model.num_bytes(value, size)))
    return counted


def program_costs(program: Any, parameter_names: Iterable[str], cost_model: CostModel = CostModel()) -> Costs:
    """Return the costs of a training program of this rank.

    `parameter_names` are the layers' own (engine.structured_names).
    """
    ops = list(program.global_block().ops)
    names = set(parameter_names)
    stored = {op.result(0).name: op.result(0) for op in ops if _is_stored(op)}
    parameters = [value for name, value in stored.items() if name in names]
    teacher = [value for name, value in stored.items() if name.startswith(TEACHER_PREFIX)]
    accumulated = [
        value for name, value in program.global_block().kwargs().items() if name.endswith("@GRAD@MERGE")
    ]  # gradients that are summed over micro-batches
    num_accumulated_bytes = sum(cost_model.num_bytes(value, cost_model.gradient_size()) for value in accumulated)
    temporaries = _temporaries(ops, cost_model)
    return Costs(
        parameters=sum(cost_model.num_bytes(value, cost_model.item_size) for value in parameters),
        gradients=max(num_accumulated_bytes, temporaries.gradients),
        optimizer_state=_optimizer_state(stored, names, cost_model),
        activations=temporaries.activations,
        kept_activations=temporaries.kept_activations,
        step_peak=num_accumulated_bytes + temporaries.peak,
        collectives=tuple(collectives(program, cost_model)),
        operators=tuple(
            Operator(_role(op), _bytes_moved(op, cost_model), _flops(op, cost_model))
            for op in ops
            if op.name() not in _ALIASES
        ),
        teacher=sum(cost_model.num_bytes(value, cost_model.item_size) for value in teacher),
    )


def _optimizer_state(stored: dict[str, Any], parameter_names: set[str], cost_model: CostModel) -> int:
    """Return the bytes of the optimizer state, among all stored values by name."""
    state = [
        value
        for name, value in stored.items()
        if name not in parameter_names
        and "@GRAD" not in name
        and any(name.startswith(f"{parameter}_") for parameter in parameter_names)
    ]
    num_bytes = sum(cost_model.num_bytes(value, 4) for value in state)
    if cost_model.item_size < 4:  # a master copy of each parameter, sharded as its moment is
        moments = [value for value in state if re.search(f"_(moment1|velocity|{OFFSET})_", value.name)]
        num_bytes += sum(cost_model.num_bytes(value, 4) for value in moments)
    return num_bytes


def count_by_kind(
    counted: Iterable[Collective], num_micro_batches: int
) -> dict[tuple[str, str, tuple[int, ...]], list[int]]:
    """Return [count, bytes] per step, by kind, role and ranks."""
    totals: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for collective in counted:
        total = totals.setdefault((collective.kind, collective.role, collective.ranks), [0, 0])
        num_runs = runs_per_step(collective.role, num_micro_batches)
        total[0] += num_runs
        total[1] += num_runs * collective.num_bytes
    return totals


@dataclass(frozen=True)
class _Temporaries:
    """Peak bytes of values that live within a step: one micro-batch and the update after it."""

    gradients: int  # that the backward pass hands to the update
    activations: int  # all others, during forward and backward
    kept_activations: int  # those alive between forward and backward
    peak: int  # of all together


def _temporaries(ops: list[Any], cost_model: CostModel) -> _Temporaries:
    first_backward = next((i for i, op in enumerate(ops) if _role(op) == "backward"), len(ops))
    # Not the update's first operator: gradient buckets may start earlier (grad_buckets.py).
    after_backward = 1 + max((i for i, op in enumerate(ops) if _role(op) == "backward"), default=len(ops))
    change, activation_change = [0] * (len(ops) + 1), [0] * (len(ops) + 1)  # of the bytes alive, by operator
    gradients = num_kept_bytes = 0
    for value, first, last in _lifetimes(ops):
        is_gradient = first_backward <= first < after_backward <= last
        is_in_update = is_gradient or _role(ops[first]) == "update"
        size = cost_model.num_bytes(value, cost_model.gradient_size() if is_in_update else cost_model.item_size)
        for changes in [change] if is_in_update else [change, activation_change]:
            changes[first] += size
            changes[last + 1] -= size
        gradients += size if is_gradient else 0
        num_kept_bytes += size if first < first_backward <= last else 0
    return _Temporaries(gradients, max(accumulate(activation_change)), num_kept_bytes, max(accumulate(change)))


def _lifetimes(ops: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """Yield each temporary value with the position of its operator and of the last one that reads it."""
    owner: dict[int, int] = {}  # from an alias to the value whose memory it shares
    values: dict[int, Any] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, op in enumerate(ops):
        operands = [_identity(value) for value in _operands(op)]
        for operand in operands[_SHAPE_ONLY.get(op.name(), 0) :]:
            last[owner.get(operand, operand)] = index
        is_alias = op.name().endswith("_") or op.name() in _ALIASES
        for value in op.results():
            if not value.initialized():
                continue
            identity = _identity(value)
            if is_alias and operands:
                source = operands[-1 if op.name().endswith("_grad") else 0]
                owner[identity] = owner.get(source, source)
            elif not _is_stored(op) and not value.type().as_vec_type():
                values[identity], first[identity] = value, index
    for identity, value in values.items():
        yield value, first[identity], last.get(identity, first[identity])


def _is_stored(op: Any) -> bool:
    return op.name() == "builtin.parameter" or (op.name() == "pd_op.data" and op.result(0).persistable)


def _role(op: Any) -> str:
    return _ROLES.get(op.op_role, "forward")


def _operands(op: Any) -> list[Any]:
    values = (op.operand_source(index) for index in range(op.num_operands()))
    return [value for value in values if value is not None and value.initialized()]


def _identity(value: Any) -> int:
    return int(value.id, 16)


def _bytes_moved(op: Any, cost_model: CostModel) -> int:
    """Return the bytes that an operator reads and writes; 0 for collectives."""
    if op.name() in COLLECTIVE_KINDS or op.name() in ("pd_op.data", "builtin.parameter"):
        return 0
    values = [*_operands(op), *(value for value in op.results() if value.initialized())]
    size = 4 if _role(op) == "update" else cost_model.item_size
    if op.has_attr(NEWTON_SCHULZ):
        size = cost_model.newton_schulz_size
    return sum(cost_model.num_bytes(value, size) for value in values)


def _flops(op: Any, cost_model: CostModel) -> int:
    """Return the operations of a matrix product, a multiply-add counted as two.

    0 for all others: their time is bounded by their memory traffic.
    """
    name = op.name()
    if name in ("pd_op.matmul", "pd_op.fused_gemm_epilogue"):
        return _product_flops(op.operand_source(0), op.result(0), bool(op.attrs().get("transpose_x")))
    if name in ("pd_op.matmul_grad", "pd_op.fused_gemm_epilogue_grad"):
        # One product of the forward's size per gradient that is needed.
        is_fused = name == "pd_op.fused_gemm_epilogue_grad"
        out = op.operand_source(3 if is_fused else 2)
        forward = _product_flops(op.operand_source(0), out, bool(op.attrs().get("transpose_x")))
        num_products = sum(1 for value in op.results()[:2] if value.initialized())
        return forward * (cost_model.are_fused_scores(out) + num_products)
    return 0


def _product_flops(left: Any, out: Any, transpose_left: bool) -> int:
    return 2 * math.prod(out.shape) * left.shape[-2 if transpose_left else -1]
