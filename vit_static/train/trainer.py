"""The one training loop, for pretraining and finetuning: read it top to bottom."""

from __future__ import annotations

import math
import secrets
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vit_static.checkpoint.folder import (
    MERGED,
    MERGED_AVERAGE,
    archive,
    checkpoint_dir,
    latest_checkpoint,
    open_shards,
    recover_interrupted,
    write_class_names,
)
from vit_static.checkpoint.progress import DataPosition, Progress
from vit_static.checkpoint.resume import check_same_images, check_same_run, read_progress, resolve_resume
from vit_static.checkpoint.writer import CheckpointWriter
from vit_static.common.errors import ConfigError, DataError, RunFailed
from vit_static.common.hardware import peak_flops
from vit_static.common.library_output import redirect_library_output
from vit_static.common.text import duration
from vit_static.config.loader import dump_config
from vit_static.config.schema import Config
from vit_static.data.loader import Batch, TrainLoader
from vit_static.data.mixup import Mixup
from vit_static.data.open_set import check_command, open_set
from vit_static.model import flops
from vit_static.model.loss import Criterion
from vit_static.model.variants import shape_of, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.optim import schedule
from vit_static.optim.schedule import learning_rate
from vit_static.parallel.mesh import device_name, rank_and_world_size, resolve_mesh, seed_everything, start_mesh
from vit_static.program.precision import choose_attention, choose_precision
from vit_static.program.program import Program
from vit_static.report.error_analysis import EVALUATION_FILE
from vit_static.report.page import write_report
from vit_static.train.checkpointing import log_save_results
from vit_static.train.evaluate import EvalMetrics, analyze_errors_of, describe, eval_batch_size, eval_feed, predict_all
from vit_static.train.metrics import RunLog, ThroughputMeter, log_exceptions
from vit_static.train.nonfinite import NonFiniteReport
from vit_static.train.profiler import StepTrace
from vit_static.train.run_dir import locked_run_dir, resume_hint, verify_checkpoint
from vit_static.train.run_info import describe_run, memory_mb
from vit_static.train.stop import BAD_IMAGE, NONFINITE, ON_REQUEST, UNSAVED, Stop, stop_of, stop_requests
from vit_static.train.summary import expected_end, start_screen
from vit_static.weights.load import init_from, write_pdparams
from vit_static.weights.source import load_weights, merge_shards


