"""The checks of the mesh: sums over the ranks that are wrong in several ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers.doctor import Doctor, make_subject

from vit_static.doctor import collectives
from vit_static.doctor.collectives import bus_bandwidth, make_bucket, why_wrong_sum
from vit_static.doctor.subject import Subject


def contributions(subject: Subject, world_size: int) -> list[np.ndarray]:
    """Return the buckets of all ranks of a larger world, as float32."""
    buckets = []
    for rank in range(world_size):
        object.__setattr__(subject.mesh, "rank", rank)
        buckets.append(make_bucket(subject).astype("float32").numpy())
    return buckets


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_the_sum_is_exact_in_every_dtype_and_other_sums_are_not_taken_for_it(
    tmp_path: Path, dtype: str, world_size: int
) -> None:
    subject = make_subject(
        tmp_path, f"parallel.reduce_dtype={dtype}", "parallel.bucket_mb=0.0001", "amp.dtype=bfloat16"
    )
    buckets = contributions(subject, world_size)
    total = paddle.to_tensor(np.sum(buckets, axis=0)).astype(dtype)
    assert why_wrong_sum(total, world_size) is None
    wrong_sums = {
        "a rank is missing": np.sum(buckets[1:], axis=0),
        "a rank counts twice": np.sum([*buckets, buckets[0]], axis=0),
        "the mean": np.mean(buckets, axis=0),
        "the maximum": np.max(buckets, axis=0),
        "shifted by an element": np.roll(np.sum(buckets, axis=0), 1),
        "not finite": np.full_like(buckets[0], np.nan),
    }
    for name, values in wrong_sums.items():
        assert why_wrong_sum(paddle.to_tensor(values).astype(dtype), world_size), name


def test_the_bucket_has_the_configs_size_and_dtype(tmp_path: Path) -> None:
    bucket = make_bucket(make_subject(tmp_path, "parallel.bucket_mb=2.0", "parallel.reduce_dtype=float16"))
    assert (bucket.dtype, bucket.shape) == (paddle.float16, [1_000_000])


def test_the_bus_bandwidth_is_that_of_a_ring() -> None:
    """Two ranks send each half of the data twice; many ranks send nearly all of it twice."""
    assert bus_bandwidth(10**9, 2, 1.0) == 1e9
    assert bus_bandwidth(10**9, 8, 1.0) == pytest.approx(1.75e9)


@pytest.mark.slow
def test_a_wrong_sum_is_a_line_and_a_sum_beside_products_is_right(doctor: Doctor) -> None:
    """CPU processes have no streams, but the calls are the same: gloo sums in the background."""
    doctor.break_package(
        "doctor/collectives.py",
        "    dist.all_reduce(total)\n",
        "    dist.all_reduce(total, op=dist.ReduceOp.MAX)\n",
    )
    doctor.break_package("doctor/checks.py", "why_not=_several_gpus", "why_not=_several_ranks")
    doctor.break_package("doctor/gpu_kernels.py", "    paddle.device.synchronize()\n", "    pass\n")
    report = doctor(only=("mesh", "all-reduce", "streams"), NPROC="2")
    line = report.line("all-reduce")
    assert line.startswith("FAILED") and "sums are wrong: element " in line
    assert "GLOO_SOCKET_IFNAME names the network" in line
    assert "an all-reduce beside 20 products: both right" in report.line("streams")


def test_a_host_connection_without_all_ranks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject(tmp_path)
    monkeypatch.setattr(type(subject.mesh), "all_gather_object", lambda mesh, value: [value, value])
    assert collectives.check_mesh(subject).message == "the host connection reaches ranks [0, 0], not 0 to 0"
