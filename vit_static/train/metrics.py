"""Evaluation metrics, throughput, and the log of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vit_static.checkpoint.progress import Progress
from vit_static.common.errors import describe_error
from vit_static.common.hardware import peak_flops
from vit_static.common.text import counted, duration, flops_text
from vit_static.config.data_schema import SelectionMetric
from vit_static.parallel.mesh import Mesh, device_name
from vit_static.program.program import Program
from vit_static.report.class_metrics import average_precision
from vit_static.report.class_quality import calibration, class_counts
from vit_static.report.error_analysis import ErrorAnalysis
from vit_static.report.metric_names import METRIC_TITLES, format_metric
from vit_static.report.predictions import Predictions
from vit_static.report.run_log import EXTRA_EVAL, IMAGE_SIZE
from vit_static.train.extra_eval import ExtraResult
from vit_static.train.log import RunLog
from vit_static.train.run_info import memory_mb
from vit_static.train.run_spec import RunSpec
from vit_static.train.summary import expected_end


@dataclass(frozen=True)
class EvalMetrics:
    """Metrics of an evaluation, all but the loss in per cent, and the number of images that they cover.

    Macro averages are over the classes that occur, `map` over those with images. None stands for what isn't defined:
    balanced accuracy needs one label per image, mAP and micro averages several. With several, `ece` is that of all
    classes' probabilities, not of the top class's.
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    macro_f1: float | None = None
    balanced_accuracy: float | None = None
    ece: float | None = None  # expected calibration error
    map: float | None = None
    macro_precision: float | None = None
    macro_recall: float | None = None
    micro_f1: float | None = None
    micro_precision: float | None = None
    micro_recall: float | None = None

    @classmethod
    def of(cls, predictions: Predictions, threshold: float = 0.5) -> EvalMetrics:
        """Compute the metrics. `threshold`: the probability from which one of several classes is predicted."""
        shares: dict[str, float] = {
            "top1": float((predictions.label_ranks < 1).mean()),
            "top5": float((predictions.label_ranks < 5).mean()),
        }
        counts = class_counts(predictions, threshold)
        if counts is not None:
            shares |= {"macro_f1": counts.macro(counts.f1), "ece": calibration(predictions).ece}
        if predictions.labels is not None and counts is not None:
            shares["balanced_accuracy"] = counts.balanced_accuracy
        elif counts is not None and predictions.is_label is not None and predictions.logits is not None:
            shares["map"] = float(np.nanmean(average_precision(predictions.is_label, predictions.logits)))
            for name in ("precision", "recall"):
                shares[f"macro_{name}"] = counts.macro(getattr(counts, name))
            for name in ("f1", "precision", "recall"):
                shares[f"micro_{name}"] = float(getattr(counts.micro(), name)[0])
        return cls(
            loss=float(predictions.losses.mean()),
            num_images=len(predictions.label_ranks),
            **{name: 100.0 * share for name, share in shares.items()},
        )

    def values(self) -> dict[str, Any]:
        """Return the metrics that are defined, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def value_of(self, metric: SelectionMetric) -> float:
        """Return the value of eval.metric."""
        value: float = getattr(self, metric)
        return value

    def describe(self, selection_metric: SelectionMetric = "top1", *, num_classes: int) -> str:
        """Return one line for people. It begins with `selection_metric` if this is defined and not shown anyway.

        Of at most five classes there is no top-5, which would always be 100 %.
        """
        top5 = f"top-5 {self.top5:.2f} %  " if num_classes > 5 else ""
        text = f"top-1 {self.top1:.2f} %  {top5}loss {self.loss:.4f}"
        if self.map is not None:
            text = f"mAP {self.map:.2f} %  macro F1 {self.macro_f1:.2f} %  micro F1 {self.micro_f1:.2f} %  {text}"
        elif selection_metric not in ("top1", "loss") and getattr(self, selection_metric) is not None:
            title = METRIC_TITLES[selection_metric]
            text = f"{title} {format_metric(selection_metric, self.value_of(selection_metric))}  {text}"
        return f"{text}  over {counted(self.num_images, 'image')}"


class ThroughputMeter:
    """Images per second, and the share of the time spent waiting for data, between log steps."""

    def __init__(self) -> None:
        self.reset(0.0)

    def reset(self, seconds_waited: float) -> None:
        """Start a new interval; `seconds_waited` is the loader's running total."""
        self._started = time.perf_counter()
        self._waited = seconds_waited
        self._paused = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside from the current interval."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - max(began, self._started)

    def read(self, num_images: int, seconds_waited: float) -> tuple[float, float]:
        """Return (images per second, data wait 0-1) since the last reset."""
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        return num_images / seconds, min(max((seconds_waited - self._waited) / seconds, 0.0), 1.0)


