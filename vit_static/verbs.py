"""Handlers of the command line's verbs.

Each handler takes the parsed arguments and returns the exit code. Handlers load the config first, so that a mistake in
it is reported at once; then `prepare_process` imports Paddle; only then come the imports of modules that use it.
"""

from __future__ import annotations

import argparse

from vit_static.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from vit_static.common.startup import prepare_process
from vit_static.common.text import say
from vit_static.config.loader import load_config
from vit_static.config.schema import Config


def _load_config(arguments: argparse.Namespace) -> Config:
    return load_config(arguments.config, arguments.overrides)


def _load_optional_config(arguments: argparse.Namespace) -> Config | None:
    """None without -c: the config then comes with the weights."""
    return None if arguments.config is None else _load_config(arguments)


def refuse_run_sh_verb(arguments: argparse.Namespace) -> int:
    """Point to run.sh, which runs these verbs itself."""
    raise UserError(f"{arguments.verb} is a verb of run.sh itself: call ./run.sh {arguments.verb}")


def run_config(arguments: argparse.Namespace) -> int:
    """Explain config keys, or print a config. This needs no Paddle."""
    from vit_static.config import print_reference

    has_config = arguments.config is not None or arguments.overrides
    if arguments.diff and not has_config:
        raise UserError("--diff compares a config with the defaults; name one: --diff -c NAME")
    query = " ".join(arguments.query) or None
    if query is not None and has_config:
        raise UserError(f"{query}: explains a key, and -c or -o prints a config; leave out one of them")
    if arguments.markdown:
        if query or has_config:
            raise UserError("--markdown prints the page of all keys: leave out what else is named")
        print_reference.print_page()
    elif not has_config:
        print_reference.print_keys(query)
    elif arguments.diff:
        print_reference.print_changes(_load_config(arguments))
    else:
        print_reference.print_config(_load_config(arguments))
    return EXIT_DONE


def run_models(arguments: argparse.Namespace) -> int:
    """List the model variants. This needs no Paddle."""
    from vit_static.model.variants import print_variants

    print_variants(arguments.image_size or 224, arguments.num_classes, arguments.words)
    return EXIT_DONE


def run_recipes(arguments: argparse.Namespace) -> int:
    """List the configs in configs/. This needs no Paddle."""
    from vit_static.config.print_reference import print_recipes

    print_recipes(arguments.words)
    return EXIT_DONE


def run_training(arguments: argparse.Namespace) -> int:
    """Train: `pretrain` and `finetune` differ only in their default config."""
    config = _load_config(arguments)
    prepare_process(arguments.verbose)
    _recommend_doctor(config)
    _note_missing_weights(arguments.verb, config)
    from vit_static.train.trainer import train

    return EXIT_DONE if train(config, arguments.resume) else EXIT_STOPPED


def _recommend_doctor(config: Config) -> None:
    """Say in one line, on rank 0, if training starts on GPUs that `doctor` hasn't checked with this config."""
    from vit_static.doctor.record import notice
    from vit_static.parallel.mesh import choose_device, rank_and_world_size

    if rank_and_world_size()[0] == 0 and choose_device(config.device) == "gpu":
        line = notice(config)
        if line is not None:
            say(line)


def _note_missing_weights(verb: str, config: Config) -> None:
    """Say in one line, on rank 0, if `finetune` has no weights to start from."""
    from vit_static.parallel.mesh import rank_and_world_size

    if verb == "finetune" and config.init.from_ is None and rank_and_world_size()[0] == 0:
        say(
            "note: init.from is not set, so this trains from scratch; -o init.from=WEIGHTS names a run or a weight file"
        )


def run_eval(arguments: argparse.Namespace) -> int:
    """Evaluate a checkpoint on the validation images."""
    config = _load_optional_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.train.evaluate import evaluate_checkpoint

    labels = {"real": arguments.real, "v2": arguments.imagenet_v2}
    weights = {"ema": arguments.ema, "which": arguments.weights}
    options = {**weights, **labels, "per_class": arguments.per_class, "image_sizes": arguments.image_size}
    evaluate_checkpoint(config, arguments.checkpoint, arguments.overrides, **options)
    return EXIT_DONE


