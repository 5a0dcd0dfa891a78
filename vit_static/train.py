"""The one training loop, for pretraining and finetuning: read it top to bottom."""

from __future__ import annotations

import math
import os
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vit_static import checkpoint, environment, flops, mistakes, report, runtime
from vit_static import config as config_module
from vit_static import mesh as mesh_module
from vit_static import model as model_module
from vit_static import step as step_module
from vit_static.checkpoint import DataPosition, Progress
from vit_static.config import Config, ConfigError, RunFailed
from vit_static.data.feed import Batch, TrainFeed
from vit_static.data.images import ImageSet
from vit_static.data.lists import DataError
from vit_static.data.order import TrainOrder
from vit_static.data.sets import check_command, open_set
from vit_static.evaluate import Evaluation, all_answers, describe, eval_batch_size, eval_feed, mistakes_of
from vit_static.files import lock, write_json
from vit_static.log import Meter, RunLog, duration
from vit_static.loss import Criterion
from vit_static.mesh import Mesh
from vit_static.mixing import Mixer
from vit_static.saving import Saver
from vit_static.schedule import learning_rate
from vit_static.screen import expected_end, start_screen
from vit_static.step import Program, choose_precision
from vit_static.tracing import StepTrace
from vit_static.weight_files import WeightsError
from vit_static.weights import init_from, write_pdparams