class MetricLogger:
    """Logs one run's training steps, evaluations and events, and measures its throughput."""

    def __init__(
        self,
        log: RunLog,
        spec: RunSpec,
        mesh: Mesh,
        start_step: int,
        dtype: str,
        flops_per_image: Callable[[tuple[int, int]], int],
    ) -> None:
        """`dtype`: that of the matrix products, for the MFU. `flops_per_image`: a training step's operations per image
        of this height and width, a teacher's included."""
        self.logged_step = start_step
        self.loss: float | None = None  # the last logged step's, averaged over all ranks
        self._log, self._spec, self._mesh = log, spec, mesh
        self._timed_from = start_step, 0.0  # the step, and the seconds at which it was done, for the expected end
        self._has_said_end = False
        self._flops_per_image = {phase.image_size: flops_per_image(phase.image_size) for phase in spec.phases}
        self._peak_flops = peak_flops(device_name(mesh), dtype)  # FLOP/s per device; None where unknown
        self._meter, self._started = ThroughputMeter(), time.perf_counter()

    def train_flops_per_image(self, step: int) -> int:
        """Return the operations per image of the step that follows `step` done ones."""
        return self._flops_per_image[self._spec.image_size_at(step)]

    def _mean_flops_per_image(self, start: int, end: int) -> float:
        """Return the mean of `train_flops_per_image` over the steps after `start` done ones until `end`."""
        num_steps = {phase: max(min(phase.end, end) - max(phase.start, start), 0) for phase in self._spec.phases}
        total = sum(count * self._flops_per_image[phase.image_size] for phase, count in num_steps.items())
        return total / max(sum(num_steps.values()), 1)

    @property
    def seconds(self) -> float:
        """Since the run started."""
        return time.perf_counter() - self._started

    @property
    def num_columns(self) -> int:
        """Width of the terminal; very large for files."""
        return self._log.num_columns

    def say(self, text: str) -> None:
        self._log.say(text)

    def log_train(self, progress: Progress, program: Program, loss: Any, seconds_waited: float) -> None:
        """Log the last training step. The only place between evaluations and saves that waits for the device.

        `seconds_waited` is the loader's running total. All ranks call it together.
        """
        step, spec = progress.step, self._spec
        self.loss = self._mesh.mean(program.loss_value(loss))
        images_per_s, data_wait = self._meter.read((step - self.logged_step) * spec.batch_size, seconds_waited)
        peak, flops = self._peak_flops, self._mean_flops_per_image(self.logged_step, step)
        values: dict[str, Any] = {
            "loss": self.loss,
            **{name: self._mesh.mean(value) for name, value in program.loss_parts().items()},
            "lr": spec.lr_at(step - 1),
            "grad_norm": program.grad_norm(),
            "images_per_s": images_per_s,
            "data_wait": data_wait,
            "mfu": None if peak is None else images_per_s * flops / (peak * self._mesh.world_size),
            "memory_mb": memory_mb(self._mesh),
            "seconds": self.seconds,
        }
        seconds_left = None
        if step > 1:  # the first step compiles the program, so its speed says nothing about the others
            seconds_per_step = (self.seconds - self._timed_from[1]) / (step - self._timed_from[0])
            # A later step on larger images is expected to take longer by its operations.
            relative = self._mean_flops_per_image(step, spec.total_steps)
            relative /= self._mean_flops_per_image(self._timed_from[0], step)
            seconds_left = seconds_per_step * (spec.total_steps - step) * relative
        self._log.record("train", step, spec.epoch(step), **values)
        if seconds_left and not self._has_said_end:
            self._has_said_end = True
            self.say(expected_end(seconds_left))
        self._log.say_train_step(step, spec.total_steps, values, seconds_left)
        self._log.update_report()
        if step == 1:
            self._timed_from = step, self.seconds
        self.logged_step = step
        self._meter.reset(seconds_waited)

    def log_eval(self, step: int, metrics: EvalMetrics, ema: EvalMetrics | None, is_best: bool) -> None:
        """Log an evaluation of the weights and, if there is one, of their moving average."""
        selection_metric = self._spec.config.selection_metric
        num_classes = self._spec.config.model.num_classes
        values, text = metrics.values(), metrics.describe(selection_metric, num_classes=num_classes)
        if ema is not None:
            values |= {f"ema_{name}": value for name, value in ema.values().items() if name != "num_images"}
            text += f"; average: {ema.describe(selection_metric, num_classes=num_classes)}"
        epoch = self._spec.epoch(step)
        self._log.record("eval", step, epoch, **values, seconds=self.seconds)
        self.say(f"epoch {epoch:.1f}  {text}{'  (best)' if is_best else ''}")

    def log_extra(self, step: int, results: Sequence[ExtraResult]) -> None:
        """Log the results on further validation sets (eval.also), one line each."""
        for result in results:
            self._log.record(
                EXTRA_EVAL, step, self._spec.epoch(step), tag=f"{EXTRA_EVAL}/{result.name}", set=result.name,
                **result.values(),
            )  # fmt: skip
            self.say(f"    {result.describe(self._spec.config.model.num_classes)}")

    def log_image_size(self, step: int, image_size: tuple[int, int], compile_seconds: float, *, is_new: bool) -> None:
        """Log that the steps after `step` train on images of this height and width (train.image_sizes).

        An event is recorded only if the size `is_new`, and not that of the steps before `step`, too.
        """
        flops = self.train_flops_per_image(step)
        if is_new:
            values = {"train_flops_per_image": flops, "compile_seconds": compile_seconds}
            self.log_event(step, IMAGE_SIZE, image_size=list(image_size), **values)
        self.say(
            f"images of {image_size[0]}x{image_size[1]} from step {step + 1} on: {flops_text(flops)} per image "
            f"with the backward pass; the program was compiled in {duration(compile_seconds)}"
        )
        self._timed_from = self._timed_from[0], self._timed_from[1] + compile_seconds

    def log_event(self, step: int, event: str, **values: Any) -> None:
        """Log something that happens at most a few times in a run."""
        self._log.record("event", step, self._spec.epoch(step), event=event, **values)

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Exclude the time inside, of an evaluation or a save, from the throughput."""
        with self._meter.paused():
            yield

    def restart(self, step: int, seconds_waited: float) -> None:
        """Continue from an earlier step after a rollback."""
        self.logged_step = step
        self._log.reopen_bar(self._spec.total_steps, step)
        self._meter.reset(seconds_waited)

    def open_bar(self, step: int) -> None:
        self._log.open_bar(self._spec.total_steps, step)

    def advance_bar(self) -> None:
        self._log.advance_bar()

    def close_bar(self) -> None:
        self._log.close_bar()

    def write_report(self, analyze_errors: Callable[[], ErrorAnalysis] | None = None) -> None:
        """Write the run's page, and the error analysis of a new evaluation; on rank 0."""
        analysis = None
        if analyze_errors is not None:
            with self.log_exceptions("the error analysis"):
                analysis = analyze_errors()
        self._log.write_report(analysis)

    @contextmanager
    def log_exceptions(self, subject: str) -> Iterator[None]:
        """Log an exception instead of raising it: the run doesn't end for something that can be made again."""
        try:
            yield
        except Exception as error:  # anything, from a full disk to a mistake of ours
            self.say(f"{subject} could not be written: {describe_error(error)}")
