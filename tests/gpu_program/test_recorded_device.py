"""The Python code that only GPUs reach, on a GPU that records the calls to it (helpers/recorded_device.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import paddle
import pytest
from helpers.exported import in_inference_process
from helpers.recorded_device import TRAIN_STEP, Call, RecordedDevice, recorded_gpu
from helpers.runs import TINY, metrics
from paddle import inference
from paddle.base import core

from vit_static.checkpoint.folder import checkpoint_dir
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.export.exporter import export_checkpoint
from vit_static.inference.backends import PaddleSession
from vit_static.model.vit import VisionTransformer
from vit_static.train.evaluate import evaluate_checkpoint
from vit_static.train.trainer import train

pytestmark = [pytest.mark.early]

# Everything that adds work on the device between two steps. The trace of steps 5 and 6 ends when step 7 begins.
OPTIONS = [
    *("augment.policy=randaugment", "augment.mixup_alpha=0.8", "augment.cutmix_alpha=1.0"),
    *("augment.random_erasing_probability=0.5", "augment.random_erasing_with=noise"),
    *("optim.ema_decay=0.9", "train.profile_steps=[5, 6]", "data.hw_decoder_load=0.9"),
    # Neither has a kernel on the CPU, and both keep float32 programs as they are.
    *("model.dropout=0.0", "model.drop_path_rate=0.0"),
]
NUM_STEPS = 11
LOGGED, SAVED, EVALUATED, TRACED = {1, 3, 6, 9, 11}, {4, 8, 11}, {8, 11}, {6}


class Run(NamedTuple):
    """A finished run on the recorded GPU."""

    config: Config
    device: RecordedDevice


def make_config(folder: Path, digits: Path, *overrides: str) -> Config:
    (folder / "tiny.yaml").write_text(TINY)
    common = [f"data.root={digits}", f"output_dir={folder}", "amp.level=O0", "kernels.onednn=false"]
    return load_config(folder / "tiny.yaml", [*common, *OPTIONS, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> Run:
    config = make_config(tmp_path_factory.mktemp("recorded"), small_digits, "device=gpu")
    with paddle.static.scope_guard(paddle.static.Scope()), recorded_gpu() as device:
        assert train(config)
    return Run(config, device)


def describe(waits: list[Call]) -> list[str]:
    return [f"{call.name} in {call.caller}" for call in waits]


def test_nothing_waits_for_the_device_between_log_steps(run: Run) -> None:
    waits = run.device.waits_after_steps()
    assert len(waits) == NUM_STEPS
    undisturbed = {step: describe(waits[step - 1]) for step in range(1, NUM_STEPS + 1)}
    for step in LOGGED | SAVED | EVALUATED | TRACED:
        del undisturbed[step]
    assert undisturbed == {step: [] for step in (2, 5, 7, 10)}


def test_a_log_step_reads_the_loss_and_the_norms_only(run: Run) -> None:
    logged_only = LOGGED - SAVED - EVALUATED - TRACED
    assert logged_only == {1, 3, 9}
    for step in logged_only:
        waits = run.device.waits_after_steps()[step - 1]
        assert {(call.name, call.caller.split(":")[0]) for call in waits} == {
            ("DenseTensor.__array__", "program/program.py"),
            ("DenseTensor.__array__", "optim/grad_clip.py"),
        }


def test_start_up_asks_for_the_gpu_of_this_process(run: Run) -> None:
    (started,) = [line for line in metrics(run.config.run_dir, "event") if line["event"] == "started"]
    assert started["mesh"]["device"] == "gpu"
    assert started["environment"]["gpu"] == run.device.name
    assert started["environment"]["cuda"] == "12.9"
    assert all(line["memory_mb"] == 1000.0 for line in metrics(run.config.run_dir, "train"))
    assert all(line["mfu"] > 0.0 for line in metrics(run.config.run_dir, "train"))


def test_images_are_decoded_and_transformed_on_the_gpu(run: Run) -> None:
    by_name: dict[str, set[str]] = {}
    for operator in run.device.operators:
        by_name.setdefault(operator.name, set()).add(operator.device)
    for name in ("decoders__ImageSlice", "decoders__Image"):
        assert by_name[name] == {"mixed"}
    for name in ("Resize", "CropMirrorNormalize", "Erase", "WarpAffine", "Equalize"):
        assert by_name[name] == {"gpu"}, name


def test_no_cut_takes_its_corner_and_its_size_from_different_devices(run: Run) -> None:
    cuts = {
        operator.inputs for operator in run.device.operators if (operator.name, operator.device) == ("Slice", "gpu")
    }
    # The noise of random erasing, with corner and size as named arguments; evaluation's centre, with both on the CPU.
    assert cuts == {("gpu",), ("gpu", "cpu", "cpu")}


def test_the_programs_inputs_are_on_the_gpu(run: Run) -> None:
    """Images and labels of training and of evaluation. An evaluation's weights are read by the host."""
    assert {tuple(devices) for devices in run.device.outputs} == {("gpu", "gpu"), ("gpu", "gpu", "cpu")}
    assert "Tensor.cuda" not in run.device.names()


