"""Checks that train two blocks: against float32, against ZeRO 0, against a loss scale of 1, and their speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import paddle

from vit_static.bench.step import model_flops_utilization
from vit_static.config.schema import Config, KernelsConfig
from vit_static.data.mixup import Mixup
from vit_static.doctor import gpu_kernels
from vit_static.doctor.check import Result, failed, ok
from vit_static.doctor.subject import Subject, with_keys
from vit_static.model.draws import at_size
from vit_static.model.lora import add_adapters
from vit_static.model.variants import largest_train_size, step_flops
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, seed_everything
from vit_static.program.distillation import build_teacher
from vit_static.program.precision import Precision, choose_attention, uses_flash_attention
from vit_static.program.program import Program
from vit_static.program.verify import Expected, violations
from vit_static.weights.teacher import TeacherSource

NUM_STEPS = 10
NUM_TIMED_STEPS, _NUM_WARM_UP_STEPS = 20, 3
# The peak rate of a run, reached after its warmup, would amplify rounding errors within ten steps.
_RATE = 0.1
# Allowed differences of losses (as a share of the largest loss) and of gradient norms (of the norm). In float32 only
# the order of additions differs; in half precision every operand is rounded, by 2^-8 in bfloat16.
LOSS_BOUND = {False: 1e-4, True: 3e-2}  # by whether a side is in half precision
NORM_BOUND = {False: 1e-3, True: 5e-2}
ZERO_BOUND = 5e-2  # of gradient norms, between ZeRO stages
PLAIN_KERNELS = KernelsConfig(
    onednn=False, flash_attention=False, fused_linear=False, fused_gelu=False, fused_dropout=False
)
_BUSY_S = 0.5  # of work in front of a step, to see whether the step's start waits for it
# CUDA queues about 1,024 kernels (undocumented); the host waits before it starts another. With more operators than this
# in a step, the start of a step would seem to wait.
_MAX_QUEUED = 900


class Curve(NamedTuple):
    """Losses and gradient norms of consecutive steps, means over the ranks. Steps that float16 skipped are left out."""

    losses: np.ndarray
    grad_norms: np.ndarray
    num_skipped: int


class StepProgram:
    """The compiled training step of a config on synthetic images, always the same, in a scope of its own.

    With train.image_sizes they have the largest size.

    (Paddle gives the variables of all programs of a process alike names.)
    """

    def __init__(self, config: Config, mesh: Mesh, precision: Precision, teacher: TeacherSource | None = None) -> None:
        self.config, self.mesh, self.precision = config, mesh, precision
        self._scope = paddle.static.Scope()
        self._num_steps = 0
        with paddle.static.scope_guard(self._scope):
            seed_everything(config.seed)
            attention = choose_attention(config.model, precision, config.parallel, config.kernels, mesh.device)
            model = VisionTransformer(config.model, attention)
            add_adapters(model, config.lora)
            self.program = Program.for_training(
                config,
                model,
                mesh,
                precision,
                learning_rate=lambda step: _RATE * config.optim.lr,
                eval_batch_size=mesh.dp_size,
                count_costs=self._verify_plain,
                teacher=None if teacher is None else build_teacher(teacher, config, precision, mesh.device),
                train_image_size=largest_train_size(config.model, config.train),
            )
            self._batch = synthetic_batch(config, mesh)

    def compiled(self, mode: str) -> Any:
        """Return the program of `train` or `eval` as this rank executes it."""
        with paddle.static.scope_guard(self._scope):
            return self.program.compiled(mode)

    def _verify_plain(self, program: Any, parameter_names: Iterable[str]) -> list[str]:
        """Return the violations in the training program before a CPU's own operators replace Paddle's."""
        if self.mesh.device != "cpu":
            return []
        return violations(program, expected_properties(self.config, self.mesh, self.precision, is_training=True))

    def problems(self) -> list[str]:
        """Return the properties of program/verify.py that the training program violates.

        On a GPU of the program that runs. On a CPU gradients couldn't be followed in it: gloo's and oneDNN's operators
        are Python functions.
        """
        if self.mesh.device == "cpu":
            return list(self.program.costs())
        expected = expected_properties(self.config, self.mesh, self.precision, is_training=True)
        return violations(self.compiled("train"), expected)

    def num_kernels(self) -> int:
        """Return the number of operators that a training step runs; those without operands are constants and inputs."""
        return sum(op.num_operands() > 0 for op in self.compiled("train").global_block().ops)

    def start(self) -> Any:
        """Start a step without waiting for it, and return its loss, which `finish` reads."""
        with paddle.static.scope_guard(self._scope):
            loss = self.program.train_step(*self._batch, self._num_steps)
        self._num_steps += 1
        return loss

    def finish(self, loss: Any) -> tuple[float, float]:
        """Wait for a step; return its loss and its gradient norm, NaN for the norm on a pipeline's later stages."""
        with paddle.static.scope_guard(self._scope):
            return self.program.loss_value(loss), self.program.grad_norm()

    @cached_property
    def curve(self) -> Curve:
        """The first NUM_STEPS steps, which are run when this is first read."""
        assert self._num_steps == 0, "the weights have changed"
        losses, norms = [], []
        for _ in range(NUM_STEPS):
            loss, norm = self.finish(self.start())
            losses.append(self.mesh.mean(loss))
            norms.append(_of_first_stage(norm, self.mesh))
        is_taken = np.isfinite(norms) if self.precision.dtype == "float16" else np.ones(NUM_STEPS, bool)
        return Curve(np.array(losses)[is_taken], np.array(norms)[is_taken], int((~is_taken).sum()))


