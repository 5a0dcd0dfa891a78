"""One operator for the update of all parameters, in place of Paddle's AdamW for each, with clipping and the EMA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import paddle

from vit_static.optim.grad_clip import CLIPPED_GRADIENT
from vit_static.program.cpu.adamw import AdamWUpdate, Parameter, num_bytes
from vit_static.program.cpu.custom_ops import add_in_place_op
from vit_static.program.cpu.patterns import is_read
from vit_static.program.cpu.simplify import remove_unread
from vit_static.program.ir import insert_before

_NUM_BYTES = "vit_static_update_bytes"  # attribute of the operator
_SETTINGS = {
    "lazy_mode": False,
    "multi_precision": False,
    "use_global_beta_pow": False,
    "amsgrad": False,
    "lr_ratio": 1,
}
# Positions of adamw_'s operands; those of the master copy, the largest second moment and `skip_update` are empty.
_WEIGHT, _GRADIENT, _LEARNING_RATE, _MOMENT1, _MOMENT2, _POWER1, _POWER2 = 0, 1, 2, 3, 4, 6, 7
_EMPTY, _BETA1, _BETA2, _EPSILON = (5, 8, 9), 10, 11, 12


@dataclass(frozen=True)
class _Average:
    """The average of a weight, its decay, and the operators that update it."""

    value: Any
    decay: Any
    operations: list[Any]


@dataclass(frozen=True)
class _Update:
    """One of Paddle's AdamW operators, and what belongs to it."""

    operation: Any
    settings: tuple[float, float, float]  # both betas and epsilon
    gradient: Any  # before clipping
    clip_factor: Any
    average: _Average | None

    def operand(self, index: int) -> Any:
        return self.operation.operand_source(index)


def fuse_update(program: Any) -> None:
    """Replace the operators of AdamW's update, of clipping and of the EMA by one (adamw.py). Changes the program.

    Parameters in half precision, which have master copies, keep Paddle's operator.
    """
    operations = list(program.global_block().ops)
    positions = {operation.id(): position for position, operation in enumerate(operations)}
    updates = [_match(operation, positions) for operation in operations if operation.name() == "pd_op.adamw_"]
    fused = [update for update in updates if update is not None]
    for settings in dict.fromkeys(update.settings for update in fused):
        _fuse([update for update in fused if update.settings == settings], operations)
    with paddle.static.program_guard(program):
        remove_unread(program)


def update_bytes(program: Any) -> int:
    """Return how many bytes a compiled program's update reads and writes as one operator; 0 if it isn't one."""
    operations = program.global_block().ops
    return sum(int(operation.str_attr(_NUM_BYTES)) for operation in operations if operation.has_attr(_NUM_BYTES))


def _match(operation: Any, positions: dict[int, int]) -> _Update | None:
    """Return the update that an operator computes, or None if it isn't AdamW in float32."""
    attributes = operation.attrs()
    operands = operation.operands_source()
    if any(attributes[name] != value for name, value in _SETTINGS.items()):
        return None
    if any(operands[index].initialized() for index in _EMPTY):
        return None
    tensors = [operands[index] for index in (_WEIGHT, _GRADIENT, _MOMENT1, _MOMENT2)]
    constants = [operands[index].get_defining_op() for index in (_BETA1, _BETA2, _EPSILON)]
    if any(value.dtype != paddle.float32 for value in tensors) or any(op.name() != "pd_op.full" for op in constants):
        return None
    if any(is_read(result) for result in operation.results()[1:]):
        return None
    gradient, factor = operands[_GRADIENT], None
    clip = gradient.get_defining_op()
    if clip.name() == "pd_op.multiply" and clip.has_attr(CLIPPED_GRADIENT):
        gradient, factor = clip.operand_source(0), clip.operand_source(1)
    average = _average_of(operation)
    later = [] if average is None else [op.id() for op in average.operations]
    if any(
        positions[op.id()] > positions[operation.id()] and op.id() not in later for op in operands[0].all_used_ops()
    ):
        return None  # would read the weight before its update
    beta1, beta2, epsilon = (constant.attrs()["value"] for constant in constants)
    return _Update(operation, (beta1, beta2, epsilon), gradient, factor, average)


