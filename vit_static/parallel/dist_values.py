"""Create, place, reshard, replicate, set and read distributed values of a static program."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.distributed.auto_parallel.placement_type import to_dim_map


def create_variable(name: str, shape: list[int], dtype: str, mesh: dist.ProcessMesh, placements: list[Any]) -> Any:
    """Create a variable of the program being built that outlives a step, 0 at first. A number makes its name unique."""
    dim_map, partial = to_dim_map(placements, len(shape))
    return paddle.pir.core.create_persistable_value(
        dtype,
        shape,
        paddle.utils.unique_name.generate(name),
        initializer=nn.initializer.Constant(0),
        dist_attr=paddle.base.libpaddle.pir.create_tensor_dist_attribute(mesh, dim_map, partial),
    )


def place_variable(variable: Any, mesh: dist.ProcessMesh, placements: list[Any]) -> None:
    """Set the placements of a persistable variable, before the engine splits the program."""
    libpir = paddle.base.libpaddle.pir
    dim_map, partial = to_dim_map(placements, len(variable.shape))
    attributes = libpir.create_tensor_dist_attribute(mesh, dim_map, partial)
    variable.set_type(libpir.cvt_to_dist_type(variable.type(), attributes))
    variable.get_defining_op().dist_attr = libpir.create_op_dist_attribute(mesh, [], [attributes])


def reshard(value: Any, placements: list[Any]) -> Any:
    """Return the value with other placements on the same mesh."""
    return value if value.placements == placements else dist.reshard(value, value.process_mesh, placements)


def gather(value: Any) -> Any:
    """Return the entire value on every rank of its mesh. Paddle 3.3.1 can only gather along one mesh axis at a time."""
    for axis in range(len(value.placements)):
        placements = list(value.placements)
        placements[axis] = dist.Replicate()
        value = reshard(value, placements)
    return value


def replicate(value: Any, mesh: dist.ProcessMesh) -> Any:
    """Return the value replicated over `mesh`. It must have no placements yet, or be replicated on another mesh."""
    if not value.is_dist():
        world = dist.auto_parallel.get_mesh()
        value = dist.shard_tensor(value, world, [dist.Replicate()] * world.ndim)
    return value if value.process_mesh == mesh else dist.reshard(value, mesh, [dist.Replicate()] * mesh.ndim)


def assign_to(variable: Any, value: Any) -> None:
    """Store a value in a persistable variable of the program."""
    paddle.assign(value, output=variable)


def set_variable(name: str, values: np.ndarray) -> None:
    """Set a persistable variable of a program from the host, without waiting for the device.

    `Tensor.set` copies synchronously. `_copy_from`, by which the executor sets the learning rate, queues the copy
    before the next step's work. When it returns, CUDA has taken so few values out of pageable memory. Does nothing if
    the program doesn't have the variable.
    """
    variable = paddle.static.global_scope().find_var(name)
    if variable is not None:
        on_host = paddle.base.core.DenseTensor()
        on_host.set(values, paddle.CPUPlace())
        variable.get_tensor()._copy_from(on_host, paddle.framework._current_expected_place_())


def variable_array(name: str) -> np.ndarray:
    """Return a copy of a persistable variable of a program, of this rank's part if it is distributed."""
    return np.array(paddle.static.global_scope().find_var(name).get_tensor())


def local_array(tensor: paddle.Tensor) -> np.ndarray:
    """Return the part of a distributed tensor that this rank holds, as an array."""
    return np.array(local_tensor(tensor))


def local_tensor(tensor: paddle.Tensor) -> paddle.Tensor:
    """Return the part of a distributed tensor that this rank holds."""
    return tensor._local_value() if tensor.is_dist() else tensor
