"""Checks of the mesh: start-up, the sum of a bucket over the ranks, and the same while the GPU computes."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from vit_static.common.text import counted
from vit_static.doctor import gpu_kernels
from vit_static.doctor.check import Result, failed, ok
from vit_static.doctor.subject import Subject
from vit_static.parallel.mesh import device_name

_PERIOD = 5  # of the values that a rank contributes
_NUM_ROUNDS = 5  # all-reduces that are timed
_PRODUCT_SIZE = 2048  # rows and columns of the products beside which an all-reduce runs
_NUM_PRODUCTS = 20


def check_mesh(subject: Subject) -> Result:
    """All ranks connect, on the device and on the host."""
    started = time.perf_counter()
    mesh = subject.mesh
    counted = mesh.all_reduce_sum(np.ones(1))[0]
    ranks = sorted(mesh.all_gather_object(mesh.rank))
    seconds = time.perf_counter() - started
    if counted != mesh.dp_size:
        return failed(f"a sum over {mesh.dp_size} data-parallel ranks is {counted:g}")
    if ranks != list(range(mesh.world_size)):
        return failed(f"the host connection reaches ranks {ranks}, not 0 to {mesh.world_size - 1}")
    return ok(
        f"{mesh.world_size} x {device_name(mesh)}: {mesh.shape}, {subject.precision.level} {subject.precision.dtype}, "
        f"connected in {seconds:.1f} s",
        world_size=mesh.world_size,
        seconds=seconds,
    )


def check_all_reduce(subject: Subject) -> Result:
    """An all-reduce of one gradient bucket gives the sum over all ranks."""
    mesh = subject.mesh
    bucket = make_bucket(subject)
    total = bucket.clone()
    dist.all_reduce(total)
    problem = why_wrong_sum(total, mesh.world_size)
    if problem is not None:
        return failed(problem)
    started = time.perf_counter()
    for _ in range(_NUM_ROUNDS):
        dist.all_reduce(bucket)
    np.asarray(bucket[:1])  # waits
    seconds = (time.perf_counter() - started) / _NUM_ROUNDS
    num_bytes = int(bucket.numel()) * bucket.element_size()
    gb_per_s = bus_bandwidth(num_bytes, mesh.world_size, seconds) / 1e9
    return ok(
        f"{num_bytes / 1e6:.1f} MB of {_name(bucket)} over {counted(mesh.world_size, 'rank')} in "
        f"{1e3 * seconds:.2f} ms, {gb_per_s:.1f} GB/s",
        num_bytes=num_bytes,
        seconds=seconds,
        bus_gb_per_s=gb_per_s,
    )


def check_two_streams(subject: Subject) -> Result:
    """An all-reduce and products give the same results when they run at the same time, each on its own stream."""
    mesh = subject.mesh
    rng = np.random.default_rng(0)
    factor = paddle.to_tensor(rng.standard_normal((_PRODUCT_SIZE, _PRODUCT_SIZE)).astype(np.float32))
    expected = _products(factor)
    bucket = make_bucket(subject)
    started = time.perf_counter()
    task = dist.stream.all_reduce(bucket, sync_op=False, use_calc_stream=False)
    result = _products(factor)
    task.wait()
    gpu_kernels.wait()
    seconds = time.perf_counter() - started
    problem = why_wrong_sum(bucket, mesh.world_size)
    if problem is not None:
        return failed(problem)
    difference = float((result - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-5:
        return failed(f"products beside an all-reduce differ from those alone by {difference:.1e} of the largest value")
    return ok(f"an all-reduce beside {_NUM_PRODUCTS} products: both right, in {1e3 * seconds:.1f} ms", seconds=seconds)


def _products(factor: Any) -> Any:
    result = factor
    for _ in range(_NUM_PRODUCTS):
        result = paddle.matmul(result, factor) / math.sqrt(_PRODUCT_SIZE)
    return result


def make_bucket(subject: Subject) -> Any:
    """Return this rank's bucket, of the config's size and dtype: element i is i (rank + 1) mod _PERIOD.

    Sums over up to 64 ranks are exact in every dtype, and no two ranks contribute the same.
    """
    parallel = subject.config.parallel
    dtype = parallel.reduce_dtype
    num_bytes = int((parallel.bucket_mb or 1.0) * 1e6)
    length = max(num_bytes // (4 if dtype == "float32" else 2), _PERIOD)
    return paddle.to_tensor(_contribution(subject.mesh.rank, length)).astype(dtype)


def _contribution(rank: int, length: int) -> np.ndarray:
    period = np.arange(_PERIOD) * (rank + 1) % _PERIOD
    return np.resize(period.astype(np.float32), length)


def why_wrong_sum(total: Any, world_size: int) -> str | None:
    """Return what is wrong with the sum over all ranks of `make_bucket`, or None."""
    values = total.astype("float32").numpy()
    period = np.sum([_contribution(rank, _PERIOD) for rank in range(world_size)], axis=0)
    wrong = ~np.isclose(values, np.resize(period, len(values)), rtol=0.0 if world_size <= 64 else 2e-2, atol=0.0)
    if not wrong.any():
        return None
    first = int(wrong.argmax())
    return (
        f"{int(wrong.sum())} of {len(values)} sums are wrong: element {first} is {values[first]:g} instead of "
        f"{period[first % _PERIOD]:g}"
    )


def bus_bandwidth(num_bytes: int, world_size: int, seconds: float) -> float:
    """Return the bytes per second that each link carries in a ring: 2 (n - 1) / n times the data per time.

    As nccl-tests reports it (doc/PERFORMANCE.md there), so that figures can be compared with its.
    """
    return 2.0 * (world_size - 1) / world_size * num_bytes / seconds


def _name(tensor: Any) -> str:
    return str(tensor.dtype).rsplit(".", 1)[-1]
