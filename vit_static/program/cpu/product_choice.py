"""Choice between oneDNN and MKLML for each shape of a matrix product, by measuring both on this machine.

Both round differently, so a run keeps its choices: they are cached by CPU, library versions and number of threads, are
the same on all ranks, and are stored in checkpoints.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.checkpoint.progress import KernelRecord
from vit_static.common.cpu import cpu_model, max_cpu_isa, onednn_max_cpu_isa
from vit_static.common.io import cache_dir, write_json
from vit_static.program.cpu import primitives, sgemm
from vit_static.program.cpu.onednn import Layout, library_version
from vit_static.program.cpu.primitives import MAX_PRIMITIVES

ONEDNN, MKLML = "onednn", "mklml"
_FORMAT = 1
_MAX_MACHINES = 50  # entries of the cache file
_MIN_FLOP = 2**24  # of a product that is measured; those below take less than a millisecond
_MIN_GAIN = 1.1  # speed of MKLML relative to oneDNN from which it is chosen: below, noise would decide
_ROUNDS, _ROUND_S = 9, 0.003
_BUDGET_S = 2.0  # of all measurements of a process together


class Product:
    """A product out = (a @ b) * factor of matrices that either library can compute; call it with their addresses.

    oneDNN computes it until `Choices.settle` has chosen.
    """

    def __init__(self, a: Layout, b: Layout, out: Layout, factor: float) -> None:
        (rows, depth), columns = a.shape, b.shape[1]
        orders = "".join("t" if layout.strides[0] < layout.strides[1] else "n" for layout in (a, b))
        self.key = f"{rows}x{depth}x{columns} {orders}"
        self.flop = 2 * rows * depth * columns
        self.kernels: dict[str, Callable[[int, int, int], None]] = {ONEDNN: primitives.matmul(a, b, out, factor=factor)}
        other = sgemm.product(a, b, out, factor)
        if other is not None and self.flop >= _MIN_FLOP:
            self.kernels[MKLML] = other
        self.sizes = [_num_elements(layout) for layout in (a, b, out)]
        self._run = self.kernels[ONEDNN]

    def __call__(self, a: int, b: int, out: int) -> None:
        self._run(a, b, out)

    def use(self, library: str) -> None:
        """Compute it by this library from now on."""
        self._run = self.kernels[library]

    def measure(self) -> dict[str, float]:
        """Return the shortest seconds per product of each library, which take turns."""
        operands = [np.ones(size, np.float32) for size in self.sizes]
        addresses = [operand.ctypes.data for operand in operands]
        seconds = dict.fromkeys(self.kernels, float("inf"))
        for _ in range(_ROUNDS):
            for library, run in self.kernels.items():
                started, calls = time.perf_counter(), 0
                while calls == 0 or time.perf_counter() - started < _ROUND_S:
                    run(*addresses)
                    calls += 1
                seconds[library] = min(seconds[library], (time.perf_counter() - started) / calls)
        return seconds


@lru_cache(MAX_PRIMITIVES)
def product(a: Layout, b: Layout, out: Layout, factor: float) -> Product:
    """Return the product for these layouts, the same object each time."""
    made = Product(a, b, out, factor)
    choices.add(made)
    return made


class Choices:
    """The library of each product of this process, by the product's key."""

    def __init__(self) -> None:
        self._pending: list[Product] = []
        self._library: dict[str, str] = {}
        self._seconds_left = _BUDGET_S
        self._used: dict[str, str] = {}  # of the products that the programs of all ranks have

    def add(self, made: Product) -> None:
        """Choose for a product at the next `settle`, if both libraries can compute it."""
        if MKLML in made.kernels:
            self._pending.append(made)

    def record(self) -> KernelRecord | None:
        """Return the choices of all programs so far; None if there are none."""
        return KernelRecord(_machine(), dict(self._used)) if self._used else None

    def keep(self, record: KernelRecord | None) -> None:
        """Keep the choices of an earlier process of the same run, unless it ran on another kind of machine."""
        if record is not None and record.machine == _machine():
            self._library.update(_valid(record.libraries))

    def settle(self, all_gather_object: Callable[[Any], list[Any]]) -> None:
        """Choose a library for each product that was added. All ranks call this together, and choose the same.

        Known choices are kept: those of the run, then those that the cache file has for this machine. The others are
        measured, the smallest first, for two seconds per process; what is left then stays with oneDNN.
        """
        pending, self._pending = self._pending, []
        for chosen in all_gather_object(self._choose(pending)):
            self._used = {**chosen, **self._used}  # that of the first rank which has the product
        self._library.update(self._used)
        for each in pending:
            each.use(self._library[each.key])

    def _choose(self, products: list[Product]) -> dict[str, str]:
        """Return the known or measured library of each product, by its key."""
        known: dict[str, str] = {}
        measured: dict[str, str] = {}
        if any(each.key not in self._library for each in products):
            known = _machines().get(_machine(), {})
        known.update(self._library)
        for each in sorted(products, key=lambda each: each.flop):
            if each.key in known or each.key in measured:
                continue
            if self._seconds_left <= 0.0:
                break  # unmeasured, so not cached: the next process has a budget of its own
            started = time.perf_counter()
            seconds = each.measure()
            self._seconds_left -= time.perf_counter() - started
            measured[each.key] = MKLML if seconds[ONEDNN] > _MIN_GAIN * seconds[MKLML] else ONEDNN
        if measured:
            with suppress(OSError):  # the cache saves time only
                _write_cache(measured)
        return {each.key: known.get(each.key) or measured.get(each.key, ONEDNN) for each in products}


choices = Choices()


def _num_elements(layout: Layout) -> int:
    """Return the elements of memory that a matrix extends over."""
    return 1 + sum((length - 1) * stride for length, stride in zip(layout.shape, layout.strides, strict=True))


def _machine() -> str:
    """Return what choices are valid for: the CPU, its instruction sets, oneDNN's version and the number of threads."""
    isa = max_cpu_isa(os.environ) or onednn_max_cpu_isa(os.environ) or "all instruction sets"
    version = ".".join(map(str, library_version() or ()))
    return f"{cpu_model()}, {isa}, oneDNN {version}, {os.environ.get('OMP_NUM_THREADS', '1')} threads"


def _cache_file() -> Path:
    return cache_dir() / "products.json"


def _machines() -> dict[str, dict[str, str]]:
    """Return the valid entries of the cache file."""
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return {}
        return {machine: _valid(libraries) for machine, libraries in content["machines"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}  # missing or damaged


def _valid(libraries: Mapping[str, str]) -> dict[str, str]:
    return {key: library for key, library in libraries.items() if library in (ONEDNN, MKLML)}


def _write_cache(measured: Mapping[str, str]) -> None:
    """Add choices to those of this machine, whose entry becomes the latest; the oldest make room."""
    machines = _machines()
    entries = {**machines.pop(_machine(), {}), **measured}
    latest = dict([*machines.items()][1 - _MAX_MACHINES :])
    write_json({"format": _FORMAT, "machines": {**latest, _machine(): entries}}, _cache_file())