def train(config: Config, resume: str = "auto") -> bool:
    """Trains until the end of the schedule, True, or until SIGTERM or SIGINT, whose state is saved, False.

    `resume` says from where to go on: auto, the latest checkpoint of the run's folder, if there is one; never; or the
    path of a checkpoint or of a run. Raises DataError, on all ranks and with the state saved, when one of them meets an
    image that can't be read, RunFailed when the state can't be saved, and where gradients aren't finite.
    """
    # -- what is to be done: found out, and every mistake in it, before anything is built ------------------------
    rank, world_size = mesh_module.rank_and_world_size()
    variant = model_module.variant_of(config.model)
    sizes = mesh_module.check(config.parallel, world_size, config.data.global_batch_size, variant)
    if config.mixes and config.data.global_batch_size // sizes.dp % 2:
        raise ConfigError(
            f"data.global_batch_size = {config.data.global_batch_size}: each of {sizes.dp} ranks gets an odd number "
            "of images each, and augment.mixup_alpha and cutmix_alpha mix images in pairs; set a multiple of "
            f"{2 * sizes.dp}"
        )
    shape = model_module.shape_of(config.model)
    train_images = open_set(config.data, "train", config.model.num_classes)
    val_images = open_set(config.data, "val", config.model.num_classes)
    batch_size = config.data.global_batch_size
    total_steps = config_module.total_steps(config.train, len(train_images), batch_size)
    warmup_steps = config_module.warmup_steps(config.schedule, len(train_images), batch_size)
    eval_every_images = config.eval.every_epochs * len(train_images)

    def rate(step: int) -> float:
        return learning_rate(step, total_steps, config.optim, config.schedule, warmup_steps)

    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(run_folder(config.run_dir))
        newest = checkpoint.to_resume(config.run_dir, resume)
        if newest is not None:
            look_through(newest)
            checkpoint.check_same_run(newest, config)

        # -- the processes ---------------------------------------------------------------------------------------
        mesh = mesh_module.start(sizes, config.device)
        precision = choose_precision(config.amp, mesh.device, config.kernels, config.parallel)

        # -- the model, and what it starts from: a checkpoint > init.from > fresh weights ------------------------
        mesh_module.seed_everything(config.seed)
        model = model_module.build(
            config.model, step_module.choose_attention(config.model, config.parallel, config.kernels, mesh.device)
        )
        progress, run = Progress(step=0), mesh.first(secrets.token_hex(8))
        position = DataPosition(0, len(train_images), train_images.digest(), config.seed, config.augment.repeats)
        start, loading = "fresh weights", None
        if newest is not None:
            run_before = look_through(newest, mesh)
            run = run_before if newest.parent.parent == config.run_dir.resolve() else run
            progress, saved_position = checkpoint.read_progress(newest)
            position = replace(position, position=progress.batch() * batch_size)
            checkpoint.check_same_images(newest, saved_position, position)
            start = f"going on from {newest}"
        elif config.init.from_ is not None:
            loaded = checkpoint.load_weights(Path(config.init.from_))
            loading = init_from(model, config.model, loaded.found, str(loaded.source), config.init, loaded.grid)
            start = f"from {loaded.source}, {loading.format}: {loading.describe()}"

        # -- the program -----------------------------------------------------------------------------------------
        runtime.keep_aside(config.run_dir / "log" / f"rank_{rank}.log")
        program = Program(
            model,
            Criterion(config.loss),
            mesh,
            precision,
            image_size=config.model.image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size(config, mesh),
            optim=config.optim,
            amp=config.amp,
            learning_rate=rate,
            parallel=config.parallel,
            seed=config.seed,
            kernels=config.kernels,
            train_targets=config.train_targets,
            eval_targets=config.eval_targets,
            frozen=config.train.frozen,
        )
        if newest is not None:
            program.restore(checkpoint.open_parts(newest))

        # -- the data --------------------------------------------------------------------------------------------
        def training_feed(progress: Progress) -> TrainFeed:
            return TrainFeed(
                train_images,
                config.model.image_size,
                config.data,
                config.augment,
                seed=config.seed,
                start_step=progress.step,
                left_out=progress.left_out,
                dp_rank=mesh.dp_rank,
                dp_size=mesh.dp_size,
                device_id=mesh.device_id,
            )

        feed = training_feed(progress)
        mixer = Mixer(config.augment, config.model.num_classes, config.seed)
        validation = eval_feed(config, val_images, mesh)

        # -- the run's folder ------------------------------------------------------------------------------------
        if rank == 0:
            # What doesn't belong to what this run goes on from: all, if it begins anew.
            is_own = newest is not None and newest.parent.parent == config.run_dir.resolve()
            if resume != "auto":
                checkpoint.set_aside(config.run_dir, after=progress.step if is_own else -1)
            if progress.step < total_steps:
                # Those of a shorter run that goes on: until its end the latest checkpoint holds the weights.
                for merged in (checkpoint.MERGED, checkpoint.MERGED_AVERAGE):
                    (config.run_dir / merged).unlink(missing_ok=True)
            checkpoint.tidy(config.run_dir, progress)
            config_module.dump(config, config.run_dir / "config.yaml")
            checkpoint.write_class_names(config.run_dir, train_images.class_names)
            if loading is not None:
                loading.write(config.run_dir / "init.json")
        mesh.wait_for_all()
        saver = Saver(config, mesh, train_images.class_names, run)

        # -- the loop --------------------------------------------------------------------------------------------
        train_flops = flops.train_flops(shape)
        peak = flops.peak_flops(mesh_module.device_name(mesh), precision.dtype)
        log = stack.enter_context(RunLog(config.run_dir, rank, config.log.tensorboard, progress.step))
        requests = stack.enter_context(stop_requests())
        trace = stack.enter_context(StepTrace(config.train.profile_steps, config.run_dir, mesh, log.say))
        num_parameters = sum(math.prod(p.shape) for p in model.parameters())
        facts = environment.describe(config, mesh, f"{precision.level} {precision.dtype}")
        num_images = len(train_images), len(val_images)
        plan = total_steps, warmup_steps, progress.step
        device = facts["environment"]["card"] or facts["environment"]["cpu"]
        log.say(start_screen(config, shape, num_parameters, start, num_images, *plan, facts["mesh"], device))
        for note in () if loading is None else loading.notes:
            log.say(f"note: {note}")
        begun = "started" if newest is None else "resumed"
        log.record(
            "event",
            progress.step,
            progress.step * batch_size / len(train_images),
            event=begun,
            total_steps=total_steps,
            num_parameters=num_parameters,
            **facts,
        )
        has_ended = progress.step >= total_steps and progress.evaluated_step == progress.step
        if has_ended:
            log.say("this run has ended already: ask for more epochs, or begin anew with --resume never")
        log.open_bar(total_steps, progress.step)
        meter, started, first_step = Meter(), time.perf_counter(), progress.step
        last_logged, last_saved = progress.step, progress
        loss: Any = None
        unwritten: str | None = None  # why the last checkpoint couldn't be written
        batch, problem = (None, None) if progress.step >= total_steps else take(feed)
        stop: Stop | None = stop_of(mesh.first(problem and [BAD_IMAGE, problem]))
        while True:
            # What is due after so many steps; also after a resume, if the run was stopped before it was done.
            epoch = progress.step * batch_size / len(train_images)
            is_last = progress.step >= total_steps
            images_seen = progress.step * batch_size
            passed_epoch = images_seen // eval_every_images > max(images_seen - batch_size, 0) // eval_every_images
            every = config.checkpoint.every_steps
            is_due = passed_epoch if every is None else progress.step % every == 0 and progress.step > 0
            is_logged = last_logged < progress.step and (progress.step % config.log.every_steps == 0 or is_last)
            is_best = False

            if is_logged:  # with what is due below, the one place where the device is waited for
                mean_loss = mesh.mean(program.scalar(loss))
                num_seen = (progress.step - last_logged) * batch_size
                images_per_s, data_wait = meter.read(num_seen, feed.seconds_waited)
                values: dict[str, Any] = {
                    "loss": mean_loss,
                    "lr": rate(progress.step - 1),
                    "grad_norm": program.grad_norm(),
                    "images_per_s": images_per_s,
                    "data_wait": data_wait,
                    "mfu": None if peak is None else images_per_s * train_flops / (peak * world_size),
                    "memory_mb": environment.memory_mb(mesh),
                    "seconds": time.perf_counter() - started,
                }
                log.record("train", progress.step, epoch, **values)
                seconds_left = (time.perf_counter() - started) / (progress.step - first_step)
                seconds_left *= total_steps - progress.step
                if last_logged == first_step and seconds_left > 0.0:
                    log.say(expected_end(seconds_left))
                log.train_line(progress.step, total_steps, values, seconds_left)
                last_logged = progress.step
                meter.reset(feed.seconds_waited)
            aside = time.perf_counter()

            # Before anything is overwritten: are the weights sound?
            if is_logged or passed_epoch or is_due or is_last or stop is not None:
                loss_is_unsound = is_logged and not math.isfinite(mean_loss)
                unsound = mesh.first(program.first_unsound() or ([progress.step, {}] if loss_is_unsound else None))
                if unsound is not None:
                    unsound_step, norms = unsound
                    bad_batch = replace(progress, step=unsound_step - 1).batch()
                    words = f"the gradients of step {unsound_step} are not finite"
                    if rank == 0:
                        account = Account(unsound_step, rate(unsound_step - 1), norms, bad_batch, batch_size)
                        path = account.write(config.run_dir, train_images, position)
                        words += f" ({path} has their norms by block, and its images)"
                    saver.wait()
                    whole = checkpoint.latest(config.run_dir)
                    may_go_back = len(progress.left_out) < config.train.max_rollbacks
                    if config.train.on_nonfinite == "stop" or whole is None or not may_go_back:
                        stop = Stop(NONFINITE, words)
                    else:
                        look_through(whole, mesh)
                        before, _ = checkpoint.read_progress(whole)
                        progress = replace(before, left_out=(*progress.left_out, bad_batch))
                        program.restore(checkpoint.open_parts(whole))
                        program.forget_unsound()
                        feed = training_feed(progress)
                        batch, problem = take(feed)
                        stop = stop_of(mesh.first(problem and [BAD_IMAGE, problem]))
                        log.record("event", progress.step, epoch, event="rolled back", unsound_step=unsound_step)
                        log.say(
                            f"{words}; going on from {whole} without that batch "
                            f"(rollback {len(progress.left_out)} of at most {config.train.max_rollbacks})"
                        )
                        log.reopen_bar(total_steps, progress.step)
                        last_logged, last_saved = progress.step, before
                        meter.reset(feed.seconds_waited)
                        continue

            if (passed_epoch or is_last) and progress.evaluated_step < progress.step and stop is None:
                try:
                    with trace.span("evaluate"):
                        answers = all_answers(program, validation, mesh)
                    result, averaged = Evaluation.of(answers), None
                    if config.optim.ema_decay > 0.0:
                        with program.averaged():
                            answers = all_answers(program, validation, mesh)
                        averaged = Evaluation.of(answers)
                except DataError as error:
                    stop = Stop(BAD_IMAGE, str(error))
                else:
                    counts = averaged or result  # with an average that is what people will use
                    is_best = progress.best_top1 is None or counts.top1 > progress.best_top1
                    progress = replace(progress, evaluated_step=progress.step)
                    if is_best:
                        progress = replace(progress, best_top1=counts.top1, best_step=progress.step)
                    of_average = (
                        {}
                        if averaged is None
                        else {f"ema_{name}": value for name, value in asdict(averaged).items() if name != "num_images"}
                    )
                    seconds = time.perf_counter() - started
                    log.record("eval", progress.step, epoch, **asdict(result), **of_average, seconds=seconds)
                    said = (
                        describe(result) if averaged is None else f"{describe(result)}; average: {describe(averaged)}"
                    )
                    log.say(f"epoch {epoch:.1f}  {said}{'  (best)' if is_best else ''}")
                    if rank == 0:
                        with told_of(log, "the report"):
                            found = mistakes_of(
                                answers, validation, config.model.num_classes, progress.step, averaged is not None
                            )
                            found.write(config.run_dir / mistakes.FILE)
                            report.write(config.run_dir)
                    mesh.first(None)  # the others wait here, where none is too late, not in a collective of theirs
            if (stop or is_last or is_best or is_due) and progress != last_saved and (not stop or stop.saves):
                position = replace(position, position=progress.batch() * batch_size)
                with trace.span("copy for the checkpoint"):
                    saver.begin(program.state(), progress, position, rate(progress.step))
                last_saved = progress
            if stop is not None or is_last:
                saver.wait()
            unwritten = tell_of(saver, log, len(train_images), batch_size, unwritten)
            meter.pause(time.perf_counter() - aside)
            if stop is not None or is_last:
                break

            assert batch is not None
            step = progress.step
            with trace.step(step + 1):
                loss = program.train_step(*mixer.mixed(batch, step), step)
            progress = replace(progress, step=step + 1)
            log.advance_bar()

            # The device isn't waited for here, but what comes next, and whether a rank must stop.
            if progress.step < total_steps:
                with trace.span("wait for data"):
                    batch, problem = take(feed)
                may_fail = config.checkpoint.on_failure == "continue"
                stop = stop_of(
                    mesh.first(
                        [BAD_IMAGE, problem]
                        if problem
                        else [ON_REQUEST, ""]
                        if requests.received
                        else [UNSAVED, unwritten]
                        if unwritten and not may_fail
                        else None
                    )
                )
        trace.close()
        log.close_bar()

        # -- the end ---------------------------------------------------------------------------------------------
        if unwritten is not None and (stop is None or stop.saves):
            stop = Stop(UNSAVED, unwritten)
        if stop is None:
            last = checkpoint.folder(config.run_dir, progress.step)
            for name, is_average in ((checkpoint.MERGED, False), (checkpoint.MERGED_AVERAGE, True)):
                if rank == 0 and (not is_average or config.optim.ema_decay > 0.0):
                    write_pdparams(checkpoint.merge(last, averaged=is_average), config.run_dir / name)
            log.record("event", progress.step, epoch, event="finished", seconds=time.perf_counter() - started)
            if saver.costs.num_written:
                log.say(f"checkpoints: {saver.costs.describe()}")
            log.say(
                f"done in {duration(time.perf_counter() - started)}; best top-1 "
                f"{'not evaluated' if progress.best_top1 is None else f'{progress.best_top1:.2f} %'}; "
                f"weights in {config.run_dir / 'model.pdparams'}"
            )
        else:
            log.record("event", progress.step, epoch, event=stop.why, problem=stop.words or None)
        if stop is not None and stop.why == ON_REQUEST:
            log.say(f"stopped on request at step {progress.step}, state saved; the same command goes on from there")
        if rank == 0:
            with told_of(log, "the report"):
                report.write(config.run_dir)
        mesh.wait_for_all()
    if stop is not None and stop.why == BAD_IMAGE:
        raise DataError(
            f"{stop.words}. Stopped at step {progress.step}, from which the same command goes on; "
            f"'{check_command(config.data)}' finds all such files"
        )
    if stop is not None and stop.why in (UNSAVED, NONFINITE):
        raise RunFailed(f"{stop.words}. Stopped at step {progress.step}; {what_is_left(config.run_dir)}")
    return stop is None