def _of_first_stage(norm: float, mesh: Mesh) -> float:
    """Return the first pipeline stage's value on all ranks."""
    return float(mesh.first_non_none(repr(norm) if mesh.pp_rank == 0 else None))


def expected_properties(config: Config, mesh: Mesh, precision: Precision, *, is_training: bool) -> Expected:
    """Return the properties that a program of this rank must have."""
    return Expected(
        precision,
        is_training=is_training,
        dp_ranks=mesh.dp_ranks,
        uses_flash_attention=uses_flash_attention(
            config.model, precision, config.parallel, config.kernels, mesh.device
        ),
        reduce_dtype=config.parallel.reduce_dtype,
    )


def synthetic_batch(config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """Return this rank's part of a batch: noise, and labels or targets as the config's training has them."""
    rng = np.random.default_rng([config.seed, mesh.dp_rank])
    num_images, num_classes = config.data.global_batch_size // mesh.dp_size, config.model.num_classes
    image_size = largest_train_size(config.model, config.train)
    images = rng.standard_normal((num_images, config.model.num_channels, *image_size)).astype(np.float32)
    labels = rng.integers(0, num_classes, num_images)
    values = np.eye(num_classes, dtype=np.uint8)[labels] if config.data.multi_label else labels
    mixup = Mixup(config.augment, num_classes, config.seed)
    mixed_images, targets = mixup((paddle.to_tensor(images), paddle.to_tensor(values)), 0)
    return mixed_images, targets


def step_program(subject: Subject, config: Config, precision: Precision) -> StepProgram:
    """Return the program of a config, which is compiled once per process."""
    key = f"{precision} {config.model_dump_json()}"
    if key not in subject.programs:
        subject.programs[key] = StepProgram(config, subject.mesh, precision, subject.step_teacher)
    return subject.programs[key]


def main_program(subject: Subject) -> StepProgram:
    """Return the program of the config under test, after its first NUM_STEPS steps."""
    program = step_program(subject, subject.step_config, subject.precision)
    assert program.curve
    return program


def check_ten_steps(subject: Subject) -> Result:
    """Ten steps in the config's precision and kernels follow ten steps of Paddle's plain operators in float32."""
    config, curve = subject.step_config, main_program(subject).curve
    plain = with_keys(config.model_copy(update={"kernels": PLAIN_KERNELS}), parallel__sharding_stage=0)
    expected = step_program(subject, plain, Precision("O0", "float32")).curve
    is_half = subject.is_half
    return compare_curves(curve, expected, LOSS_BOUND[is_half], NORM_BOUND[is_half], "plain float32")


def check_zero(subject: Subject) -> Result:
    """Gradient norms of the config's ZeRO stage are within 5 % of those of stage 0."""
    config, curve = subject.step_config, main_program(subject).curve
    unsharded = with_keys(config, parallel__sharding_stage=0)
    expected = step_program(subject, unsharded, subject.precision).curve
    return compare_curves(curve, expected, LOSS_BOUND[True], ZERO_BOUND, "ZeRO 0")


def check_loss_scale(subject: Subject) -> Result:
    """Ten steps in float16 follow the same steps with an initial loss scale of 1, and few of them overflow."""
    config, curve = subject.step_config, main_program(subject).curve
    unscaled = with_keys(config, amp__init_loss_scaling=1.0)
    expected = step_program(subject, unscaled, subject.precision).curve
    return compare_curves(curve, expected, LOSS_BOUND[True], NORM_BOUND[True], "an initial loss scale of 1")


def compare_curves(curve: Curve, expected: Curve, loss_bound: float, norm_bound: float, other: str) -> Result:
    """Compare steps one by one.

    Steps that either side skipped left its weights unchanged, and all steps have the same images: so the n-th step that
    was taken is compared with the other's n-th.
    """
    num_steps = min(len(curve.losses), len(expected.losses))
    if num_steps < NUM_STEPS // 2:
        return failed(f"{NUM_STEPS - num_steps} of {NUM_STEPS} steps had gradients that aren't finite")
    losses, norms = curve.losses[:num_steps], curve.grad_norms[:num_steps]
    other_losses, other_norms = expected.losses[:num_steps], expected.grad_norms[:num_steps]
    if not (np.isfinite(losses).all() and np.isfinite(norms).all()):
        return failed("the loss or its gradients aren't finite")
    loss_error = float(np.abs(losses - other_losses).max() / np.abs(other_losses).max())
    norm_error = float((np.abs(norms - other_norms) / np.maximum(other_norms, 1e-30)).max())
    figures = {
        "losses": losses.tolist(),
        "expected_losses": other_losses.tolist(),
        "grad_norms": norms.tolist(),
        "expected_grad_norms": other_norms.tolist(),
        "num_skipped": curve.num_skipped,
    }
    if not loss_error <= loss_bound:
        return failed(
            f"the losses of {num_steps} steps differ by {loss_error:.2%} from those of {other}; {loss_bound:.1%} is "
            "allowed",
            **figures,
        )
    if not norm_error <= norm_bound:
        return failed(
            f"the gradient norms of {num_steps} steps differ by {norm_error:.2%} from those of {other}; "
            f"{norm_bound:.1%} is allowed",
            **figures,
        )
    skipped_steps = f", {curve.num_skipped} skipped" if curve.num_skipped else ""
    return ok(
        f"loss {losses[0]:.4f} to {losses[-1]:.4f}{skipped_steps}; losses within {loss_error:.1e} and gradient norms "
        f"within {norm_error:.1e} of {other}",
        **figures,
    )


def check_speed(subject: Subject) -> Result:
    """The speed of 20 steps, whether starting one waits for the GPU, and what overlapping the exchange gains."""
    config, mesh = subject.step_config, subject.mesh
    step = main_program(subject)
    seconds, loss = _seconds_per_step(step)
    if not math.isfinite(loss):
        return failed("the loss isn't finite")
    images_per_s = config.data.global_batch_size / seconds
    teacher = None if subject.step_teacher is None else subject.step_teacher.model
    flops = step_flops(at_size(config.model, subject.image_size), teacher, config.lora)
    mfu = model_flops_utilization(flops, mesh, subject.precision, images_per_s)
    figures: dict[str, Any] = {"images_per_s": images_per_s, "mfu": mfu, "seconds_per_step": seconds}
    parts = [f"{images_per_s:.0f} images/s with {config.model.depth} blocks"]
    parts += [] if mfu is None else [f"MFU {mfu:.1%}"]
    if subject.on_gpu and step.num_kernels() > _MAX_QUEUED:
        parts.append("whether a step's start waits for the GPU can't be told: the queue is shorter than a step")
    elif subject.on_gpu:
        call_s, rest_s = _seconds_behind_other_work(step)
        figures |= {"start_seconds": call_s, "device_seconds_left": rest_s}
        if call_s > rest_s:
            return failed(
                f"{', '.join(parts)}; starting a step waits for the GPU ({1e3 * call_s:.0f} ms behind "
                f"{1e3 * _BUSY_S:.0f} ms of other work)",
                **figures,
            )
        parts.append(f"a step starts in {1e3 * call_s:.1f} ms without waiting for the GPU")
    if subject.on_gpu and mesh.dp_size > 1 and config.parallel.overlap_gradients and config.parallel.bucket_mb > 0.0:
        serial = step_program(subject, with_keys(config, parallel__overlap_gradients=False), subject.precision)
        figures["overlap_gain"] = gain = _seconds_per_step(serial)[0] / seconds - 1.0
        parts.append(f"overlap gains {gain:.1%}")
    return ok(", ".join(parts), **figures)


def _seconds_per_step(step: StepProgram) -> tuple[float, float]:
    """Return the seconds of a step among steps that nothing waits for, and the last loss."""
    for _ in range(_NUM_WARM_UP_STEPS):
        step.finish(step.start())
    step.mesh.barrier()
    started = time.perf_counter()
    losses = [step.start() for _ in range(NUM_TIMED_STEPS)]
    loss, _ = step.finish(losses[-1])
    step.mesh.barrier()
    return (time.perf_counter() - started) / NUM_TIMED_STEPS, loss


def _seconds_behind_other_work(step: StepProgram) -> tuple[float, float]:
    """Start a step behind other work of the GPU: return how long that took, and how long the GPU then still worked."""
    gpu_kernels.wait()
    gpu_kernels.keep_busy(_BUSY_S)
    started = time.perf_counter()
    loss = step.start()
    returned = time.perf_counter()
    step.finish(loss)
    return returned - started, time.perf_counter() - returned
