"""The lines that only GPUs have, on a GPU that records the calls to it (helpers/recorded_device.py).

Its programs are executed by the CPU, so they are in float32; test_kernels.py has the kernels in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paddle
import pytest
from helpers.doctor import fake_nvidia_smi, gpu_row, make_subject
from helpers.recorded_device import RecordedDevice, recorded_gpu

from vit_static import verbs
from vit_static.__main__ import main
from vit_static.common.errors import EXIT_USER_MISTAKE
from vit_static.doctor import gpu_kernels, machine, pipeline, steps
from vit_static.doctor.check import Result, perform
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.subject import Subject

pytestmark = [pytest.mark.early]

FLOAT32 = ("amp.level=O0", "kernels.onednn=false", "device=gpu")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Subject, RecordedDevice]]:
    """A subject on the recorded GPU, which nvidia-smi also reports."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch, paddle.static.scope_guard(paddle.static.Scope()):
        patch.setenv("PATH", fake_nvidia_smi(folder, [gpu_row(name="NVIDIA H100 80GB HBM3", capability="9.0")])["PATH"])
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(pipeline, "_SECONDS", 0.05)
        installed = {"paddlepaddle-gpu": "3.3.1", "nvidia-dali-cuda120": "2.4.0", "numpy": "2.3.5"}
        patch.setattr(machine, "installed_versions", lambda: installed)
        with recorded_gpu() as device:
            yield make_subject(folder, *FLOAT32, "model.dropout=0.1"), device


def check(recorded: tuple[Subject, RecordedDevice], name: str) -> Result:
    return perform(BY_NAME[name], recorded[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("versions", "Paddle 3.3.1 (CUDA 12.9)"),
        ("imports", "a tensor on the GPU passes from DALI to Paddle with its values"),
        ("driver", "driver 560.35.03 runs CUDA 12.9"),
        ("capability", "1 x NVIDIA H100 80GB HBM3, 9.0, with a build for CUDA 12.9"),
        ("memory", "41.9 GB are free on the GPU with the least"),
        ("mesh", "1 x NVIDIA H100 80GB HBM3: dp=1, mp=1, pp=1, O0 float32"),
        ("program", "operators of a training step; nothing is wrong with it"),
        ("ten-steps", "of plain float32"),
        ("data", "within 0.00 grey levels of the CPU's"),
    ],
)
def test_a_gpus_line_is_ok(recorded: tuple[Subject, RecordedDevice], name: str, message: str) -> None:
    result = check(recorded, name)
    assert result.status == "ok" and message in result.message, result


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("all-reduce", "one process exchanges nothing"),
        ("streams", "one process exchanges nothing"),
        ("attention", "this config computes attention by plain products"),
        ("linear", "only in half precision"),
        ("elementwise", "only on a CPU"),
        ("loss-scale", "only in float16"),
    ],
)
def test_a_gpus_line_that_does_not_apply_says_why(
    recorded: tuple[Subject, RecordedDevice], name: str, reason: str
) -> None:
    assert check(recorded, name) == Result("skipped", reason)


def test_the_data_pipeline_runs_on_the_gpu(recorded: tuple[Subject, RecordedDevice]) -> None:
    device = recorded[1]
    device.operators.clear()
    check(recorded, "data")
    assert {operator.device for operator in device.operators if operator.name == "decoders__ImageSlice"} == {
        "mixed",
        "cpu",  # the one that it is compared with
    }


def test_steps_start_one_after_another_and_only_the_last_is_waited_for(
    recorded: tuple[Subject, RecordedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_seconds_behind_other_work", lambda step: (0.002, 0.5))
    steps.main_program(recorded[0])
    device = recorded[1]
    device.calls.clear()
    result = check(recorded, "speed")
    assert result.status == "ok"
    assert "MFU" in result.message and "a step starts in 2.0 ms without waiting for the GPU" in result.message
    waits = [len(calls) for calls in device.waits_after_steps()]
    timed = waits[-steps.NUM_TIMED_STEPS :]
    assert timed[:-1] == [0] * (steps.NUM_TIMED_STEPS - 1) and timed[-1] > 0


def test_a_step_whose_start_waits_for_the_gpu_is_found(
    recorded: tuple[Subject, RecordedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As here: the recorded GPU's work is done within the call that starts it."""
    monkeypatch.setattr(gpu_kernels, "_BUSY_SIZE", 64)
    result = check(recorded, "speed")
    assert result.status == "failed" and "starting a step waits for the GPU" in result.message
    assert result.remedy.startswith("no switch")


def test_a_step_longer_than_the_gpus_queue_is_not_judged(
    recorded: tuple[Subject, RecordedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_MAX_QUEUED", 10)
    result = check(recorded, "speed")
    assert result.status == "ok" and "can't be told" in result.message


def test_other_work_is_started_in_front_of_a_step_without_waiting_for_it(
    recorded: tuple[Subject, RecordedDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels, "_BUSY_SIZE", 8)
    device, products = recorded[1], []
    real = paddle.matmul

    def recorded_matmul(x: Any, y: Any) -> Any:
        products.append(len(device.calls))
        return real(x, y)

    monkeypatch.setattr(paddle, "matmul", recorded_matmul)
    gpu_kernels.keep_busy(0.2)  # many, however busy this machine is
    synchronized = [index for index, call in enumerate(device.calls) if call.name == "synchronize"]
    assert len(products) > 3
    assert all(number > synchronized[-1] for number in products[2:])


def test_training_on_the_gpu_starts_with_the_notice(
    recorded: tuple[Subject, RecordedDevice],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The data set doesn't exist, so that the run ends before its first step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verbs, "prepare_process", lambda verbose: None)  # this process is prepared
    path = tmp_path / "tiny.yaml"
    path.write_text(f"device: gpu\ndata: {{root: {tmp_path / 'missing'}}}\n")
    assert main(["pretrain", "-c", str(path)]) == EXIT_USER_MISTAKE
    notice, mistake = capsys.readouterr().err.splitlines()
    assert "these GPUs haven't passed './run.sh doctor' with this config" in notice
    assert "missing" in mistake