def run_export(arguments: argparse.Namespace) -> int:
    """Export a checkpoint for inference."""
    config = _load_optional_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.export.exporter import export_checkpoint

    export_checkpoint(
        config,
        arguments.checkpoint,
        arguments.out,
        arguments.overrides,
        ema=arguments.ema,
        which=arguments.weights,
        onnx=arguments.onnx,
    )
    return EXIT_DONE


def run_average(arguments: argparse.Namespace) -> int:
    """Average the weights of checkpoints or runs."""
    config = _load_optional_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.train.averaging import average_runs

    average_runs(
        config,
        arguments.runs,
        arguments.overrides,
        last=arguments.last,
        greedy=arguments.greedy,
        ema=arguments.ema,
        out=arguments.out,
    )
    return EXIT_DONE


def run_predict(arguments: argparse.Namespace) -> int:
    """Classify images with an exported model."""
    prepare_process(arguments.verbose)
    from vit_static.inference.predict import predict_images

    return predict_images(
        arguments.model,
        arguments.images,
        arguments.top_k,
        arguments.batch_size,
        arguments.format,
        arguments.features,
        arguments.precision,
        arguments.backend,
    )


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve an exported model over HTTP until a signal stops it."""
    prepare_process(arguments.verbose)
    from vit_static.inference.access import read_access
    from vit_static.inference.request_limits import Limits
    from vit_static.inference.server import serve_model

    limits = Limits(
        batch_size=arguments.batch_size,
        max_wait_s=arguments.max_wait_ms / 1e3,
        max_bytes=round(arguments.max_mb * 1e6),
        max_images=arguments.max_images,
        max_total_bytes=round(arguments.max_total_mb * 1e6),
        max_pixels=round(arguments.max_megapixels * 1e6),
        max_total_pixels=round(arguments.max_total_megapixels * 1e6),
        max_waiting=arguments.max_waiting,
        timeout_s=arguments.timeout_s,
        min_bytes_per_s=arguments.min_kb_per_s * 1e3,
        max_connections=arguments.max_connections,
        max_per_client=arguments.max_connections_per_client,
        header_timeout_s=arguments.header_timeout_s,
    )
    access = read_access(arguments.api_key, arguments.cors)
    serve_model(arguments.model, arguments.host, arguments.port, limits, access, arguments.precision, arguments.backend)
    return EXIT_DONE


def run_visualize(arguments: argparse.Namespace) -> int:
    """Draw attention maps, position embedding and patch filters."""
    config = _load_optional_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.inference.attention_maps import visualize

    return visualize(
        config,
        arguments.model,
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        arguments.overrides,
        ema=arguments.ema,
        which=arguments.weights,
    )


def run_probe(arguments: argparse.Namespace) -> int:
    """Measure how well a model's features classify a data set."""
    if arguments.model is not None and arguments.ema:
        raise UserError("--ema needs --checkpoint; an exported model has one set of weights")
    config = _load_optional_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.probe import features
    from vit_static.probe.run import probe

    if arguments.model is not None:
        extractor, config = features.from_exported(arguments.model, arguments.config, arguments.overrides)
    else:
        extractor, config = features.from_checkpoint(
            config, arguments.checkpoint, arguments.overrides, ema=arguments.ema, which=arguments.weights
        )
    probe(extractor, config, only=arguments.only, json_path=arguments.json, refresh=arguments.refresh)
    return EXIT_DONE


