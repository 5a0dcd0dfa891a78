"""The checks that train two blocks: programs beside each other, comparisons step by step, and faults in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.doctor import CONFIG, Doctor, make_subject

from vit_static.common.errors import ConfigError
from vit_static.doctor import programs, steps
from vit_static.doctor.check import Result, perform
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.steps import (
    LOSS_BOUND,
    NORM_BOUND,
    NUM_STEPS,
    Curve,
    StepProgram,
    compare_curves,
    main_program,
    synthetic_batch,
)
from vit_static.doctor.subject import NUM_BLOCKS, with_keys

TRAINED = Curve(np.linspace(2.3, 1.4, NUM_STEPS), np.linspace(3.0, 2.0, NUM_STEPS), 0)


def compared(curve: Curve, expected: Curve = TRAINED) -> Result:
    return compare_curves(curve, expected, LOSS_BOUND[True], NORM_BOUND[True], "float32")


def test_a_program_trains_on_as_if_no_other_were_compiled_between_its_steps(tmp_path: Path) -> None:
    subject = make_subject(tmp_path)
    config, mesh, precision = subject.step_config, subject.mesh, subject.precision

    def train(program: StepProgram, num_steps: int) -> list[tuple[float, float]]:
        return [program.finish(program.start()) for _ in range(num_steps)]

    expected = train(StepProgram(config, mesh, precision), 6)
    first = StepProgram(config, mesh, precision)
    losses = train(first, 3)
    other = StepProgram(with_keys(config, kernels__onednn=False), mesh, precision)
    train(other, 2)
    assert losses + train(first, 3) == expected


def test_the_step_has_two_blocks_the_runs_batch_and_no_dropout(tmp_path: Path) -> None:
    subject = make_subject(tmp_path, "model.depth=5", "model.dropout=0.1", "parallel.grad_accum_steps=2")
    config = subject.step_config
    assert (config.model.depth, config.model.dropout) == (NUM_BLOCKS, 0.0)
    assert config.data.global_batch_size == 8
    large = make_subject(tmp_path, "model.image_size=384", "model.width=768", "model.mlp_dim=3072").step_config
    assert large.data.global_batch_size == 2  # a CPU would take minutes for more


@pytest.mark.parametrize("overrides", [(), ("augment.mixup_alpha=0.8",), ("data.multi_label=true", "loss.name=bce")])
def test_the_synthetic_batch_has_the_targets_of_the_run(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    subject = make_subject(tmp_path, *overrides)
    config = subject.step_config
    images, targets = synthetic_batch(config, subject.mesh)
    assert images.shape == [8, 3, 16, 16]
    assert targets.shape == ([8] if config.train_targets is None else [8, config.train_targets])
    assert np.isfinite(main_program(subject).curve.losses).all()


def test_the_step_has_the_largest_images_and_a_teacher_of_two_blocks(tmp_path: Path) -> None:
    """The teacher is split, verified and compared with float32 as the model; its weights need not exist."""
    (tmp_path / "teacher.yaml").write_text(CONFIG)
    teacher = ["distill.teacher=nowhere", f"distill.config={tmp_path / 'teacher.yaml'}", "distill.kind=features"]
    subject = make_subject(tmp_path, *teacher, "model.depth=3", "train.image_sizes=[[32, 0.5], [16, 1.0]]")
    assert subject.step_teacher is not None and subject.step_teacher.model.depth == NUM_BLOCKS
    assert subject.num_tokens == 1 + (32 // 8) ** 2
    step = main_program(subject)
    alone = StepProgram(with_keys(subject.step_config, distill__teacher=None), step.mesh, step.precision)
    assert alone.finish(alone.start())[0] != step.curve.losses[0]  # the distillation loss is missing
    assert synthetic_batch(step.config, step.mesh)[0].shape == [8, 3, 32, 32]
    assert step.problems() == []
    assert steps.check_ten_steps(subject).status == "ok"


def test_adapters_pass_the_checks_that_train(tmp_path: Path) -> None:
    subject = make_subject(tmp_path, "lora.rank=2", "init.from=nowhere")
    step = main_program(subject)
    assert step.problems() == []
    assert steps.check_ten_steps(subject).status == "ok"


def test_a_teacher_that_the_mesh_cant_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.yaml").write_text(CONFIG)
    teacher = ["distill.teacher=nowhere", f"distill.config={tmp_path / 'teacher.yaml'}", "parallel.pp=3"]
    with pytest.raises(ConfigError, match=r"distill\.teacher = nowhere: .* only 1 block"):
        make_subject(tmp_path, *teacher, "model.depth=3", "parallel.grad_accum_steps=4", world_size=3)


def test_equal_curves_pass() -> None:
    result = compared(TRAINED)
    assert result.status == "ok" and "loss 2.3000 to 1.4000" in result.message


def test_skipped_steps_are_left_out_of_the_comparison() -> None:
    """float16 skips the first steps while its loss scale falls; the same images give the same losses later."""
    late = Curve(TRAINED.losses[:-3], TRAINED.grad_norms[:-3], 3)
    result = compared(late)
    assert result.status == "ok" and "3 skipped" in result.message
    few = Curve(TRAINED.losses[:4], TRAINED.grad_norms[:4], NUM_STEPS - 4)
    assert compared(few).status == "failed"
    assert compared(few).message == "6 of 10 steps had gradients that aren't finite"


@pytest.mark.parametrize("factor", [65536.0, 2.0, 1.06, 0.94, 0.0, float("nan")])
def test_scaled_gradients_fail(factor: float) -> None:
    """A factor of the gradients leaves Adam's losses nearly unchanged, but not the norms."""
    assert compared(TRAINED._replace(grad_norms=factor * TRAINED.grad_norms)).status == "failed"
    assert compared(TRAINED._replace(grad_norms=(1.0 + 1e-2) * TRAINED.grad_norms)).status == "ok"


