"""Checks of the machine: versions, driver, compute capability, memory, and both libraries in one process."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import psutil

from vit_static.common.hardware import RESERVED_BYTES
from vit_static.common.installation import SOURCE_TREE
from vit_static.doctor.check import Result, failed, ok
from vit_static.doctor.subject import Subject, with_keys
from vit_static.plan.planner import Cluster, make_plan

_BUILDS = ("paddlepaddle", "paddlepaddle-gpu")  # both install the Python package `paddle`
# CUDA 12.x runs on every driver from 525.60.13 on ("minor version compatibility"); CUDA 12 itself starts with it.
# NVIDIA, CUDA Compatibility, https://docs.nvidia.com/deploy/cuda-compatibility/
MIN_DRIVER = (525, 60, 13)
# Blackwell's machine code is in builds for CUDA 12.8 and newer (NVIDIA, Blackwell Compatibility Guide).
_BLACKWELL, _BLACKWELL_CUDA = (10, 0), (12, 8)
_MAX_COMPILED_DEPTH = 4  # of models that are compiled as they are
_AMPERE = (8, 0)  # the first with bfloat16, and the first that FlashAttention 2 supports


def check_versions(subject: Subject) -> Result:
    """The installed packages are those of the lock file, and only one build of Paddle is installed."""
    wanted, installed = locked_versions(), installed_versions()
    figures = {"python": platform.python_version(), **installed}
    builds = [name for name in _BUILDS if name in installed]
    if len(builds) != 1:
        return failed(
            f"{' and '.join(builds) or 'no package'} of {' and '.join(_BUILDS)}: exactly one must be installed",
            **figures,
        )
    needed_build = "paddlepaddle-gpu" if subject.on_gpu else None
    if needed_build is not None and builds != [needed_build]:
        return failed(f"{builds[0]} is installed, and GPUs need {needed_build}", **figures)
    others = {
        name: f"{name} {installed.get(name, 'missing')} instead of {wanted[name]}"
        for name in ("paddlepaddle", "nvidia-dali-cuda120")
        if installed.get(builds[0] if name == "paddlepaddle" else name) != wanted[name]
    }
    if others:
        return failed("; ".join(others.values()), **figures)
    cuda = f"CUDA {paddle.version.cuda()}" if subject.on_gpu else "CPU build"
    return ok(
        f"Python {figures['python']}, Paddle {wanted['paddlepaddle']} ({cuda}), DALI "
        f"{wanted['nvidia-dali-cuda120']}, NumPy {np.__version__}",
        **figures,
    )


def locked_versions(lock: Path | None = None) -> dict[str, str]:
    """Return the versions in the lock file by package, without those that only some Python versions get.

    A wheel has no lock file: its metadata pin Paddle and DALI.
    """
    if lock is None and SOURCE_TREE is not None:
        lock = SOURCE_TREE / ".requirements" / "lock.txt"
    if lock is None:
        return dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", "\n".join(requires("vit_static") or []), re.MULTILINE))
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lock.read_text(encoding="utf-8"), re.MULTILINE))


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that matter most, by package; those that aren't installed are missing."""
    versions = {}
    for name in (*_BUILDS, "nvidia-dali-cuda120", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def check_imports(subject: Subject) -> Result:
    """Paddle and DALI work in one process, and a tensor passes from DALI to Paddle without a copy."""
    from nvidia.dali import fn, pipeline_def
    from paddle.utils.dlpack import from_dlpack

    device = subject.device
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    @pipeline_def(batch_size=2, num_threads=1, device_id=subject.device_id)
    def pipeline() -> Any:
        inputs = fn.external_source(lambda n: values, batch=True, device=device)
        return inputs + 1.0

    built = pipeline()
    built.build()
    outputs = built.run()
    tensor = from_dlpack(outputs[0].as_tensor())
    doubled = (tensor * 2.0).numpy()
    if not np.array_equal(doubled, (values + 1.0) * 2.0):
        return failed("a tensor that Paddle gets from DALI holds other values")
    return ok(f"a tensor on the {device.upper()} passes from DALI to Paddle with its values")


def check_driver(subject: Subject) -> Result:
    """The driver runs the CUDA version that Paddle's build was made for."""
    drivers = {gpu.driver for gpu in subject.gpus}
    if len(drivers) != 1:
        return failed("nvidia-smi reports no GPU, or GPUs with different drivers")
    (driver,) = drivers
    cuda = str(paddle.version.cuda())
    if _numbers(driver) < MIN_DRIVER:
        return failed(
            f"driver {driver}, and CUDA {cuda} needs {'.'.join(map(str, MIN_DRIVER))}", driver=driver, cuda=cuda
        )
    return ok(f"driver {driver} runs CUDA {cuda}", driver=driver, cuda=cuda)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def check_capability(subject: Subject) -> Result:
    """Paddle's build has machine code for the GPU, and the GPU supports the config's precision and kernels."""
    capabilities = {gpu.capability for gpu in subject.gpus}
    names = sorted({gpu.name for gpu in subject.gpus})
    figures = {"gpus": [gpu.name for gpu in subject.gpus], "capabilities": sorted(capabilities)}
    if not capabilities:
        return failed("nvidia-smi reports no GPU", **figures)
    lowest, highest = min(capabilities), max(capabilities)
    cuda = str(paddle.version.cuda())
    if highest >= _BLACKWELL and _numbers(cuda) < _BLACKWELL_CUDA:
        return failed(
            f"compute capability {_dotted(highest)} needs a build for CUDA {_dotted(_BLACKWELL_CUDA)}, and this is one "
            f"for {cuda}",
            "install another build: VIT_STATIC_PADDLE_INDEX=https://www.paddlepaddle.org.cn/packages/stable/cu129/ "
            "./run.sh setup",
            **figures,
        )
    if lowest < _AMPERE and subject.is_half and subject.precision.dtype == "bfloat16":
        return failed(f"compute capability {_dotted(lowest)} has no bfloat16", "set -o amp.dtype=float16", **figures)
    if lowest < _AMPERE and subject.is_half and subject.config.kernels.flash_attention:
        return failed(
            f"FlashAttention needs compute capability {_dotted(_AMPERE)}, and this is {_dotted(lowest)}",
            "set -o kernels.flash_attention=false",
            **figures,
        )
    return ok(f"{len(subject.gpus)} x {', '.join(names)}, {_dotted(lowest)}, with a build for CUDA {cuda}", **figures)


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def check_memory(subject: Subject) -> Result:
    """The run fits in the free memory, by the estimate of `plan`: on a GPU of each, on a CPU of all ranks together."""
    needed = estimated_memory(subject)
    if subject.on_gpu:
        free = min((gpu.free_bytes for gpu in subject.gpus), default=0)
        needed, where = needed + int(RESERVED_BYTES), "on the GPU with the least"
    else:
        free, where = int(psutil.virtual_memory().available), "in main memory"
        needed *= subject.job.num_local
    message = f"the run takes about {needed / 1e9:.2f} GB, and {free / 1e9:.1f} GB are free {where}"
    figures = {"needed_bytes": needed, "free_bytes": free}
    return ok(message, **figures) if needed <= free else failed(message, **figures)


def estimated_memory(subject: Subject) -> int:
    """Return the peak bytes of the rank that needs most, as `plan` estimates them.

    Compiling a deep model takes a minute, and every block but the last, which may compute fewer tokens, adds the same
    number of bytes: so without a pipeline, models of three and four blocks are compiled.
    """
    config, parallel, depth = subject.config, subject.config.parallel, subject.variant.depth
    if not subject.on_gpu:
        config = with_keys(config, amp__level="O0")  # `plan` takes `auto` for a GPU's half precision
    cluster = Cluster("a100-80g", "ib-hdr")  # matters only for times, which aren't used

    def planned(num_blocks: int, rank: int = 0) -> int:
        resized = with_keys(config, model__depth=num_blocks)
        return make_plan(resized, parallel, subject.job.world_size, cluster, rank).memory

    if parallel.pp > 1:
        return max(planned(depth), planned(depth, subject.job.world_size - 1))
    if depth <= _MAX_COMPILED_DEPTH or isinstance(parallel.recompute, int):
        return planned(depth)
    three, four = planned(3), planned(4)
    return three + (depth - 3) * (four - three)