def train(config: Config, resume: str = "auto") -> bool:
    """Trains until the end of the schedule, True, or until SIGTERM or SIGINT, whose state is saved, False.

    `resume` says from where to go on: auto, the latest checkpoint of the run's folder, if there is one; never; or the
    path of a checkpoint or of a run. Raises DataError, on all ranks and with the state saved, when one of them meets an
    image that can't be read, RunFailed when the state can't be saved, and where gradients aren't finite.
    """
    # -- what is to be done: found out, and every mistake in it, before anything is built ------------------------
    rank, world_size = rank_and_world_size()
    variant = variant_of(config.model)
    sizes = resolve_mesh(config.parallel, world_size, config.data.global_batch_size, variant)
    if config.mixes and config.data.global_batch_size // sizes.dp % 2:
        raise ConfigError(
            f"data.global_batch_size = {config.data.global_batch_size}: each of {sizes.dp} ranks gets an odd number "
            "of images each, and augment.mixup_alpha and cutmix_alpha mix images in pairs; set a multiple of "
            f"{2 * sizes.dp}"
        )
    shape = shape_of(config.model)
    train_images = open_set(config.data, "train", config.model.num_classes)
    val_images = open_set(config.data, "val", config.model.num_classes)
    batch_size = config.data.global_batch_size
    total_steps = schedule.total_steps(config.train, len(train_images), batch_size)
    warmup_steps = schedule.warmup_steps(config.schedule, len(train_images), batch_size)
    eval_every_images = config.eval.every_epochs * len(train_images)

    def rate(step: int) -> float:
        return learning_rate(step, total_steps, config.optim, config.schedule, warmup_steps)

    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(locked_run_dir(config.run_dir))
        newest = resolve_resume(config.run_dir, resume)
        if newest is not None:
            verify_checkpoint(newest)
            check_same_run(newest, config)

        # -- the processes ---------------------------------------------------------------------------------------
        mesh = start_mesh(sizes, config.device)
        precision = choose_precision(config.amp, mesh.device, config.kernels, config.parallel)

        # -- the model, and what it starts from: a checkpoint > init.from > fresh weights ------------------------
        seed_everything(config.seed)
        model = VisionTransformer(
            config.model, choose_attention(config.model, config.parallel, config.kernels, mesh.device)
        )
        progress, run = Progress(step=0), mesh.first_non_none(secrets.token_hex(8))
        position = DataPosition(0, len(train_images), train_images.digest(), config.seed, config.augment.repeated_aug)
        start, loading = "fresh weights", None
        if newest is not None:
            run_before = verify_checkpoint(newest, mesh)
            run = run_before if newest.parent.parent == config.run_dir.resolve() else run
            progress, saved_position = read_progress(newest)
            position = replace(position, position=progress.batch() * batch_size)
            check_same_images(newest, saved_position, position)
            start = f"going on from {newest}"
        elif config.init.from_ is not None:
            loaded = load_weights(Path(config.init.from_))
            loading = init_from(model, config.model, loaded.found, str(loaded.source), config.init, loaded.grid)
            start = f"from {loaded.source}, {loading.format}: {loading.describe()}"

        # -- the program -----------------------------------------------------------------------------------------
        redirect_library_output(config.run_dir / "log" / f"rank_{rank}.log")
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
            freeze=config.train.freeze,
        )
        if newest is not None:
            program.restore(open_shards(newest))

        # -- the data --------------------------------------------------------------------------------------------
        def training_feed(progress: Progress) -> TrainLoader:
            return TrainLoader(
                train_images,
                config.model.image_size,
                config.data,
                config.augment,
                seed=config.seed,
                start_step=progress.step,
                skipped_batches=progress.skipped_batches,
                dp_rank=mesh.dp_rank,
                dp_size=mesh.dp_size,
                device_id=mesh.device_id,
            )

        feed = training_feed(progress)
        mixup = Mixup(config.augment, config.model.num_classes, config.seed)
        validation = eval_feed(config, val_images, mesh)

        # -- the run's folder ------------------------------------------------------------------------------------
        if rank == 0:
            # What doesn't belong to what this run goes on from: all, if it begins anew.
            is_own = newest is not None and newest.parent.parent == config.run_dir.resolve()
            if resume != "auto":
                archive(config.run_dir, after=progress.step if is_own else -1)
            if progress.step < total_steps:
                # Those of a shorter run that goes on: until its end the latest checkpoint holds the weights.
                for merged in (MERGED, MERGED_AVERAGE):
                    (config.run_dir / merged).unlink(missing_ok=True)
            recover_interrupted(config.run_dir, progress)
            dump_config(config, config.run_dir / "config.yaml")
            write_class_names(config.run_dir, train_images.class_names)
            if loading is not None:
                loading.write(config.run_dir / "init.json")
        mesh.barrier()
        saver = CheckpointWriter(config, mesh, train_images.class_names, run)

        # -- the loop --------------------------------------------------------------------------------------------
        train_flops = flops.train_flops(shape)
        peak = peak_flops(device_name(mesh), precision.dtype)
        log = stack.enter_context(RunLog(config.run_dir, rank, config.log.tensorboard, progress.step))
        requests = stack.enter_context(stop_requests())
        trace = stack.enter_context(StepTrace(config.train.profile_steps, config.run_dir, mesh, log.say))
        num_parameters = sum(math.prod(p.shape) for p in model.parameters())
        facts = describe_run(config, mesh, f"{precision.level} {precision.dtype}")
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
        meter, started, first_step = ThroughputMeter(), time.perf_counter(), progress.step
        last_logged, last_saved = progress.step, progress
        loss: Any = None
        unwritten: str | None = None  # why the last checkpoint couldn't be written
        batch, problem = (None, None) if progress.step >= total_steps else next_batch(feed)
        stop: Stop | None = stop_of(mesh.first_non_none(problem and [BAD_IMAGE, problem]))
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
                mean_loss = mesh.mean(program.loss_value(loss))
                num_seen = (progress.step - last_logged) * batch_size
                images_per_s, data_wait = meter.read(num_seen, feed.seconds_waited)
                values: dict[str, Any] = {
                    "loss": mean_loss,
                    "lr": rate(progress.step - 1),
                    "grad_norm": program.grad_norm(),
                    "images_per_s": images_per_s,
                    "data_wait": data_wait,
                    "mfu": None if peak is None else images_per_s * train_flops / (peak * world_size),
                    "memory_mb": memory_mb(mesh),
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
                unsound = mesh.first_non_none(
                    program.first_nonfinite_step() or ([progress.step, {}] if loss_is_unsound else None)
                )
                if unsound is not None:
                    unsound_step, norms = unsound
                    bad_batch = replace(progress, step=unsound_step - 1).batch()
                    words = f"the gradients of step {unsound_step} are not finite"
                    if rank == 0:
                        account = NonFiniteReport(unsound_step, rate(unsound_step - 1), norms, bad_batch, batch_size)
                        path = account.write(config.run_dir, train_images, position)
                        words += f" ({path} has their norms by block, and its images)"
                    saver.wait()
                    whole = latest_checkpoint(config.run_dir)
                    may_go_back = len(progress.skipped_batches) < config.train.max_rollbacks
                    if config.train.on_nonfinite == "stop" or whole is None or not may_go_back:
                        stop = Stop(NONFINITE, words)
                    else:
                        verify_checkpoint(whole, mesh)
                        before, _ = read_progress(whole)
                        progress = replace(before, skipped_batches=(*progress.skipped_batches, bad_batch))
                        program.restore(open_shards(whole))
                        program.clear_nonfinite()
                        feed = training_feed(progress)
                        batch, problem = next_batch(feed)
                        stop = stop_of(mesh.first_non_none(problem and [BAD_IMAGE, problem]))
                        log.record("event", progress.step, epoch, event="rolled back", unsound_step=unsound_step)
                        log.say(
                            f"{words}; going on from {whole} without that batch "
                            f"(rollback {len(progress.skipped_batches)} of at most {config.train.max_rollbacks})"
                        )
                        log.reopen_bar(total_steps, progress.step)
                        last_logged, last_saved = progress.step, before
                        meter.reset(feed.seconds_waited)
                        continue

            if (passed_epoch or is_last) and progress.evaluated_step < progress.step and stop is None:
                try:
                    with trace.span("evaluate"):
                        answers = predict_all(program, validation, mesh)
                    result, averaged = EvalMetrics.of(answers), None
                    if config.optim.ema_decay > 0.0:
                        with program.averaged():
                            answers = predict_all(program, validation, mesh)
                        averaged = EvalMetrics.of(answers)
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
                        with log_exceptions(log, "the report"):
                            found = analyze_errors_of(
                                answers, validation, config.model.num_classes, progress.step, averaged is not None
                            )
                            found.write(config.run_dir / EVALUATION_FILE)
                            write_report(config.run_dir)
                    mesh.first_non_none(
                        None
                    )  # the others wait here, where none is too late, not in a collective of theirs
            if (stop or is_last or is_best or is_due) and progress != last_saved and (not stop or stop.saves):
                position = replace(position, position=progress.batch() * batch_size)
                with trace.span("copy for the checkpoint"):
                    saver.save_async(program.state(), progress, position, rate(progress.step))
                last_saved = progress
            if stop is not None or is_last:
                saver.wait()
            unwritten = log_save_results(saver, log, len(train_images), batch_size, unwritten)
            meter.pause(time.perf_counter() - aside)
            if stop is not None or is_last:
                break

            assert batch is not None
            step = progress.step
            with trace.step(step + 1):
                loss = program.train_step(*mixup(batch, step), step)
            progress = replace(progress, step=step + 1)
            log.advance_bar()

            # The device isn't waited for here, but what comes next, and whether a rank must stop.
            if progress.step < total_steps:
                with trace.span("wait for data"):
                    batch, problem = next_batch(feed)
                may_fail = config.checkpoint.on_failure == "continue"
                stop = stop_of(
                    mesh.first_non_none(
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
            last = checkpoint_dir(config.run_dir, progress.step)
            for name, is_average in ((MERGED, False), (MERGED_AVERAGE, True)):
                if rank == 0 and (not is_average or config.optim.ema_decay > 0.0):
                    write_pdparams(merge_shards(last, averaged=is_average), config.run_dir / name)
            log.record("event", progress.step, epoch, event="finished", seconds=time.perf_counter() - started)
            if saver.costs.num_written:
                log.say(f"checkpoints: {saver.costs.describe()}")
            log.say(
                f"done in {duration(time.perf_counter() - started)}; best top-1 "
                f"{'not evaluated' if progress.best_top1 is None else f'{progress.best_top1:.2f} %'}; "
                f"weights in {config.run_dir / 'model.pdparams'}"
            )
        else:
            log.record("event", progress.step, epoch, event=stop.reason, problem=stop.message or None)
        if stop is not None and stop.reason == ON_REQUEST:
            log.say(f"stopped on request at step {progress.step}, state saved; the same command goes on from there")
        if rank == 0:
            with log_exceptions(log, "the report"):
                write_report(config.run_dir)
        mesh.barrier()
    if stop is not None and stop.reason == BAD_IMAGE:
        raise DataError(
            f"{stop.message}. Stopped at step {progress.step}, from which the same command goes on; "
            f"'{check_command(config.data)}' finds all such files"
        )
    if stop is not None and stop.reason in (UNSAVED, NONFINITE):
        raise RunFailed(f"{stop.message}. Stopped at step {progress.step}; {resume_hint(config.run_dir)}")
    return stop is None


def next_batch(feed: TrainLoader) -> tuple[Batch | None, str | None]:
    """The next batch, or why there is none: what DataError says of an image."""
    try:
        return next(feed), None
    except DataError as error:
        return None, str(error)