def _average_of(operation: Any) -> _Average | None:
    """Return the average that follows an update (optim/ema.py): average = w + decay * (average - w)."""
    for weight in (operation.result(0), operation.operand_source(_WEIGHT)):
        for difference in weight.all_used_ops():
            chain = [difference, *_only_readers(difference, ("pd_op.multiply", "pd_op.add", "pd_op.assign_out_"))]
            if difference.name() != "pd_op.subtract" or len(chain) != 4:
                continue
            product, total, stored = chain[1:]
            value, decay = difference.operand_source(0), product.operand_source(0)
            is_average = (
                difference.operand_source(1).is_same(weight)
                and total.operand_source(0).is_same(weight)
                and stored.operand_source(1).is_same(value)
                and product.operand_source(1).is_same(difference.result(0))
                and math.prod(decay.shape) == 1
                and not is_read(stored.result(0))
            )
            if is_average and operation.op_role == difference.op_role:
                return _Average(value, decay, chain)
    return None


def _only_readers(operation: Any, names: Iterable[str]) -> list[Any]:
    """Return the operators with these names, each the only reader of the one before; fewer if there is another."""
    chain = []
    for name in names:
        readers = operation.result(0).all_used_ops()
        if len(readers) != 1 or readers[0].name() != name:
            break
        operation = readers[0]
        chain.append(operation)
    return chain


def _fuse(updates: list[_Update], operations: list[Any]) -> None:
    """Replace updates by one operator where the last of them is; what reads their results moves behind it."""
    averages = [operation for update in updates if update.average for operation in update.average.operations]
    _move_readers(updates, averages, operations)
    inputs: list[Any] = []
    positions: dict[int, int] = {}  # by value id

    def position(value: Any) -> int:
        if value.id not in positions:
            positions[value.id] = len(inputs)
            inputs.append(value)
        return positions[value.id]

    parameters = [_parameter(update, position) for update in updates]
    last = updates[-1].operation
    for operation in reversed(averages):
        operation.erase()
    results = [update.operation.result(0) for update in updates]
    changed = [parameter.weight for parameter, result in zip(parameters, results, strict=True) if is_read(result)]
    with insert_before(last):
        new_results = add_in_place_op("adamw", AdamWUpdate(parameters, *updates[0].settings), inputs, changed)
    new_results[0].get_defining_op().set_str_attr(_NUM_BYTES, str(sum(map(num_bytes, parameters))))
    for result, new_result in zip(filter(is_read, results), new_results, strict=bool(changed)):
        result.replace_all_uses_with(new_result)
    for update in updates:
        update.operation.erase()


def _parameter(update: _Update, position: Any) -> Parameter:
    attributes, average = update.operation.attrs(), update.average
    return Parameter(
        length=math.prod(update.operand(_WEIGHT).shape),
        decay=attributes["coeff"] if attributes["with_decay"] else 0.0,
        weight=position(update.operand(_WEIGHT)),
        gradient=position(update.gradient),
        moment1=position(update.operand(_MOMENT1)),
        moment2=position(update.operand(_MOMENT2)),
        power1=position(update.operand(_POWER1)),
        power2=position(update.operand(_POWER2)),
        learning_rate=position(update.operand(_LEARNING_RATE)),
        clip_factor=None if update.clip_factor is None else position(update.clip_factor),
        average=None if average is None else position(average.value),
        average_decay=None if average is None else position(average.decay),
    )


def _move_readers(updates: list[_Update], averages: list[Any], operations: list[Any]) -> None:
    """Move the operators that depend on results of the updates behind the last update."""
    replaced = {operation.id() for operation in [*averages, *(update.operation for update in updates)]}
    dependent = {update.operation.result(0).id for update in updates}
    index = next(index for index, op in enumerate(operations) if op.id() == updates[-1].operation.id())
    for operation in operations[:index]:
        operands = [value for value in operation.operands_source() if value.initialized()]
        if operation.id() not in replaced and any(value.id in dependent for value in operands):
            dependent |= {result.id for result in operation.results()}
            operation.move_before(operations[index + 1])
