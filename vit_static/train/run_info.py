"""Environment of a run for its first log event (machines, versions, mesh), and its memory use."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import paddle
import psutil
from nvidia import dali

import vit_static
from vit_static.common.cpu import cpu_model
from vit_static.common.startup import user_environ
from vit_static.config.schema import Config
from vit_static.parallel.mesh import Mesh, device_name, num_micro_batches
from vit_static.program.cpu import onednn
from vit_static.program.precision import Precision, uses_flash_attention

_CHECKOUT = Path(__file__).resolve().parents[2]
_DRIVER = Path("/proc/driver/nvidia/version")


def describe_run(config: Config, mesh: Mesh, precision: str) -> dict[str, Any]:
    """Describe the run for its first event: `time`, `mesh`, `environment`, as JSON values. All ranks call it."""
    hosts = mesh.all_gather_object(socket.gethostname())
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "mesh": _mesh(config, mesh, precision),
        "environment": {
            "vit_static": vit_static.__version__,
            "commit": _commit(_CHECKOUT),
            "paddle": paddle.version.full_version,
            "dali": dali.__version__,
            "python": platform.python_version(),
            "hosts": sorted(set(hosts)),
            "system": platform.platform(),
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "gpu": device_name(mesh) if mesh.device == "gpu" else None,
            "cuda": str(paddle.version.cuda()) if mesh.device == "gpu" else None,
            "driver": gpu_driver(),
        },
    }


def _mesh(config: Config, mesh: Mesh, precision: str) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "world_size": mesh.world_size,
        "dp": mesh.shape.dp,
        "mp": mesh.shape.mp,
        "pp": mesh.shape.pp,
        "sharding_stage": parallel.sharding_stage,
        "device": mesh.device,
        "batch_size": config.data.global_batch_size,
        "batch_size_per_rank": config.data.global_batch_size // mesh.shape.dp,
        "micro_batches": num_micro_batches(parallel),
        "precision": precision,
        "passes": _passes(config, mesh, precision),
    }


def _passes(config: Config, mesh: Mesh, precision: str) -> list[str]:
    """List the config keys that change this run's program."""
    kernels, parallel = config.kernels, config.parallel
    is_gpu, is_parallel = mesh.device == "gpu", mesh.world_size > 1
    is_half = not precision.startswith("O0")
    on = {
        "kernels.onednn": kernels.onednn and not is_gpu and onednn.is_supported(),
        "kernels.flash_attention": uses_flash_attention(
            config.model, Precision(*precision.split()), parallel, kernels, mesh.device
        ),
        "kernels.fused_linear": kernels.fused_linear and is_gpu and is_half,
        "kernels.fused_gelu": kernels.fused_linear and kernels.fused_gelu and is_gpu and is_half,
        "kernels.fused_dropout": kernels.fused_dropout and is_gpu,
        "kernels.deterministic": kernels.deterministic and is_gpu,
        "parallel.bucket_mb": parallel.bucket_mb > 0.0 and is_parallel,
        "parallel.overlap_gradients": parallel.overlap_gradients and parallel.bucket_mb > 0.0 and is_parallel,
        f"parallel.reduce_dtype={parallel.reduce_dtype}": parallel.reduce_dtype != "float32" and is_parallel,
        f"parallel.recompute={parallel.recompute}": parallel.recompute != "none",
        f"parallel.pp_schedule={parallel.pp_schedule}": mesh.shape.pp > 1,
    }
    return [name for name, is_on in on.items() if is_on]


def gpu_driver(version: Path = _DRIVER) -> str | None:
    """Return the NVIDIA driver's version, or None without a driver."""
    try:
        text = version.read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return match[1] if match else None


def _commit(checkout: Path) -> str | None:
    """Return the commit of the checkout that this program runs from, with '-dirty' where files differ.

    None outside a checkout, or where git is missing or fails.
    """
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, env=user_environ(), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def memory_mb(mesh: Mesh) -> float:
    """Return the memory of the rank that uses most, in MB: on GPUs the peak so far, on CPUs the resident set now. All
    ranks call it together."""
    return max(mesh.all_gather_object(_rank_memory_mb(mesh)))


def _rank_memory_mb(mesh: Mesh) -> float:
    if mesh.device == "gpu":
        return paddle.device.cuda.max_memory_allocated(mesh.device_id) / 1e6
    return psutil.Process().memory_info().rss / 1e6
