"""Sharded training state: each rank writes its shard without a gather, and any mesh can read them.

A shard is a .safetensors file, which other programs read too and which runs no code. Paddle's own
`dist.save_state_dict` (3.3.1) is no alternative: its ranks communicate while they write, so it can't run in the
background of training, and its files are pickles.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import safetensors
import safetensors.numpy

from vit_static.common.errors import WeightsError, truncate
from vit_static.common.io import set_default_mode

# by the tensor's name: start of the slice, shape of the full tensor
Slices = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

_SLICES = "slices"  # header entry of a file: for each tensor in it, the slice's start and the full tensor's shape


@dataclass(frozen=True)
class TensorSlice:
    """A rectangular part of a tensor: its start and length along each axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class RankShard:
    """One rank's shard of a training state: host copies that training no longer changes."""

    arrays: dict[str, np.ndarray]
    slices: Slices

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def tensor_slices(tensor: paddle.Tensor) -> dict[TensorSlice, list[int]]:
    """Return the slices that a tensor is divided into, each with the ranks that hold it."""
    full_shape = tuple(tensor.shape)
    if not tensor.is_dist():
        return {TensorSlice((0,) * len(full_shape), full_shape): [0]}
    mesh = tensor.process_mesh
    ranks = np.reshape(mesh.process_ids, mesh.shape)
    holders: dict[TensorSlice, list[int]] = defaultdict(list)
    for coordinates in np.ndindex(*mesh.shape):
        start, shape = [0] * len(full_shape), list(full_shape)
        for mesh_axis, placement in enumerate(tensor.placements):
            if placement.is_shard():
                axis = placement.get_dim()
                shape[axis] //= mesh.shape[mesh_axis]
                start[axis] += coordinates[mesh_axis] * shape[axis]
        holders[TensorSlice(tuple(start), tuple(shape))].append(int(ranks[coordinates]))
    return holders


def slice_on_rank(tensor: paddle.Tensor, rank: int) -> TensorSlice | None:
    """Return the slice that a rank holds; None if it holds nothing, as with another pipeline stage's layers."""
    slices = tensor_slices(tensor)
    if not tensor.is_dist():
        return next(iter(slices))
    return next((slice_ for slice_, ranks in slices.items() if rank in ranks), None)


def assign_slices(state: Mapping[str, paddle.Tensor], rank: int) -> Slices:
    """Return which slice of which tensor `rank` writes.

    A slice that several ranks hold goes to the one with the fewest bytes so far.
    """
    num_assigned: Counter[int] = Counter()
    assigned = {}
    for name, tensor in sorted(state.items(), key=lambda item: (-math.prod(item[1].shape), item[0])):
        for slice_, ranks in tensor_slices(tensor).items():
            writer = min(ranks, key=lambda one: (num_assigned[one], one))
            num_assigned[writer] += slice_.size
            if writer == rank:
                assigned[name] = slice_.start, tuple(tensor.shape)
    return assigned


def write_shard(shard: RankShard, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a shard, with `metadata` in the file's header. Raises OSError or SafetensorError."""
    safetensors.numpy.save_file(shard.arrays, path, {**metadata, _SLICES: json.dumps(shard.slices)})
    set_default_mode(path)


def read_shard_metadata(path: Path) -> dict[str, str]:
    """Return the header's metadata of a shard; empty if the file is none."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


class ShardedReader:
    """Reads tensors from the shards of all ranks. Raises WeightsError if a file is no shard."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pieces: dict[str, list[tuple[Any, TensorSlice]]] = defaultdict(list)  # open file, slice in it
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                file = safetensors.safe_open(path, "numpy")
                for name, (start, full_shape) in json.loads(file.metadata()[_SLICES]).items():
                    piece = TensorSlice(tuple(start), tuple(file.get_slice(name).get_shape()))
                    shape = self._shapes.setdefault(name, tuple(full_shape))
                    if shape != tuple(full_shape) or not _is_inside(piece, shape):
                        raise ValueError(f"{name} doesn't fit its shape")
                    self._pieces[name].append((file, piece))
            except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
                raise WeightsError(f"{path}: is no part of a checkpoint ({truncate(str(error))})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, requested: TensorSlice | None = None) -> np.ndarray:
        """Read a slice of a tensor, or all of it, from the files that it is in.

        Raises WeightsError if the checkpoint has no such tensor or slice, or its files don't cover it.
        """
        if name not in self:
            raise WeightsError(f"the checkpoint has no {name}; it is of another optimizer or model")
        full_shape, pieces = self._shapes[name], self._pieces[name]
        requested = requested or TensorSlice((0,) * len(full_shape), full_shape)
        if not _is_inside(requested, full_shape):
            raise WeightsError(f"the checkpoint's {name} is {list(full_shape)}; it is of another model")
        # Before memory is allocated: a header can claim any shape.
        if requested.size > sum(piece.size for _, piece in pieces):
            raise WeightsError(f"the checkpoint's files don't have all of {name}, {list(full_shape)}")
        result, num_read = None, 0
        for file, piece in pieces:
            start = np.maximum(requested.start, piece.start)
            stop = np.minimum(np.add(requested.start, requested.shape), np.add(piece.start, piece.shape))
            if np.any(stop <= start):
                continue
            values = file.get_slice(name)[_slices(start - piece.start, stop - piece.start)]
            if result is None:
                result = np.empty(requested.shape, values.dtype)
            result[_slices(start - requested.start, stop - requested.start)] = values
            num_read += values.size
        if result is None or num_read != requested.size:
            raise WeightsError(f"the checkpoint's files have {num_read} of the {requested.size} numbers of {name}")
        return result


def _is_inside(slice_: TensorSlice, full_shape: tuple[int, ...]) -> bool:
    return (
        len(slice_.start) == len(slice_.shape) == len(full_shape)
        and all(type(number) is int and number >= 0 for number in (*slice_.start, *full_shape))
        and all(
            start + length <= full_length
            for start, length, full_length in zip(slice_.start, slice_.shape, full_shape, strict=True)
        )
    )


def _slices(start: np.ndarray, stop: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(first), int(last)) for first, last in zip(start, stop, strict=True))