def run_report(arguments: argparse.Namespace) -> int:
    """Write the HTML page of runs. This needs no Paddle."""
    from vit_static.report.page import write_reports

    write_reports(arguments.runs, arguments.out)
    return EXIT_DONE


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert weights from one format to another."""
    config = _load_optional_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.weights.convert import convert_weights

    convert_weights(
        config,
        arguments.source,
        arguments.to,
        arguments.overrides,
        to=arguments.format,
        head=arguments.head,
        image_size=arguments.image_size and tuple(arguments.image_size),
        fold_layer_scale=arguments.fold_layer_scale,
        ema=arguments.ema,
        lora=arguments.lora,
    )
    return EXIT_DONE


def run_plan(arguments: argparse.Namespace) -> int:
    """Predict the cost of a run on a mesh."""
    config = _load_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.model.variants import require_head
    from vit_static.plan.planner import Cluster
    from vit_static.plan.tables import plan_run
    from vit_static.weights.source import with_model_of_init

    config = with_model_of_init(config)
    require_head(config.model)
    cluster = Cluster(arguments.device, arguments.interconnect, arguments.gpus_per_node)
    plan_run(
        config,
        arguments.mesh,
        arguments.world,
        cluster,
        arguments.rank,
        arguments.search,
        arguments.json,
        arguments.num_images,
    )
    return EXIT_DONE


def run_doctor(arguments: argparse.Namespace) -> int:
    """Check a config on this machine's devices; with --worker, perform checks in this process."""
    config = _load_config(arguments)
    if arguments.worker is not None:
        prepare_process(arguments.verbose)
        from vit_static.doctor import worker

        return worker.work(config, arguments.worker)
    from vit_static.doctor import runner

    has_passed = runner.run(
        config,
        arguments.config,
        arguments.overrides,
        only=arguments.only,
        json_path=arguments.json,
        verbose=arguments.verbose,
    )
    return EXIT_DONE if has_passed else EXIT_FAILED


def run_bench_train(arguments: argparse.Namespace) -> int:
    """Measure the training step, or how it scales over processes, or that of PLSC's configs on GPUs."""
    config = _load_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.bench import scaling, train, train_gpu

    if arguments.scaling:
        scaling.run(arguments.config, arguments.overrides, arguments.rounds, arguments.seconds)
    elif arguments.device == "gpu":
        train_gpu.run(arguments.overrides, arguments.seconds, arguments.json)
    else:
        train.run(
            config,
            arguments.rounds,
            arguments.seconds,
            arguments.json,
            arguments.peers or train.DEFAULT_PEERS,
            arguments.peer_python,
        )
    return EXIT_DONE


def run_bench_data(arguments: argparse.Namespace) -> int:
    """Measure the data pipeline, on the CPU or a GPU, or the cost of long image lists."""
    config = _load_config(arguments)
    if arguments.device == "gpu":  # only DALI: this also runs on machines where Paddle's GPU build doesn't
        from vit_static.bench import data_gpu

        data_gpu.run(config, arguments.seconds, arguments.json)
        return EXIT_DONE
    prepare_process(arguments.verbose)
    from vit_static.bench import data, data_scale

    if arguments.scale:
        data_scale.run(config, arguments.json)
    else:
        given = arguments.config, arguments.overrides
        peers = arguments.peers or tuple(data.PEERS)
        data.run(config, *given, arguments.rounds, arguments.seconds, arguments.json, peers, arguments.peer_python)
    return EXIT_DONE


def run_bench_infer(arguments: argparse.Namespace) -> int:
    """Measure the exported model."""
    config = _load_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.bench import infer

    infer.run(
        config,
        arguments.checkpoint,
        arguments.overrides,
        tuple(arguments.batch_sizes or infer.BATCH_SIZES),
        arguments.rounds,
        arguments.seconds,
        arguments.json,
        arguments.peers or infer.DEFAULT_PEERS,
        arguments.peer_python,
    )
    return EXIT_DONE


def run_bench_profile(arguments: argparse.Namespace) -> int:
    """Profile a training step by operator."""
    config = _load_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.bench import profile

    profile.run(config, arguments.steps, arguments.json)
    return EXIT_DONE


def run_bench_step(arguments: argparse.Namespace) -> int:
    """Measure the training step of this mesh."""
    config = _load_config(arguments)
    prepare_process(arguments.verbose)
    from vit_static.bench import step

    step.run(config, arguments.seconds, arguments.real_data)
    return EXIT_DONE