def test_the_trace_waits_for_its_last_step_and_is_written(run: Run) -> None:
    names = run.device.names()
    assert names.count("synchronize") == 1
    assert names[: names.index("synchronize")].count(TRAIN_STEP) == 6
    assert json.loads((run.config.run_dir / "trace_steps_5_6.json").read_text())["traceEvents"]


def test_a_run_computes_what_it_computes_on_a_cpu(run: Run, tmp_path: Path, small_digits: Path) -> None:
    config = make_config(tmp_path, small_digits, "device=cpu")
    with paddle.static.scope_guard(paddle.static.Scope()):
        assert train(config)
    for kind, names in (("train", ("loss", "grad_norm")), ("eval", ("loss", "ema_loss", "top1"))):
        for on_gpu, on_cpu in zip(metrics(run.config.run_dir, kind), metrics(config.run_dir, kind), strict=True):
            assert [on_gpu[name] for name in names] == pytest.approx([on_cpu[name] for name in names], rel=1e-5)


def test_resume_and_eval(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = {"output_dir": str(tmp_path), "train": run.config.train.model_copy(update={"profile_steps": None})}
    config = run.config.model_copy(update=overrides)
    with paddle.static.scope_guard(paddle.static.Scope()), recorded_gpu():
        assert train(config, resume=str(checkpoint_dir(run.config.run_dir, 8)))
    resumed = [(line["step"], line["loss"]) for line in metrics(config.run_dir, "train")]
    expected = [(line["step"], line["loss"]) for line in metrics(run.config.run_dir, "train") if line["step"] > 8]
    assert resumed == expected
    capsys.readouterr()
    with paddle.static.scope_guard(paddle.static.Scope()), recorded_gpu() as device:
        evaluate_checkpoint(None, run.config.run_dir, [])
    assert "another program" in device.names()
    assert f"{metrics(run.config.run_dir, 'eval')[-1]['top1']:.2f} %" in capsys.readouterr().out


def export_on_recorded_gpu(run_dir: Path, out: Path) -> tuple[list[str], list[bool], bool]:
    """Export in float32 with TF32 on. Return the calls to the device, and whether TF32 was on: in each run of the
    trained model and of the exported program, and afterwards."""
    uses: list[bool] = []

    def recorded(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if paddle.in_dynamic_mode():
                uses.append(core.get_cublas_switch() or core.get_cudnn_switch())
            return function(*arguments)

        return run

    core.set_cublas_switch(True)
    core.set_cudnn_switch(True)
    with (
        recorded_gpu() as device,
        patch.object(inference.Config, "enable_use_gpu", lambda *_: device.add("enable_use_gpu")),
        patch.object(PaddleSession, "outputs", recorded(PaddleSession.outputs)),
        patch.object(VisionTransformer, "forward", recorded(VisionTransformer.forward)),
    ):
        export_checkpoint(None, run_dir, out, [])
    return device.names(), uses, core.get_cublas_switch() and core.get_cudnn_switch()


def test_export_compares_without_tf32(run: Run, tmp_path: Path) -> None:
    names, uses, is_on_again = in_inference_process(export_on_recorded_gpu, run.config.run_dir, tmp_path / "model")
    assert "enable_use_gpu" in names
    assert uses == [False] * 4  # two batches
    assert is_on_again
    spec = json.loads((tmp_path / "model" / "vit_static.json").read_text())
    assert spec["comparisons"]["model.json"]["largest_difference"] < 1e-4


def test_each_way_to_wait_is_recorded() -> None:
    with recorded_gpu() as device:
        paddle.set_device("gpu:0")
        tensor = paddle.to_tensor([1.0, 2.0])
        for use in (tensor.numpy, tensor.tolist, tensor.cuda, tensor[0].item, lambda: float(tensor[0])):
            use()
        np.asarray(tensor)
        variable = core.DenseTensor()
        variable.set(np.zeros(2, np.float32), paddle.framework._current_expected_place_())
        np.asarray(variable)
        paddle.device.synchronize()
        event = paddle.device.Event()
        event.record()
        event.synchronize()
    assert {call.name for call in device.calls if call.waits} >= {
        *("paddle.to_tensor", "Tensor.numpy", "Tensor.tolist", "Tensor.cuda", "Tensor.item", "Tensor.__float__"),
        *("Tensor.__array__", "DenseTensor.set", "DenseTensor.__array__", "synchronize", "Event.synchronize"),
    }


def test_a_copy_that_is_queued_does_not_wait_nor_does_an_event_before_the_last_step() -> None:
    with recorded_gpu() as device:
        paddle.set_device("gpu:0")
        variable, values = core.DenseTensor(), core.DenseTensor()
        values.set(np.zeros(2, np.float32), paddle.CPUPlace())
        variable._copy_from(values, paddle.framework._current_expected_place_())
        event = paddle.device.Event()
        event.record()
        device.launch(TRAIN_STEP)
        event.synchronize()
    assert [call.name for call in device.calls if call.waits] == []
    assert {"DenseTensor._copy_from", "Event.synchronize"} <= set(device.names())
