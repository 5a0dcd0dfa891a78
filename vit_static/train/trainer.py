"""The training loop, for pretraining and finetuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from vit_static.checkpoint.folder import latest_checkpoint, open_shards
from vit_static.checkpoint.resume import read_progress
from vit_static.checkpoint.writer import CheckpointWriter
from vit_static.common.errors import DataError
from vit_static.common.library_output import redirect_library_output
from vit_static.common.text import counted, duration
from vit_static.config.schema import Config
from vit_static.data.loader import TrainLoader
from vit_static.data.mixup import Mixup
from vit_static.data.open_set import check_command
from vit_static.model.draws import at_size
from vit_static.model.lora import add_adapters
from vit_static.model.variants import step_flops
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, gpu_capability, seed_everything, start_mesh
from vit_static.program.cpu.product_choice import choices
from vit_static.program.cpu.waiting import ThreadWaiting
from vit_static.program.distillation import build_teacher
from vit_static.program.precision import Precision, choose_attention, choose_precision
from vit_static.program.program import Program
from vit_static.report.run_log import EARLY_STOP, METRICS_FORMAT
from vit_static.train.checkpointing import Checkpointer
from vit_static.train.evaluate import Evaluator, eval_batch_size
from vit_static.train.log import RunLog
from vit_static.train.metrics import MetricLogger
from vit_static.train.nonfinite import NonFiniteGuard, NonFiniteStep
from vit_static.train.profiler import StepTrace
from vit_static.train.results import describe_early_stop, describe_results, merge_weights
from vit_static.train.run_dir import RunDir
from vit_static.train.run_info import describe_run
from vit_static.train.run_spec import RunSpec
from vit_static.train.start_point import Start, StartPoint, check_settings, resolve_model, verify_checkpoint
from vit_static.train.stop import BAD_IMAGE, NONFINITE, ON_REQUEST, UNSAVED, SignalWatch, StopController
from vit_static.train.summary import start_screen
from vit_static.train.teacher import check_teacher, describe_teacher
from vit_static.train.trackers import make_trackers
from vit_static.weights.teacher import TeacherSource, find_teacher


def train(config: Config, resume: str = "auto") -> bool:
    """Train to the end of the schedule or to an early stop, and return True. On SIGTERM, SIGINT or SIGHUP, save the
    state and return False.

    `resume` is "auto" (the latest checkpoint of the run's folder, if there is one), "never" (start at step 0), or the
    path of a checkpoint or of a run's folder. Raises UserError for a mistake in the config or data, before anything is
    built; DataError, on all ranks and after saving, for an unreadable image; RunFailed if the state can't be saved or
    gradients aren't finite.
    """
    config = resolve_model(config, resume)
    check_settings(config, resume)
    teacher = find_teacher(config)
    spec = RunSpec.resolve(config)
    check_teacher(teacher, spec)
    with RunDir.locked(config, spec.rank) as run:
        start_point = StartPoint.find(config, run, resume, None if teacher is None else teacher.record)
        with Trainer.build(spec, run, start_point, teacher) as trainer:
            is_complete = trainer.fit()
    trainer.stop.raise_if_failed(trainer.progress.step, check_command(config.data), run.resume_hint())
    return is_complete


class Trainer:
    """One training run. A checkpoint stores `progress` and the program's state."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunDir,
        mesh: Mesh,
        program: Program,
        precision: Precision,
        start: Start,
        stack: ExitStack,
        teacher: TeacherSource | None = None,
    ) -> None:
        """`stack` closes the log, the trace and the signal handlers when the run ends."""
        config, done_steps = spec.config, start.progress.step
        self.spec, self.run, self.mesh, self.program = spec, run, mesh, program
        self.progress = start.progress
        self.loader = self._train_loader()
        self.mixup = Mixup(config.augment, config.model.num_classes, config.seed)
        self.evaluator = Evaluator(config, spec.val_images, mesh, spec.extra_sets)
        signals = stack.enter_context(SignalWatch(config.train.stop_timeout_s))
        log = stack.enter_context(RunLog(run.path, spec.rank, make_trackers(config, done_steps)))
        teacher_model = None if teacher is None else teacher.model
        self.metrics = MetricLogger(
            log, spec, mesh, done_steps, precision.dtype,
            lambda size: step_flops(at_size(config.model, size), teacher_model, config.lora),
        )  # fmt: skip
        record = None if teacher is None else teacher.record
        writer = CheckpointWriter(
            config, mesh, spec.train_images.class_names, start.run_id, record, start.lora_base, choices.record
        )
        self.checkpoints = Checkpointer(writer, spec, self.metrics, saved=start.progress)
        signals.describe = self.describe_stop
        self.nonfinite = NonFiniteGuard(spec, run, mesh.first_non_none)
        self.stop = StopController(
            mesh.first_non_none,
            lambda: signals.has_received,
            stops_on_failed_save=config.checkpoint.on_failure == "stop",
        )
        self.profiler = stack.enter_context(StepTrace(config.train.profile_steps, run.path, mesh, self.metrics.say))
        self._waiting = ThreadWaiting() if mesh.device == "cpu" else None
        self._image_size: tuple[int, int] | None = None  # of the last step
        # eval.metric of the last step's weights, if they were evaluated beside their moving average
        self._weights_value: float | None = None
        self._loss: Any = None  # loss of the last step; read only when logging, because reading it waits for the device

    @classmethod
    @contextmanager
    def build(
        cls, spec: RunSpec, run: RunDir, start_point: StartPoint, teacher: TeacherSource | None = None
    ) -> Iterator[Trainer]:
        """Connect the ranks, build model and program (compiled on first use), restore the state, open the log."""
        config = spec.config
        mesh = start_mesh(
            spec.mesh_shape, config.device, config.parallel.collective_timeout_s, config.kernels.deterministic
        )
        precision = choose_precision(
            config.amp, mesh.device, config.kernels, config.parallel, gpu_capability=gpu_capability(mesh)
        )
        seed_everything(config.seed)
        attention = choose_attention(config.model, precision, config.parallel, config.kernels, mesh.device)
        model = VisionTransformer(config.model, attention)
        start = start_point.load(spec, mesh, model)
        add_adapters(model, config.lora, start.new)
        num_parameters = sum(math.prod(parameter.shape) for parameter in model.parameters())
        choices.keep(start.kernels)
        redirect_library_output(run.log_path(spec.rank))
        program = _build_program(spec, mesh, model, precision, teacher, start.progress.step)
        shards = start_point.open()
        if shards is not None:
            program.restore(shards)
        run.prepare(
            config,
            spec.train_images.class_names,
            start.progress,
            spec.has_ended(start.progress),
            start_point.archive_after(start.progress),
        )
        if run.is_writer and start.init_report is not None:
            start.init_report.write(run.path / "init.json")
        mesh.barrier()
        with ExitStack() as stack:
            trainer = cls(spec, run, mesh, program, precision, start, stack, teacher)
            trainer._announce(start, precision, num_parameters, teacher)
            yield trainer

    def fit(self) -> bool:
        """Train until the run has ended (RunSpec.has_ended) or a stop is requested. Return whether it has ended."""
        batch = self.next_batch()
        while True:
            due = self.spec.due(self.progress, self.metrics.logged_step)
            if due.log:  # only logging and the work below wait for the device
                self.metrics.log_train(self.progress, self.program, self._loss, self.loader.seconds_waited)
            with self.metrics.not_training():
                if due.any or self.stop.requested:
                    bad_step = self._check_finite(due.log)  # before a non-finite state is evaluated or saved
                    if bad_step is not None and self.roll_back(bad_step):
                        batch = self.next_batch()
                        self.metrics.restart(self.progress.step, self.loader.seconds_waited)
                        continue
                is_best = due.eval and not self.stop.requested and self.evaluate()
                has_ended = self.spec.has_ended(self.progress)  # an evaluation may have been one too many
                if self.stop.may_save and (self.stop.requested or due.save or has_ended or is_best):
                    with self.profiler.span("copy for the checkpoint"):
                        self.checkpoints.save(self.program, self.progress)
                if has_ended or self.stop.requested:
                    return self.finish()
                self.checkpoints.log_save_results()
                self._start_image_size()
            step = self.progress.step
            if self._waiting is not None:
                self._waiting.update()
            with self.profiler.step(step + 1):
                self._loss = self.program.train_step(*self.mixup(batch, step), step)
            self.progress = replace(self.progress, step=step + 1)
            self.metrics.advance_bar()
            batch = self.next_batch()

    def next_batch(self) -> Any:
        """Return the next batch, and agree with all ranks on whether to stop.

        None after the last step, and on a rank that can't read its batch.
        """
        if self.progress.step >= self.spec.total_steps:
            return None
        batch, problem = None, None
        with self.profiler.span("wait for data"):
            try:
                batch = next(self.loader)
            except DataError as error:
                problem = str(error)
        self.stop.poll(problem, self.checkpoints.problem)
        return batch

    def _start_image_size(self) -> None:
        """Compile the program for the next step's images, and log it, if they have another size than the last ones."""
        step = self.progress.step
        size = self.spec.image_size_at(step)
        if size != self._image_size and len(self.spec.phases) > 1:
            self.program.prepare_training(size)
            is_new = step == self.spec.phase_at(step).start  # not so after a resume within a phase
            self.metrics.log_image_size(step, size, self.program.compile_seconds, is_new=is_new)
        self._image_size = size

    def roll_back(self, bad_step: NonFiniteStep) -> bool:
        """Restore the last checkpoint and skip the bad batch. If that isn't possible, request a stop and return False.

        Waits first for a checkpoint that is still being written.
        """
        self.checkpoints.wait()
        checkpoint = latest_checkpoint(self.run.path)
        if checkpoint is None or not self.nonfinite.may_roll_back(self.progress):
            self.stop.request(NONFINITE, bad_step.message)
            return False
        verify_checkpoint(checkpoint, self.mesh)
        saved, _ = read_progress(checkpoint)
        self.progress = replace(saved, skipped_batches=(*self.progress.skipped_batches, bad_step.batch))
        self.program.restore(open_shards(checkpoint))
        self.program.clear_nonfinite()
        self.checkpoints.restored(saved)
        self.loader = self._train_loader()
        self.metrics.log_event(self.progress.step, "rolled back", nonfinite_step=bad_step.step)
        self.metrics.say(
            f"{bad_step.message}; resuming from {checkpoint} without that batch (rollback "
            f"{len(self.progress.skipped_batches)} of at most {self.spec.config.train.max_rollbacks})"
        )
        return True

    def evaluate(self) -> bool:
        """Evaluate, log the metrics and write the report. Return whether the result is the run's best so far."""
        step = self.progress.step
        try:
            with self.profiler.span("evaluate"):
                result = self.evaluator.evaluate(self.program)
        except DataError as error:  # raised on all ranks
            self.stop.request(BAD_IMAGE, str(error))
            return False
        config = self.spec.config
        metric = config.selection_metric
        value = result.selection_metrics.value_of(metric)
        self._weights_value = None if result.ema is None else result.metrics.value_of(metric)
        self.progress = self.progress.after_evaluation(metric, value, config.train.min_delta)
        is_best = self.progress.best_step == step
        self.metrics.log_eval(step, result.metrics, result.ema, is_best)
        self.metrics.log_extra(step, result.extra)
        if self.run.is_writer:
            self.metrics.write_report(lambda: self.evaluator.analyze_errors(result, step))
        self.mesh.first_non_none(None)  # wait on the host for the report, not in a collective on the device
        return is_best

    def finish(self) -> bool:
        """Wait for the last checkpoint; merge the weights if the run has ended, or log why it stopped."""
        config, step = self.spec.config, self.progress.step
        self.checkpoints.wait()
        self.checkpoints.log_save_results()
        self.profiler.close()
        self.metrics.close_bar()
        if self.checkpoints.problem is not None and self.stop.may_save:
            self.stop.request(UNSAVED, self.checkpoints.problem)
        if not self.stop.requested:
            if self.run.is_writer and config.lora.rank == 0:
                merge_weights(self.run.path, self.progress, has_ema=config.optim.ema_decay > 0.0)
            if self.spec.stops_early(self.progress):
                early_stop = describe_early_stop(self.spec, self.progress)
                self.metrics.log_event(step, EARLY_STOP, message=early_stop)
                self.metrics.say(early_stop)
            self.metrics.log_event(step, "finished", seconds=self.metrics.seconds)
            costs = self.checkpoints.describe()
            if costs is not None:
                self.metrics.say(f"checkpoints: {costs}")
            results = describe_results(self.spec, self.progress, self._weights_value)
            self.metrics.say(f"done in {duration(self.metrics.seconds)}; {results}")
        else:
            self.metrics.log_event(step, str(self.stop.reason), problem=self.stop.message or None)
        if self.stop.reason == ON_REQUEST:
            self.metrics.say(
                f"stopped by a signal at step {step}; the state is saved, and the same command resumes from there"
            )
        if self.run.is_writer:
            self.metrics.write_report()
        self.mesh.barrier()
        return not self.stop.requested

    def describe_stop(self) -> str:
        """Return what is left to do before the run stops on request, for the user who waits for it."""
        folder, step = self.run.path / "checkpoints", self.checkpoints.writing_step
        if step is not None and step == self.progress.step:
            return f"the checkpoint of step {step} is being written to {folder}"
        return f"after step {self.progress.step + 1}, or the evaluation, the state is saved in {folder}"

    def _check_finite(self, has_logged: bool) -> NonFiniteStep | None:
        """Return the first step with non-finite gradients, or None; its loss is read only if it has been logged."""
        loss = self.metrics.loss if has_logged else None
        return self.nonfinite.check(self.program.first_nonfinite_step(), self.progress, loss)

    def _train_loader(self) -> TrainLoader:
        config = self.spec.config
        return TrainLoader(
            self.spec.train_images,
            self.spec.largest_image_size,
            config.data,
            config.augment,
            seed=config.seed,
            start_step=self.progress.step,
            skipped_batches=self.progress.skipped_batches,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp_size,
            device_id=self.mesh.device_id,
            image_size_at=self.spec.image_size_at if len(self.spec.phases) > 1 else None,
        )

    def _announce(self, start: Start, precision: Precision, num_parameters: int, teacher: TeacherSource | None) -> None:
        """Print the start screen and log the event `started` or `resumed`."""
        spec, metrics, step = self.spec, self.metrics, self.progress.step
        info = describe_run(spec.config, self.mesh, f"{precision.level} {precision.dtype}")
        row = None if teacher is None else describe_teacher(teacher, spec.config.distill)
        metrics.say(start_screen(spec, step, start.description, num_parameters, info, metrics.num_columns, row))
        notes = () if start.init_report is None else start.init_report.notes
        for note in (*start.changed_settings, *spec.notes, *notes, *(() if teacher is None else teacher.notes)):
            metrics.say(f"note: {note}")
        event = "resumed" if start.is_resumed else "started"
        metrics.log_event(
            step, event, format=METRICS_FORMAT, total_steps=spec.total_steps, num_parameters=num_parameters,
            train_flops_per_image=metrics.train_flops_per_image(step), **info,
        )  # fmt: skip
        if spec.has_ended(self.progress) and self.progress.evaluated_step == step:
            key = "patience" if spec.stops_early(self.progress) else spec.limiting_key
            metrics.say(
                f"this run has ended already, after {counted(step, 'step')}: set a larger train.{key}, or start again "
                "with --resume never"
            )
        if self.progress.best_value is not None and self.progress.metric != spec.config.selection_metric:
            metrics.say(
                f"eval.metric is {spec.config.selection_metric} now, and was {self.progress.metric}: the best "
                "checkpoint is chosen among the evaluations from here on"
            )
        metrics.write_report()
        metrics.open_bar(step)


def _build_program(
    spec: RunSpec,
    mesh: Mesh,
    model: VisionTransformer,
    precision: Precision,
    teacher: TeacherSource | None,
    done_steps: int,
) -> Program:
    config = spec.config
    return Program.for_training(
        config,
        model,
        mesh,
        precision,
        learning_rate=spec.lr_at,
        warmup_steps=spec.warmup_steps,
        loss_weights=spec.loss_weights,
        eval_batch_size=eval_batch_size(config, mesh),
        teacher=None if teacher is None else build_teacher(teacher, config, precision, mesh.device),
        train_image_size=spec.image_size_at(done_steps),
    )