def test_other_losses_fail() -> None:
    result = compared(TRAINED._replace(losses=TRAINED.losses + np.linspace(0.0, 0.1, NUM_STEPS)))
    assert result.message == "the losses of 10 steps differ by 4.35% from those of float32; 3.0% is allowed"


def test_a_wrong_gradient_in_the_compiled_step_is_found(doctor: Doctor) -> None:
    """The kernel itself is right; the program gives it a wrong factor."""
    doctor.break_package(
        "program/cpu/lowering.py",
        "        factors = tuple(epilogue.factor for epilogue, _ in epilogues)\n",
        "        factors = tuple(1.1 * epilogue.factor for epilogue, _ in epilogues)\n",
    )
    line = doctor(only=("ten-steps",)).line("ten-steps")
    assert line.startswith("FAILED") and "plain float32" in line and "set -o kernels.onednn=false" in line


@pytest.mark.slow
def test_gradients_that_are_exchanged_twice_are_found_in_the_program_and_in_the_norms(doctor: Doctor) -> None:
    scatter = "    part = paddle._C_ops.reduce_scatter("
    twice = '    flat = paddle._C_ops.all_reduce(flat, attributes["ring_id"], dist.ReduceOp.SUM)\n'
    doctor.break_package("program/grad_buckets.py", scatter, twice + scatter)
    doctor.break_package(
        "program/grad_buckets.py", "import paddle\n", "import paddle\nimport paddle.distributed as dist\n"
    )
    report = doctor("-o", "parallel.sharding_stage=2", only=("mesh", "program", "zero"), NPROC="2")
    assert [check["status"] for check in report.checks.values()] == ["ok", "failed", "failed"]
    assert "its gradient is exchanged 2 times before" in report.line("program")
    line = report.line("zero")
    assert "from those of ZeRO 0; 5.0% is allowed" in line and "set -o parallel.sharding_stage=0" in line


def test_a_loss_that_is_not_finite_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_with_nan(*arguments: Any) -> tuple[Any, Any]:
        images, labels = synthetic_batch(*arguments)
        return images * float("nan"), labels

    monkeypatch.setattr(steps, "synthetic_batch", batch_with_nan)
    subject = make_subject(tmp_path, "kernels.onednn=false")
    assert perform(BY_NAME["ten-steps"], subject).message == "the loss or its gradients aren't finite"
    assert perform(BY_NAME["speed"], subject).message == "the loss isn't finite"


def test_a_program_that_violates_a_property_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over ranks in another dtype than the config's: here the config claims another."""
    subject = make_subject(tmp_path)
    with_flash = replace(
        steps.expected_properties(subject.step_config, subject.mesh, subject.precision, is_training=False),
        uses_flash_attention=True,
    )
    monkeypatch.setattr(programs, "expected_properties", lambda *_, **__: with_flash)
    result = perform(BY_NAME["program"], subject)
    assert result.status == "failed"
    assert result.message.startswith("evaluation: no flash_attn: attention isn't fused; ")
    assert result.figures["problems"]["training"] == []
