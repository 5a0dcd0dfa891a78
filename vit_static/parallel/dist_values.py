"""Place, reshard, replicate and read distributed values of a static program."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed.auto_parallel.placement_type import to_dim_map


def persistable(name: str, shape: list[int], dtype: str, mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """A variable of the program being built that outlives a step; 0 at first."""
    dim_map, partial = to_dim_map(placements, len(shape))
    return paddle.pir.core.create_persistable_value(
        dtype,
        shape,
        paddle.utils.unique_name.generate(name),
        initializer=nn.initializer.Constant(0),
        dist_attr=paddle.base.libpaddle.pir.create_tensor_dist_attribute(mesh, dim_map, partial),
    )


def _place_variable(value: Any, mesh: dist.ProcessMesh, placements: list[Any]) -> None:
    """Says of a persistable variable, before the program is cut, how it is split."""
    libpir = paddle.base.libpaddle.pir
    dim_map, partial = to_dim_map(placements, len(value.shape))
    attributes = libpir.create_tensor_dist_attribute(mesh, dim_map, partial)
    value.set_type(libpir.cvt_to_dist_type(value.type(), attributes))
    value.get_defining_op().dist_attr = libpir.create_op_dist_attribute(mesh, [], [attributes])


def reshard(value: Any, placements: list[Any]) -> Any:
    """A value of the program, placed otherwise on the same mesh."""
    return value if value.placements == placements else dist.reshard(value, value.process_mesh, placements)


def replicate(value: Any, mesh: dist.ProcessMesh) -> Any:
    """A value, placed nowhere yet or on all ranks, whole on every rank of a mesh."""
    if not value.is_dist():
        world = dist.auto_parallel.get_mesh()
        value = dist.shard_tensor(value, world, [dist.Replicate()] * world.ndim)
    return value if value.process_mesh == mesh else dist.reshard(value, mesh, [dist.Replicate()] * mesh.ndim)


def assign_to(variable: Any, value: Any) -> None:
    """Stores a value in a persistable variable of the program."""
    paddle.assign(value, output=variable)


def local_array(tensor: paddle.Tensor) -> np.ndarray:
    """The part of a distributed tensor that this rank holds."""
    return np.array(local_tensor(tensor))


def local_tensor(tensor: paddle.Tensor) -> paddle.Tensor:
    return tensor._local_value() if tensor.is_dist() else tensor