BAD_IMAGE, ON_REQUEST, UNSAVED, NONFINITE = "bad image", "stopped", "not saved", "not finite"


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its time, and what is to be told of it."""

    why: str
    words: str

    @property
    def saves(self) -> bool:
        """Whether there is a state worth saving, and somewhere to save it."""
        return self.why in (BAD_IMAGE, ON_REQUEST)


def stop_of(agreed: list[str] | None) -> Stop | None:
    return None if agreed is None else Stop(*agreed)


def what_is_left(run_dir: Path) -> str:
    newest = checkpoint.latest(run_dir)
    return "it has no checkpoint" if newest is None else f"the same command goes on from {newest}"


@contextmanager
def run_folder(run_dir: Path) -> Iterator[None]:
    """Makes a run's folder and holds it against every other run, for some seconds waiting for one that is at its end.

    One that stays empty is removed again. Raises ConfigError where another run has it.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    refusal = f"{run_dir}: another run is using this folder; wait for its end, or give this one its own (-o name=...)"
    try:
        with ExitStack() as held:
            try:
                held.enter_context(lock(run_dir, refusal, LOCK_WAIT_S))
            except ValueError as error:
                raise ConfigError(str(error)) from None
            yield
    finally:
        for folder in (run_dir / "checkpoints", *new):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def look_through(path: Path, mesh: Mesh | None = None) -> str:
    """Verifies a checkpoint, each rank a share of its parts, or without a mesh none of them; its run's number. Raises
    WeightsError, the same on all ranks, with what can be done."""
    share = slice(0) if mesh is None else slice(mesh.rank, None, mesh.world_size)
    problem, run = None, ""
    try:
        run = checkpoint.verify(path, share).run
    except WeightsError as error:
        problem = str(error)
    if mesh is not None:
        problem = mesh.first(problem)
    if problem is not None:
        raise WeightsError(f"{problem}; {checkpoint.offer(path)}")
    return run


