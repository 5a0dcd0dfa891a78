"""The doctor's checks, in order. To add one, write a function of a Subject and add a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vit_static.doctor.check import Check
from vit_static.doctor.subject import Subject, switches

GROUPS = ("machine", "ranks", "export")


def _call(module: str, function: str) -> Callable[[Subject], Any]:
    """Return a function that imports its module when it is called: the process that starts others needs no Paddle."""

    def run(subject: Subject) -> Any:
        from importlib import import_module

        return getattr(import_module(f"vit_static.doctor.{module}"), function)(subject)

    return run


# -- where a check applies -------------------------------------------------------------------------------------------


def _gpu_only(subject: Subject) -> str | None:
    return None if subject.on_gpu else "only on a GPU"


def _several_ranks(subject: Subject) -> str | None:
    return None if subject.job.world_size > 1 else "one process exchanges nothing"


def _several_gpus(subject: Subject) -> str | None:
    return _gpu_only(subject) or _several_ranks(subject)


def _fused_attention(subject: Subject) -> str | None:
    if not subject.on_gpu:
        return _onednn(subject)
    return _call("kernels", "why_no_flash_attention")(subject)


def _fused_linear(subject: Subject) -> str | None:
    if not subject.on_gpu:
        return _onednn(subject)
    if not subject.config.kernels.fused_linear:
        return "kernels.fused_linear=false"
    return None if subject.is_half else "only in half precision"


def _onednn(subject: Subject) -> str | None:
    if subject.on_gpu:
        return "only on a CPU"
    return _call("kernels", "why_no_onednn")(subject)


def _fused_dropout(subject: Subject) -> str | None:
    if not subject.on_gpu:
        return "only on a GPU"
    if not subject.config.kernels.fused_dropout:
        return "kernels.fused_dropout=false"
    return None if subject.config.model.dropout > 0.0 else "model.dropout is 0"


def _zero(subject: Subject) -> str | None:
    if subject.config.parallel.sharding_stage == 0:
        return "parallel.sharding_stage is 0"
    return None if subject.mesh_shape.dp > 1 else "one data-parallel rank has nothing to shard"


def _float16(subject: Subject) -> str | None:
    is_float16 = subject.is_half and subject.precision.dtype == "float16"
    return None if is_float16 else "only in float16"


# -- remedies --------------------------------------------------------------------------------------------------------


def _fixed(text: str) -> Callable[[Subject], str]:
    return lambda subject: text


def _of_device(on_gpu: str, on_cpu: str) -> Callable[[Subject], str]:
    return lambda subject: on_gpu if subject.on_gpu else on_cpu


def _of_steps(subject: Subject) -> str:
    if not subject.on_gpu:
        return switches("kernels.onednn=false")
    if subject.is_half:
        return f"{switches('amp.level=O0')}, or the switches of kernels that failed"
    return "set the switches of kernels that failed"


_SETUP = "run ./run.sh setup again"
_NCCL = (
    "NCCL_DEBUG=INFO says why; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 avoids direct connections, "
    "NCCL_SOCKET_IFNAME names the network"
)
_NETWORK = _of_device(_NCCL, "GLOO_SOCKET_IFNAME names the network")

CHECKS: tuple[Check, ...] = (
    Check("versions", "machine", _call("machine", "check_versions"), _fixed(_SETUP)),
    Check(
        "imports",
        "machine",
        _call("machine", "check_imports"),
        _of_device(f"{_SETUP}, or train on CPUs: VIT_STATIC_DEVICE=cpu", _SETUP),
    ),
    Check(
        "driver",
        "machine",
        _call("machine", "check_driver"),
        _fixed("update the driver, or train on CPUs: VIT_STATIC_DEVICE=cpu"),
        why_not=_gpu_only,
    ),
    Check(
        "capability",
        "machine",
        _call("machine", "check_capability"),
        _fixed("train on CPUs: VIT_STATIC_DEVICE=cpu"),
        why_not=_gpu_only,
    ),
    Check(
        "memory",
        "machine",
        _call("machine", "check_memory"),
        _fixed(
            "raise parallel.grad_accum_steps, set -o parallel.recompute=block or parallel.sharding_stage=1, or end "
            "other programs"
        ),
        timeout_s=300.0,
    ),
    Check("mesh", "ranks", _call("collectives", "check_mesh"), _NETWORK),
    Check(
        "all-reduce",
        "ranks",
        _call("collectives", "check_all_reduce"),
        _NETWORK,
        why_not=_several_ranks,
        needs=("mesh",),
    ),
    Check(
        "streams",
        "ranks",
        _call("collectives", "check_two_streams"),
        _fixed(switches("parallel.overlap_gradients=false")),
        why_not=_several_gpus,
        needs=("mesh",),
    ),
    Check(
        "attention",
        "ranks",
        _call("kernels", "check_attention"),
        _of_device(switches("kernels.flash_attention=false"), switches("kernels.onednn=false")),
        why_not=_fused_attention,
    ),
    Check(
        "linear",
        "ranks",
        _call("kernels", "check_linear"),
        _of_device(switches("kernels.fused_linear=false"), switches("kernels.onednn=false")),
        why_not=_fused_linear,
    ),
    Check(
        "elementwise",
        "ranks",
        _call("kernels", "check_elementwise"),
        _fixed(switches("kernels.onednn=false")),
        why_not=_onednn,
    ),
    Check(
        "dropout",
        "ranks",
        _call("kernels", "check_dropout"),
        _fixed(switches("kernels.fused_dropout=false")),
        why_not=_fused_dropout,
    ),
    Check(
        "program",
        "ranks",
        _call("programs", "check_program"),
        _of_device(
            f"{switches('amp.level=O0')} or parallel.sharding_stage=0, and keep the log",
            switches("kernels.onednn=false", "parallel.sharding_stage=0"),
        ),
        needs=("mesh",),
        timeout_s=240.0,
    ),
    Check("ten-steps", "ranks", _call("steps", "check_ten_steps"), _of_steps, needs=("mesh",), timeout_s=240.0),
    Check(
        "zero",
        "ranks",
        _call("steps", "check_zero"),
        _fixed(switches("parallel.sharding_stage=0")),
        why_not=_zero,
        needs=("mesh",),
        timeout_s=240.0,
    ),
    Check(
        "loss-scale",
        "ranks",
        _call("steps", "check_loss_scale"),
        _fixed(switches("amp.dtype=bfloat16")),
        why_not=_float16,
        needs=("mesh",),
        timeout_s=240.0,
    ),
    Check(
        "data",
        "ranks",
        _call("pipeline", "check_data"),
        _of_device(
            "./run.sh bench data --device gpu shows which operation differs; set -o augment.policy=none or "
            "augment.random_erasing_probability=0",
            "./run.sh data check looks for damaged images",
        ),
    ),
    Check(
        "speed",
        "ranks",
        _call("steps", "check_speed"),
        _of_device("no switch: training works, but slowly; keep the log", switches("kernels.onednn=false")),
        needs=("mesh",),
        timeout_s=240.0,
    ),
    Check(
        "export",
        "export",
        _call("exporting", "check_export"),
        _fixed(switches("export.precision=float32")),
    ),
)
BY_NAME = {check.name: check for check in CHECKS}
