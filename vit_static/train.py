"""The one training loop, for pretraining and finetuning: read it top to bottom."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vit_static import checkpoint, flops, report
from vit_static import config as config_module
from vit_static import mesh as mesh_module
from vit_static import model as model_module
from vit_static import step as step_module
from vit_static.checkpoint import DataPosition, Progress
from vit_static.config import Config, ConfigError
from vit_static.data.feed import Batch, TrainFeed
from vit_static.data.lists import DataError
from vit_static.data.sets import check_command, open_set
from vit_static.evaluate import describe, eval_batch_size, eval_feed, evaluate
from vit_static.log import Meter, RunLog, duration
from vit_static.loss import Criterion
from vit_static.mixing import Mixer
from vit_static.schedule import learning_rate
from vit_static.step import Program, choose_precision
from vit_static.weights import init_from, write_pdparams


def train(config: Config, resume: bool = True) -> bool:
    """Trains until the end of the schedule, True, or until SIGTERM or SIGINT, whose state is saved, False.

    With `resume` the run goes on from its folder's latest checkpoint, if there is one. Raises DataError, on all ranks
    and with the state saved, when one of them meets an image that can't be read.
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

    # -- the processes -------------------------------------------------------------------------------------------
    mesh = mesh_module.start(sizes, config.device)
    precision = choose_precision(config.amp, mesh.device, config.kernels, config.parallel)

    # -- the model, and what it starts from: this run's latest checkpoint > init.from > fresh weights ------------
    mesh_module.seed_everything(config.seed)
    model = model_module.build(
        config.model, step_module.choose_attention(config.model, config.parallel, config.kernels, mesh.device)
    )
    newest = checkpoint.latest(config.run_dir) if resume else None
    start, loading = "fresh weights", None
    if newest is not None:
        checkpoint.check_same_run(newest, config)
        start = f"going on from {newest}"
    elif config.init.from_ is not None:
        loaded = checkpoint.load_weights(Path(config.init.from_))
        loading = init_from(model, config.model, loaded.found, str(loaded.source), config.init, loaded.grid)
        start = f"from {loaded.source}, {loading.format}: {loading.describe()}"

    # -- the program ---------------------------------------------------------------------------------------------
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
        learning_rate=lambda step: learning_rate(step, total_steps, config.optim, config.schedule, warmup_steps),
        parallel=config.parallel,
        seed=config.seed,
        kernels=config.kernels,
        train_targets=config.train_targets,
        eval_targets=config.eval_targets,
        frozen=config.train.frozen,
    )
    progress = Progress(step=0)
    position = DataPosition(0, len(train_images), train_images.digest(), config.seed, config.augment.repeats)
    if newest is not None:
        progress, saved_position = checkpoint.read_progress(newest)
        position = replace(position, position=progress.step * batch_size)
        checkpoint.check_same_images(newest, saved_position, position)
        state = program.state()
        checkpoint.restore(state, newest, mesh)
        program.set_state(state)

    # -- the data ------------------------------------------------------------------------------------------------
    feed = TrainFeed(
        train_images,
        config.model.image_size,
        config.data,
        config.augment,
        seed=config.seed,
        start_step=progress.step,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device_id=mesh.device_id,
    )
    mixer = Mixer(config.augment, config.model.num_classes, config.seed)
    validation = eval_feed(config, val_images, mesh)

    # -- the run's folder ----------------------------------------------------------------------------------------
    if rank == 0:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            checkpoint.set_aside(config.run_dir)
        elif progress.step < total_steps:
            # Those of a shorter run that goes on: until its end the latest checkpoint holds the weights.
            for merged in (checkpoint.MERGED, checkpoint.MERGED_AVERAGE):
                (config.run_dir / merged).unlink(missing_ok=True)
        config_module.dump(config, config.run_dir / "config.yaml")
        checkpoint.write_class_names(config.run_dir, train_images.class_names)
        if loading is not None:
            loading.write(config.run_dir / "init.json")
    mesh.wait_for_all()

    # -- the loop ------------------------------------------------------------------------------------------------
    train_flops = flops.train_flops(shape)
    peak = flops.peak_flops(mesh_module.device_name(mesh), precision.dtype)
    with RunLog(config.run_dir, rank, config.log.tensorboard) as log, stop_requests() as requests:
        log.say(
            f"{config.name}: ViT {config.model.variant} {shape.width} wide, {shape.depth} deep, "
            f"{sum(math.prod(p.shape) for p in model.parameters()) / 1e6:.2f} M parameters, "
            f"{train_flops / 1e9:.2f} GFLOP an image and step; {start}"
        )
        log.say(
            f"{len(train_images)} training and {len(val_images)} validation images in {config.data.root}; "
            f"{total_steps} steps of {batch_size} images on {world_size} x {mesh.device}, "
            f"precision {precision.level} {precision.dtype}"
        )
        for note in () if loading is None else loading.notes:
            log.say(f"note: {note}")
        if newest is not None:
            log.record("event", progress.step, progress.step * batch_size / len(train_images), event="resumed")
        has_ended = progress.step >= total_steps and progress.evaluated_step == progress.step
        if has_ended:
            log.say("this run has ended already: ask for more epochs, or begin anew with --resume never")
        log.open_bar(total_steps, progress.step)
        meter, started, first_step = Meter(), time.perf_counter(), progress.step
        last_logged, last_saved = progress.step, progress
        batch, problem = (None, None) if progress.step >= total_steps else take(feed)
        reason = mesh.first_reason(problem)  # to stop; a rank that has no batch keeps all of them from the step
        while True:
            # What is due after so many steps; also after a resume, if the run was stopped before it was done.
            epoch = progress.step * batch_size / len(train_images)
            is_last = progress.step >= total_steps
            images_seen = progress.step * batch_size
            passed_epoch = images_seen // eval_every_images > max(images_seen - batch_size, 0) // eval_every_images
            is_best = False
            aside = time.perf_counter()
            if (passed_epoch or is_last) and progress.evaluated_step < progress.step and reason is None:
                try:
                    result = evaluate(program, validation, mesh)
                    averaged = None
                    if config.optim.ema_decay > 0.0:
                        with program.averaged():
                            averaged = evaluate(program, validation, mesh)
                except DataError as error:
                    reason = str(error)
                else:
                    counts = averaged or result  # with an average that is what people will use
                    is_best = progress.best_top1 is None or counts.top1 > progress.best_top1
                    best_top1 = counts.top1 if is_best else progress.best_top1
                    progress = replace(progress, evaluated_step=progress.step, best_top1=best_top1)
                    of_average = (
                        {}
                        if averaged is None
                        else {f"ema_{name}": value for name, value in asdict(averaged).items() if name != "num_images"}
                    )
                    log.record("eval", progress.step, epoch, **asdict(result), **of_average)
                    said = (
                        describe(result) if averaged is None else f"{describe(result)}; average: {describe(averaged)}"
                    )
                    log.say(f"epoch {epoch:.1f}  {said}{'  (best)' if is_best else ''}")
            every = config.checkpoint.every_steps
            is_due = passed_epoch if every is None else progress.step % every == 0
            if (reason or is_last or is_best or is_due) and progress != last_saved:
                position = replace(position, position=images_seen)
                checkpoint.save(
                    program.state(), progress, position, config, mesh, train_images.class_names, is_best=is_best
                )
                last_saved = progress
            meter.pause(time.perf_counter() - aside)
            if reason is not None or is_last:
                break

            assert batch is not None
            step = progress.step
            loss = program.train_step(*mixer.mixed(batch, step), step)
            progress = replace(progress, step=step + 1)
            log.advance_bar()

            # The device isn't waited for here, but what comes next, and whether a rank must stop.
            is_last = progress.step == total_steps
            batch, problem = (None, None) if is_last else take(feed)
            if not is_last:
                reason = mesh.first_reason(problem or (ON_REQUEST if requests.received else None))

            if progress.step % config.log.every_steps == 0 or is_last:  # the one place where the device is waited for
                mean_loss = mesh.mean(program.scalar(loss))
                num_images = (progress.step - last_logged) * batch_size
                images_per_s, data_wait = meter.read(num_images, feed.seconds_waited)
                values: dict[str, Any] = {
                    "loss": mean_loss,
                    "lr": learning_rate(step, total_steps, config.optim, config.schedule, warmup_steps),
                    "grad_norm": program.grad_norm(),
                    "images_per_s": images_per_s,
                    "data_wait": data_wait,
                    "mfu": None if peak is None else images_per_s * train_flops / (peak * world_size),
                }
                log.record("train", progress.step, progress.step * batch_size / len(train_images), **values)
                seconds_left = (time.perf_counter() - started) / (progress.step - first_step)
                log.train_line(progress.step, total_steps, values, seconds_left * (total_steps - progress.step))
                last_logged = progress.step
                meter.reset(feed.seconds_waited)
        log.close_bar()

        # -- the end ---------------------------------------------------------------------------------------------
        if reason == ON_REQUEST:
            log.record("event", progress.step, epoch, event="stopped")
            log.say(f"stopped on request at step {progress.step}, state saved; the same command goes on from there")
        elif reason is not None:
            log.record("event", progress.step, epoch, event="bad image", problem=reason)
        else:
            last = checkpoint.folder(config.run_dir, progress.step)
            for name, is_average in ((checkpoint.MERGED, False), (checkpoint.MERGED_AVERAGE, True)):
                if not is_average or config.optim.ema_decay > 0.0:
                    weights = checkpoint.merge(last, config, averaged=is_average)
                    if rank == 0:
                        write_pdparams(weights, config.run_dir / name)
            log.record("event", progress.step, epoch, event="finished")
            log.say(
                f"done in {duration(time.perf_counter() - started)}; best top-1 "
                f"{'not evaluated' if progress.best_top1 is None else f'{progress.best_top1:.2f} %'}; "
                f"weights in {config.run_dir / 'model.pdparams'}"
            )
    if rank == 0:
        report.write(config.run_dir)
    mesh.wait_for_all()
    if reason not in (None, ON_REQUEST):
        raise DataError(
            f"{reason}. Stopped at step {progress.step}, from which the same command goes on; "
            f"'{check_command(config.data)}' finds all such files"
        )
    return reason is None


def take(feed: TrainFeed) -> tuple[Batch | None, str | None]:
    """The next batch, or why there is none: what DataError says of an image."""
    try:
        return next(feed), None
    except DataError as error:
        return None, str(error)


ON_REQUEST = "stopped on request"


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
