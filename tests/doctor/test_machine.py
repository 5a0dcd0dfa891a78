"""The checks of the machine: packages, driver, compute capability and memory that don't suit the run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.doctor import fake_nvidia_smi, gpu_row, make_subject

from vit_static.doctor import machine
from vit_static.doctor.check import Result, perform
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.gpus import Gpu, visible_gpus
from vit_static.doctor.subject import Subject, with_keys
from vit_static.plan.planner import Cluster, make_plan
from vit_static.program.precision import Precision

A100 = Gpu("NVIDIA A100-SXM4-40GB", "560.35.03", (8, 0), 40 * 2**30, 39 * 2**30)


def check(subject: Subject, name: str) -> Result:
    return perform(BY_NAME[name], subject)


def on_gpus(tmp_path: Path, *gpus: Gpu, precision: Precision | None = None) -> Subject:
    subject = make_subject(tmp_path, device="gpu")
    subject.precision, subject.gpus = precision or Precision("O2", "bfloat16"), list(gpus)
    return subject


# -- packages --------------------------------------------------------------------------------------------------------


def test_the_installed_versions_are_those_of_the_lock_file(tmp_path: Path) -> None:
    assert machine.locked_versions()["paddlepaddle"] == version("paddlepaddle")
    result = check(make_subject(tmp_path), "versions")
    assert result.status == "ok" and f"Paddle {version('paddlepaddle')} (CPU build)" in result.message


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"paddlepaddle": "3.4.0"}, "paddlepaddle 3.4.0 instead of 3.3.1"),
        ({"nvidia-dali-cuda120": "1.50.0"}, "nvidia-dali-cuda120 1.50.0 instead of 2.4.0"),
        ({"paddlepaddle-gpu": "3.3.1"}, "paddlepaddle and paddlepaddle-gpu of"),
    ],
)
def test_other_versions_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], message: str
) -> None:
    versions = machine.installed_versions() | installed
    monkeypatch.setattr(machine, "installed_versions", lambda: versions)
    result = check(make_subject(tmp_path), "versions")
    assert result.status == "failed" and message in result.message
    assert result.remedy == "run ./run.sh setup again"


def test_the_cpu_build_fails_on_a_gpu(tmp_path: Path) -> None:
    result = check(on_gpus(tmp_path, A100), "versions")
    assert result.message == "paddlepaddle is installed, and GPUs need paddlepaddle-gpu"


def test_values_that_change_between_dali_and_paddle_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paddle.utils import dlpack

    real = dlpack.from_dlpack
    monkeypatch.setattr(dlpack, "from_dlpack", lambda capsule: real(capsule) + 1.0)
    result = check(make_subject(tmp_path), "imports")
    assert result.message == "a tensor that Paddle gets from DALI holds other values"


# -- the driver and the GPUs -------------------------------------------------------------------------------------------


def test_the_gpus_are_those_that_cuda_shows(tmp_path: Path) -> None:
    rows = [gpu_row(0), gpu_row(1, "NVIDIA H100 80GB HBM3", capability="9.0"), gpu_row(2)]
    environ = fake_nvidia_smi(tmp_path, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environ["PATH"])
        assert visible_gpus({})[0] == Gpu(A100.name, "560.35.03", (8, 0), 40960 * 2**20, 40000 * 2**20)
        names = {
            visible: [gpu.name for gpu in visible_gpus({"CUDA_VISIBLE_DEVICES": visible})]
            for visible in ("1,0", "GPU-1a", "0,-1,1", "", "7")
        }
    h100 = "NVIDIA H100 80GB HBM3"
    assert names == {"1,0": [h100, A100.name], "GPU-1a": [h100], "0,-1,1": [A100.name], "": [], "7": []}


def test_without_nvidia_smi_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []


@pytest.mark.parametrize(
    ("driver", "status"), [("560.35.03", "ok"), ("525.60.13", "ok"), ("525.60.11", "failed"), ("470.256.02", "failed")]
)
def test_a_driver_that_is_too_old_fails(tmp_path: Path, driver: str, status: str) -> None:
    result = check(on_gpus(tmp_path, Gpu("A100", driver, (8, 0), 1, 1)), "driver")
    assert result.status == status
    if status == "failed":
        assert f"driver {driver}" in result.message and "update the driver" in result.remedy


@pytest.mark.parametrize(
    ("capability", "cuda", "precision", "remedy"),
    [
        ((8, 0), "12.6", Precision("O2", "bfloat16"), None),
        ((9, 0), "12.6", Precision("O2", "float16"), None),
        ((7, 0), "12.6", Precision("O0", "float32"), None),
        ((7, 0), "12.6", Precision("O2", "bfloat16"), "set -o amp.dtype=float16"),
        ((7, 5), "12.6", Precision("O2", "float16"), "set -o kernels.flash_attention=false"),
        ((10, 0), "12.6", Precision("O2", "bfloat16"), "cu129/ ./run.sh setup"),
        ((12, 0), "12.9", Precision("O2", "bfloat16"), None),
    ],
)
def test_a_gpu_that_lacks_what_the_run_needs_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cuda: str,
    precision: Precision,
    remedy: str | None,
) -> None:
    monkeypatch.setattr(machine.paddle.version, "cuda", lambda: cuda)
    result = check(on_gpus(tmp_path, Gpu("a GPU", "560.35.03", capability, 1, 1), precision=precision), "capability")
    assert result.status == ("ok" if remedy is None else "failed"), result
    assert remedy is None or remedy in result.remedy


def test_gpu_checks_without_a_gpu_say_so(tmp_path: Path) -> None:
    for name in ("driver", "capability"):
        assert check(on_gpus(tmp_path), name).status == "failed"
        assert check(make_subject(tmp_path), name) == Result("skipped", "only on a GPU")


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [("model.drop_path_rate=0.2", "model.dropout=0.1"), ("parallel.recompute=block",)]
)
def test_the_memory_of_a_deep_model_is_that_of_its_plan(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    subject = make_subject(tmp_path, "model.depth=6", *overrides)
    config = with_keys(subject.config, amp__level="O0")
    plan = make_plan(config, config.parallel, 1, Cluster("a100-80g", "ib-hdr"))
    assert machine.estimated_memory(subject) == plan.memory


def test_a_run_that_does_not_fit_fails_with_what_saves_memory(tmp_path: Path) -> None:
    subject = make_subject(tmp_path, "data.global_batch_size=100000000")
    result = check(subject, "memory")
    assert result.status == "failed" and "GB are free in main memory" in result.message
    assert "parallel.grad_accum_steps" in result.remedy and "parallel.recompute=block" in result.remedy


def test_a_gpus_free_memory_is_that_of_the_fullest(tmp_path: Path) -> None:
    full = Gpu(A100.name, A100.driver, A100.capability, A100.total_bytes, 10**9)
    result = check(on_gpus(tmp_path, A100, full), "memory")
    assert result.status == "failed" and "1.0 GB are free on the GPU with the least" in result.message
    assert check(on_gpus(tmp_path, A100), "memory").status == "ok"
