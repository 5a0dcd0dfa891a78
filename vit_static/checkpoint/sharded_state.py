"""A training state in parts: each rank writes its own, none gathers it, and any mesh reads it again.

A part is a .safetensors file: reading it runs no code, and other programs can. What Paddle has for this
(`dist.save_state_dict`, 3.3.1) makes the ranks talk to each other while it writes, so that it can't go on beside the
training, and its files are pickles.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import safetensors
import safetensors.numpy

from vit_static.common.errors import WeightsError
from vit_static.parallel.dist_values import local_array

_PLACES = "places"  # in a file's header: of each tensor in it, where it begins in the whole, and the whole's shape


@dataclass(frozen=True)
class TensorSlice:
    """A box of a tensor: where it begins and how long it is, along each axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class RankShard:
    """What one rank writes of a state: copies on the host, which training no longer changes."""

    arrays: dict[str, np.ndarray]
    places: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def tensor_slices(tensor: paddle.Tensor) -> dict[TensorSlice, list[int]]:
    """The boxes that a distributed tensor is cut into, each with the ranks that hold it."""
    whole = tuple(tensor.shape)
    if not tensor.is_dist():
        return {TensorSlice((0,) * len(whole), whole): [0]}
    mesh = tensor.process_mesh
    ranks = np.reshape(mesh.process_ids, mesh.shape)
    held: dict[TensorSlice, list[int]] = defaultdict(list)
    for place in np.ndindex(*mesh.shape):
        start, shape = [0] * len(whole), list(whole)
        for axis, placement in enumerate(tensor.placements):
            if placement.is_shard():
                cut = placement.get_dim()
                shape[cut] //= mesh.shape[axis]
                start[cut] += place[axis] * shape[cut]
        held[TensorSlice(tuple(start), tuple(shape))].append(int(ranks[place]))
    return held


def slice_on_rank(tensor: paddle.Tensor, rank: int) -> TensorSlice | None:
    """What a rank holds; None where that is nothing, as of another pipeline stage's layers."""
    found = tensor_slices(tensor)
    if not tensor.is_dist():
        return next(iter(found))
    return next((region for region, ranks in found.items() if rank in ranks), None)


def rank_shard(state: Mapping[str, paddle.Tensor], rank: int) -> RankShard:
    """What `rank` is to write: of what several ranks hold, so much that all write about as many bytes."""
    written: Counter[int] = Counter()
    part = RankShard({}, {})
    for name, tensor in sorted(state.items(), key=lambda item: (-math.prod(item[1].shape), item[0])):
        for region, ranks in tensor_slices(tensor).items():
            writer = min(ranks, key=lambda one: (written[one], one))
            written[writer] += region.size
            if writer == rank:
                part.arrays[name] = local_array(tensor)
                part.places[name] = region.start, tuple(tensor.shape)
    return part


def write_shard(part: RankShard, path: Path, about: Mapping[str, str]) -> None:
    """Raises OSError, or SafetensorError, where it can't be written. `about` goes into the file's header."""
    header = {**about, _PLACES: json.dumps(part.places)}
    safetensors.numpy.save_file(part.arrays, path, header)


def read_shard_metadata(path: Path) -> dict[str, str]:
    """What `write` was told about a part; nothing where the file is none."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


class ShardedReader:
    """A state as its parts hold it. Raises WeightsError where a file is none of them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._held: dict[str, list[tuple[Any, TensorSlice]]] = defaultdict(list)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                file = safetensors.safe_open(path, "numpy")
                for name, (start, whole) in json.loads(file.metadata()[_PLACES]).items():
                    held = TensorSlice(tuple(start), tuple(file.get_slice(name).get_shape()))
                    if not _lies_in(held, tuple(whole)) or self._shapes.setdefault(name, tuple(whole)) != tuple(whole):
                        raise ValueError(f"{name} has no such place")
                    self._held[name].append((file, held))
            except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
                raise WeightsError(f"{path}: is no part of a checkpoint ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __iter__(self) -> Any:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, wanted: TensorSlice | None = None) -> np.ndarray:
        """A box of a tensor, or all of it, from as many parts as it lies in. Raises WeightsError where one lacks."""
        if name not in self:
            raise WeightsError(f"the checkpoint has no {name}; it is of another optimizer or model")
        wanted = wanted or TensorSlice((0,) * len(self._shapes[name]), self._shapes[name])
        if len(wanted.shape) != len(self._shapes[name]) or not _lies_in(wanted, self._shapes[name]):
            raise WeightsError(f"the checkpoint's {name} is {list(self._shapes[name])}; it is of another model")
        found, num_found = None, 0
        if wanted.size > sum(held.size for _, held in self._held[name]):
            raise WeightsError(f"the checkpoint's parts do not have all of {name}, {list(self._shapes[name])}")
        for file, held in self._held[name]:
            start = np.maximum(wanted.start, held.start)
            stop = np.minimum(np.add(wanted.start, wanted.shape), np.add(held.start, held.shape))
            if np.any(stop <= start):
                continue
            values = file.get_slice(name)[_slices(start - held.start, stop - held.start)]
            if found is None:
                found = np.empty(wanted.shape, values.dtype)
            found[_slices(start - wanted.start, stop - wanted.start)] = values
            num_found += values.size
        if found is None or num_found != wanted.size:
            raise WeightsError(f"the checkpoint's parts have {num_found} of the {wanted.size} numbers of {name}")
        return found


def _lies_in(region: TensorSlice, whole: tuple[int, ...]) -> bool:
    numbers = (*region.start, *whole)
    return (
        len(region.start) == len(region.shape) == len(whole)
        and all(type(number) is int and number >= 0 for number in numbers)
        and all(
            first + length <= all_of_it
            for first, length, all_of_it in zip(region.start, region.shape, whole, strict=True)
        )
    )


def _slices(start: np.ndarray, stop: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(first), int(last)) for first, last in zip(start, stop, strict=True))
