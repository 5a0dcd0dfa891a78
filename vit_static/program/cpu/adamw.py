"""AdamW with clipping and the moving average (EMA) of the weights, for all parameters, in one pass over memory.

The update is three chains of element-wise operations, each one oneDNN primitive, four with the average. They run one
after another on a tile of a parameter, which then is in the cache. Numbers that change with the step, such as the
clipping factor, are operands, so that the primitives are made once.

Notation as in optim/optimizers.py: g is the gradient before clipping, m and v are the moments, p the parameter.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from vit_static.program.cpu.elementwise import chain
from vit_static.program.cpu.onednn import Execution, Layout, Memory, Primitive, dense

TILE = 2**18  # elements: four or five arrays of 1 MB
_NUMBER = dense("float32", 1, 1)
_MIN_KEPT = 1e-12  # least part of a parameter that decay leaves; the update is divided by it
# Columns of the table of numbers that change with the step, a row per parameter.
_GRADIENT_TO_MOMENT1, _GRADIENT_TO_MOMENT2, _CORRECTION2, _RATE, _KEPT, _AVERAGE_DECAY = range(6)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the update. All fields after the first three are positions among the operands' addresses.

    `decay`: its weight-decay coefficient. The learning rate, the clipping factor, the powers of beta and the average's
    decay are single numbers.
    """

    length: int
    decay: float
    weight: int
    gradient: int
    moment1: int
    moment2: int
    power1: int
    power2: int
    learning_rate: int
    clip_factor: int | None = None
    average: int | None = None
    average_decay: int | None = None


def num_bytes(parameter: Parameter) -> int:
    """Return how many bytes an update of the parameter reads and writes: 7 numbers per element, 9 with the average."""
    return 4 * parameter.length * (7 if parameter.average is None else 9)


class AdamWUpdate:
    """The kernel of one update of all parameters. Call it with the addresses of the operands.

    It changes weights, moments, powers of beta and averages in place.
    """

    def __init__(self, parameters: Sequence[Parameter], beta1: float, beta2: float, epsilon: float) -> None:
        self._parameters = parameters
        self._betas = float(np.float32(beta1)), float(np.float32(beta2))
        self._powers = [parameter.power1 for parameter in parameters], [parameter.power2 for parameter in parameters]
        self._decays = np.array([parameter.decay for parameter in parameters])
        self._numbers = np.zeros((len(parameters), 6), np.float32)
        self._addresses: list[int] = []
        self._memories: defaultdict[int, list[tuple[Memory, int]]] = defaultdict(list)  # by operand, with their offsets
        self._executions: list[Execution] = []
        for row, parameter in enumerate(parameters):
            self._prepare(row, parameter, epsilon)

    def _prepare(self, row: int, parameter: Parameter, epsilon: float) -> None:
        numbers = [
            Memory(_NUMBER, self._numbers[row : row + 1, column : column + 1].ctypes.data)
            for column in range(self._numbers.shape[1])
        ]
        for start in range(0, parameter.length, TILE):
            length = min(TILE, parameter.length - start)
            tile = _tile(length)

            def part(position: int, tile: Layout = tile, start: int = start) -> Memory:
                memory = Memory(tile)
                self._memories[position].append((memory, 4 * start))
                return memory

            weight, gradient = part(parameter.weight), part(parameter.gradient)
            moment1, moment2 = part(parameter.moment1), part(parameter.moment2)
            beta1, beta2 = self._betas
            self._executions += [
                _moment1(length, beta1).on(gradient, numbers[_GRADIENT_TO_MOMENT1], moment1),
                _moment2(length, beta2).on(gradient, numbers[_GRADIENT_TO_MOMENT2], moment2),
                _weight(length, epsilon).on(
                    *(moment2, numbers[_CORRECTION2], moment1, numbers[_RATE], weight, numbers[_KEPT], weight)
                ),
            ]
            if parameter.average is not None:
                average = part(parameter.average)
                self._executions.append(_average(length).on(average, weight, numbers[_AVERAGE_DECAY], weight, average))

    def __call__(self, *addresses: int) -> None:
        self._move(list(addresses))
        self._set_numbers(addresses)
        for execute in self._executions:
            execute()

    def _move(self, addresses: list[int]) -> None:
        if addresses == self._addresses:
            return
        before = self._addresses or [0] * len(addresses)
        for position, memories in self._memories.items():
            if addresses[position] != before[position]:
                for memory, offset in memories:
                    memory.move(addresses[position] + offset)
        self._addresses = addresses

    def _set_numbers(self, addresses: Sequence[int]) -> None:
        """Compute the table for this step, and multiply the powers of beta by beta."""
        parameters, numbers = self._parameters, self._numbers
        powers = [
            np.array([_multiply(addresses[position], beta) for position in positions])
            for positions, beta in zip(self._powers, self._betas, strict=True)
        ]
        shared: dict[int | None, float] = {None: 1.0}
        for parameter in parameters:
            for position in (parameter.learning_rate, parameter.clip_factor, parameter.average_decay):
                if position is not None and position not in shared:
                    shared[position] = ctypes.c_float.from_address(addresses[position]).value
        rates = np.array([shared[parameter.learning_rate] for parameter in parameters])
        factors = np.array([shared[parameter.clip_factor] for parameter in parameters])
        kept = 1.0 - rates * self._decays
        kept[np.abs(kept) < _MIN_KEPT] = _MIN_KEPT
        with np.errstate(all="ignore"):  # after a gradient that isn't finite
            numbers[:, _GRADIENT_TO_MOMENT1] = (1.0 - self._betas[0]) * factors
            numbers[:, _GRADIENT_TO_MOMENT2] = np.sqrt(1.0 - self._betas[1]) * factors
            numbers[:, _CORRECTION2] = 1.0 / (1.0 - powers[1])
            numbers[:, _RATE] = -rates / (1.0 - powers[0]) / kept
            numbers[:, _KEPT] = kept
            numbers[:, _AVERAGE_DECAY] = [shared[parameter.average_decay] for parameter in parameters]


def _multiply(address: int, beta: float) -> float:
    """Multiply a power of beta in float32, in place; return the one before."""
    power = ctypes.c_float.from_address(address)
    before = power.value
    power.value = before * beta  # rounds the exact product
    return before


def _tile(length: int) -> Layout:
    return dense("float32", 1, length)


@cache
def _moment1(length: int, beta: float) -> Primitive:
    """Return the kernel of m = beta m + factor g. Operands: g, factor, m."""
    return chain("multiply", _tile(length), _NUMBER, [("add_to_result", beta)])


@cache
def _moment2(length: int, beta: float) -> Primitive:
    """Return the kernel of v = beta v + (factor g)^2. Operands: g, factor, v."""
    return chain("multiply", _tile(length), _NUMBER, [("square", 0.0), ("add_to_result", beta)])


@cache
def _weight(length: int, epsilon: float) -> Primitive:
    """Return the kernel of p = (m rate / (sqrt(v correction) + epsilon) + p) kept.

    Operands: v, correction, m, rate, p, kept, p.
    """
    tile = _tile(length)
    after = [("square_root", 0.0), ("plus", epsilon), ("reciprocal", 0.0)]
    binary = [("multiply", tile), ("multiply", _NUMBER), ("add", tile), ("multiply", _NUMBER)]
    return chain("multiply", tile, _NUMBER, [*after, *binary])


@cache
def _average(length: int) -> Primitive:
    """Return the kernel of a = (a - p) decay + p. Operands: a, p, decay, p, a."""
    tile = _tile(length)
    return chain("subtract", tile, tile, [("multiply", _NUMBER), ("add", tile)])