@dataclass(frozen=True)
class Account:
    """What is to be looked at where a step's gradients aren't finite."""

    step: int
    lr: float
    grad_norms: dict[str, float]  # by block
    batch: int  # its number in the order of the images
    batch_size: int

    def write(self, run_dir: Path, images: ImageSet, position: DataPosition) -> Path:
        """With the names of the batch's images; the file."""
        order = TrainOrder(position.num_images, position.seed, position.repeats)
        numbers = order.images(self.batch * self.batch_size, (self.batch + 1) * self.batch_size)
        # JSON has none for what is no number.
        norms = {block: norm if math.isfinite(norm) else str(norm) for block, norm in self.grad_norms.items()}
        names = [images.name(int(number)) for number in numbers]
        path = run_dir / f"nonfinite_step_{self.step:08d}.json"
        write_json({**asdict(self), "grad_norms": norms, "images": names}, path)
        return path


def tell_of(saver: Saver, log: RunLog, num_images: int, batch_size: int, unwritten: str | None) -> str | None:
    """Logs what has become of checkpoints. Why the last of them couldn't be written, or None if it could."""
    while not saver.written.empty():
        written = saver.written.get()
        unwritten = written.problem
        log.record(
            "event",
            written.step,
            written.step * batch_size / num_images,
            event="checkpoint" if written.problem is None else "no checkpoint",
            seconds_waited=round(written.seconds_waited, 4),
            seconds_written=round(written.seconds_written, 4),
            bytes=written.num_bytes,
            problem=written.problem,
        )
        if written.problem is not None:
            log.say(f"the checkpoint of step {written.step} could not be written: {written.problem}")
    return unwritten


@contextmanager
def told_of(log: RunLog, what: str) -> Iterator[None]:
    """What fails inside is a line of the log: a run doesn't end for something that can be made again."""
    try:
        yield
    except Exception as error:  # anything, a mistake of ours as a full disk
        log.say(f"{what} could not be written: {type(error).__name__}: {error}")


def take(feed: TrainFeed) -> tuple[Batch | None, str | None]:
    """The next batch, or why there is none: what DataError says of an image."""
    try:
        return next(feed), None
    except DataError as error:
        return None, str(error)


LOCK_WAIT_S = 30.0


class StopRequests:
    """Whether SIGTERM or SIGINT has come. A second one ends the process at once, but not one within a second: a
    scheduler and a launcher may both pass the same request on."""

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0

    def receive(self, signum: int, frame: Any) -> None:
        if not self.received:
            self.received, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > 1.0:
            os._exit(128 + signum)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """While open, the two signals are noted instead of ending the process."""
    requests = StopRequests()
    before = {number: signal.signal(number, requests.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
