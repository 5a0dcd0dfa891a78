"""The command line: one parser, one handler per verb."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn, get_args

from vit_static.common.errors import EXIT_DONE, EXIT_STOPPED, UserError
from vit_static.common.hardware import DEVICES, GPUS_PER_NODE, INTERCONNECTS
from vit_static.common.startup import prepare_process
from vit_static.config.loader import CONFIGS, DEFAULT_CONFIGS, load_config
from vit_static.config.schema import Config, InferencePrecision


class _Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong argument, where argparse would print its usage above the mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ('./run.sh --help' lists the verbs, './run.sh VERB --help' the arguments)")


def _at_least_one(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _more_than_0(text: str) -> float:
    number = float(text)
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="./run.sh", description="Vision Transformers: train, evaluate, export, predict.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        verb.add_argument("-v", "--verbose", action="store_true", help="Paddle's and DALI's own messages too")
        return verb

    def add_config(verb: argparse.ArgumentParser, default: Path | None) -> None:
        said = "the weights' own" if default is None else default.name
        verb.add_argument("-c", "--config", type=Path, default=default, help=f"YAML file (default: {said})")
        verb.add_argument(
            "-o", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides a key"
        )

    def add_checkpoint(verb: argparse.ArgumentParser, choice: argparse._MutuallyExclusiveGroup | None = None) -> None:
        what = "a run's folder, a checkpoint, or a file: .pdparams, .npz, .safetensors"
        (choice or verb).add_argument("--checkpoint", type=Path, required=choice is None, help=what)
        verb.add_argument("--ema", action="store_true", help="the weights' moving average (optim.ema_decay)")

    def add_exported(verb: argparse.ArgumentParser) -> None:
        verb.add_argument("--model", type=Path, required=True, help="folder that export wrote")
        known = get_args(InferencePrecision)
        verb.add_argument("--precision", choices=known, help="to run it in (default: what it was exported for)")

    for name in ("setup", "test", "data"):  # run.sh's own; here for the list of verbs
        add(name, {"setup": "make the environment", "test": "run the tests", "data": "prepare data sets"}[name])
    for name, default in DEFAULT_CONFIGS.items():
        verb = add(name, f"train; without arguments {default.name}")
        add_config(verb, default)
        verb.add_argument(
            "--resume",
            default="auto",
            metavar="auto|never|PATH",
            help="auto: go on from the run's latest checkpoint, if there is one; PATH: from this one, or this run's",
        )
    verb = add("eval", "top-1, top-5 and loss over the validation images")
    add_config(verb, None)
    add_checkpoint(verb)
    judge = verb.add_mutually_exclusive_group()
    judge.add_argument("--real", type=Path, metavar="FILE", help="by the ReaL labels of ImageNet, its real.json")
    judge.add_argument("--imagenet-v2", type=Path, metavar="DIR", help="on ImageNet-V2: folders called 0 to 999")
    verb = add("export", "files for inference, checked against the trained model")
    add_config(verb, None)
    add_checkpoint(verb)
    verb.add_argument("--out", type=Path, required=True, help="folder to write to")
    verb.add_argument("--onnx", action="store_true", help="write model.onnx (float32), too")
    verb = add("predict", "a line an image: its path and its classes, the likeliest first")
    add_exported(verb)
    verb.add_argument("--top-k", type=int, default=5)
    verb.add_argument("--batch-size", type=int, default=32)
    verb.add_argument("--format", choices=["json", "csv", "table"], default="json", help="default: json, a line each")
    what = "write what the head reads of each image there, too: a row a line, NaN for an image that can't be read"
    verb.add_argument("--features", type=Path, metavar="OUT.npy", help=what)
    verb.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="files, folders of them, - for a list of files on stdin"
    )
    verb = add("serve", "an exported model over HTTP: POST /predict an image; a page at /, /health, /metrics")
    add_exported(verb)
    verb.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    verb.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    verb.add_argument("--batch-size", type=_at_least_one, default=32, help="at most (default: 32)")
    verb.add_argument("--max-wait-ms", type=float, default=5.0, help="of a request for others (default: 5)")
    verb.add_argument("--max-mb", type=_more_than_0, default=20.0, help="of an image file (default: 20)")
    verb.add_argument("--max-megapixels", type=_more_than_0, default=64.0, help="of an image (default: 64)")
    verb.add_argument("--max-waiting", type=_at_least_one, default=256, help="requests at once (default: 256)")
    verb.add_argument("--timeout-s", type=_more_than_0, default=30.0, help="of a request (default: 30)")
    verb = add("attend", "pictures of what a model attends to, of its position embedding and its patch filters")
    add_config(verb, None)
    whose = verb.add_mutually_exclusive_group(required=True)
    whose.add_argument("--model", type=Path, help="folder that export wrote")
    add_checkpoint(verb, whose)
    verb.add_argument("--out", type=Path, default=Path("attend"), help="folder to write to (default: attend)")
    verb.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    verb = add("report", "a run's page anew, or several runs side by side on one")
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, such as output/quickstart")
    what = "file to write (default: report.html, in the folder of one run, or here for several)"
    verb.add_argument("--out", type=Path, metavar="FILE", help=what)
    verb = add("convert", "weights from one format into another, told by their content")
    add_config(verb, None)
    verb.add_argument("--from", dest="source", type=Path, required=True, metavar="FILE", help="or a run, a checkpoint")
    verb.add_argument("--to", type=Path, required=True, metavar="FILE", help="ends with .pdparams, .npz, .safetensors")
    verb.add_argument(
        "--format",
        choices=["plsc", "timm", "huggingface", "google"],
        help="default: by --to's ending, timm for .safetensors; huggingface writes config.json beside it",
    )
    verb.add_argument("--head", choices=["keep", "drop"], default="keep", help="with its tanh layer (default: keep)")
    verb.add_argument("--fold-layer-scale", action="store_true", help="into the layers before it")
    verb.add_argument("--ema", action="store_true", help="of a run or checkpoint, the weights' moving average")
    verb.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="of the weights, where the grid is no square"
    )
    verb = add("plan", "what a run will cost on a mesh of cards, found without them")
    add_config(verb, CONFIGS / "quickstart.yaml")
    verb.add_argument(
        "--mesh",
        metavar="dp=8,mp=2,sharding=1",
        help="in place of the config's: dp, mp, pp, sharding (stage), accum (grad_accum_steps), recompute",
    )
    verb.add_argument(
        "--world", type=_at_least_one, metavar="N", help="number of cards (default: as many as the mesh has)"
    )
    verb.add_argument("--device", default="a100-80g", choices=list(DEVICES), help="the card (default: a100-80g)")
    verb.add_argument(
        "--interconnect", default="ib-hdr", choices=list(INTERCONNECTS), help="between nodes (default: ib-hdr)"
    )
    verb.add_argument("--cards-per-node", type=_at_least_one, default=GPUS_PER_NODE, metavar="N")
    verb.add_argument("--rank", type=int, default=0, help="whose part to compile (default: 0, the first stage)")
    verb.add_argument("--search", action="store_true", help="rank every mesh of --world cards that can be")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    benches = add("bench", "speeds, as ratios measured in one run").add_subparsers(
        dest="bench", required=True, metavar="WHAT", parser_class=_Parser
    )

    def add_bench(name: str, help_text: str, config: str) -> argparse.ArgumentParser:
        verb = benches.add_parser(name, help=help_text, description=help_text)
        add_config(verb, CONFIGS / config)
        verb.add_argument("-v", "--verbose", action="store_true", help="Paddle's and DALI's own messages too")
        return verb

    def add_rounds(verb: argparse.ArgumentParser, rounds: int) -> None:
        verb.add_argument("--rounds", type=_at_least_one, default=rounds, help=f"of all in turn (default: {rounds})")
        verb.add_argument("--seconds", type=_more_than_0, default=8.0, help="of each in a round (default: 8)")
        verb.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")

    verb = add_bench("train", "the training step against PyTorch and a dynamic-graph Paddle loop", "bench_s16.yaml")
    add_rounds(verb, 5)
    verb.add_argument(
        "--device", choices=["cpu", "gpu"], default="cpu", help="gpu: the seed's four configs on this machine's cards"
    )
    verb.add_argument(
        "--scaling", action="store_true", help="instead: one process against several, data- and tensor-parallel"
    )
    verb = add_bench("data", "DALI's training images against PIL's; how long training waits for them", "bench_s16.yaml")
    add_rounds(verb, 5)
    verb.add_argument(
        "--device", choices=["cpu", "gpu"], default="cpu", help="gpu: a card's pixels and speed against the CPU's"
    )
    verb.add_argument("--scale", action="store_true", help="instead: what lists of 1.28 and 14.2 million images cost")
    verb = add_bench("infer", "the exported model against PyTorch and ONNX Runtime", "bench_s16.yaml")
    add_rounds(verb, 5)
    verb.add_argument("--checkpoint", type=Path, help="a trained model, and its validation set: top-1, too")
    verb.add_argument(
        "--batch-size", type=_at_least_one, action="append", dest="batch_sizes", metavar="N", help="default: 1, 8, 32"
    )
    verb = add_bench("profile", "where a training step's time goes, by operator", "bench_s16.yaml")
    verb.add_argument("--steps", type=_at_least_one, default=3, help="to average over (default: 3)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    verb = add_bench("step", "this layout's training step, as a line of JSON", "quickstart.yaml")
    verb.add_argument("--seconds", type=_more_than_0, default=10.0, help="to measure for (default: 10)")
    verb.add_argument("--real-data", action="store_true", help="on images of data.root instead of noise")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.verb in ("setup", "test", "data"):
        raise UserError(f"{arguments.verb} is run.sh's own verb: ./run.sh {arguments.verb}")
    given = getattr(arguments, "config", None)
    config = None if given is None else load_config(given, arguments.overrides)
    if (arguments.verb, getattr(arguments, "bench", None), getattr(arguments, "device", None)) == (
        "bench",
        "data",
        "gpu",
    ):
        from vit_static.bench import data_gpu

        assert config is not None
        data_gpu.run(
            config, arguments.seconds, arguments.json
        )  # DALI alone, on machines where Paddle's build can't run
        return EXIT_DONE
    if arguments.verb == "report":
        from vit_static.report.page import write_reports

        write_reports(arguments.runs, arguments.out)
        return EXIT_DONE
    prepare_process(arguments.verbose)  # before what imports Paddle, which is why the verbs are imported here
    if arguments.verb in ("pretrain", "finetune"):
        from vit_static.train.trainer import train

        assert config is not None
        return EXIT_DONE if train(config, arguments.resume) else EXIT_STOPPED
    if arguments.verb == "predict":
        from vit_static.inference.predict import predict_images

        return predict_images(
            arguments.model,
            arguments.images,
            arguments.top_k,
            arguments.batch_size,
            arguments.format,
            arguments.features,
            arguments.precision,
        )
    if arguments.verb == "attend":
        from vit_static.inference.attention_maps import visualize

        given_images = arguments.images, arguments.out, arguments.overrides
        return visualize(config, arguments.model, arguments.checkpoint, *given_images, averaged=arguments.ema)
    if arguments.verb == "serve":
        from vit_static.inference.server import Limits, serve_model

        limits = Limits(
            batch_size=arguments.batch_size,
            max_wait_s=arguments.max_wait_ms / 1e3,
            max_bytes=round(arguments.max_mb * 1e6),
            max_pixels=round(arguments.max_megapixels * 1e6),
            max_waiting=arguments.max_waiting,
            timeout_s=arguments.timeout_s,
        )
        serve_model(arguments.model, arguments.host, arguments.port, limits, arguments.precision)
    elif arguments.verb == "eval":
        from vit_static.train.evaluate import evaluate_checkpoint

        judges = {"real": arguments.real, "v2": arguments.imagenet_v2}
        evaluate_checkpoint(config, arguments.checkpoint, arguments.overrides, averaged=arguments.ema, **judges)
    elif arguments.verb == "convert":
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
            averaged=arguments.ema,
        )
    elif arguments.verb == "plan":
        from vit_static.plan.planner import Place
        from vit_static.plan.tables import plan_run

        assert config is not None
        place = Place(arguments.device, arguments.interconnect, arguments.cards_per_node)
        plan_run(config, arguments.mesh, arguments.world, place, arguments.rank, arguments.search, arguments.json)
    elif arguments.verb == "bench":
        assert config is not None
        _bench(arguments, config)
    else:
        from vit_static.export.exporter import export_checkpoint

        given_weights = config, arguments.checkpoint, arguments.out, arguments.overrides
        export_checkpoint(*given_weights, averaged=arguments.ema, onnx=arguments.onnx)
    return EXIT_DONE


def _bench(arguments: argparse.Namespace, config: Config) -> None:
    given = arguments.config, arguments.overrides
    if arguments.bench == "train" and arguments.scaling:
        from vit_static.bench import scaling

        scaling.run(*given, arguments.rounds, arguments.seconds)
    elif arguments.bench == "train" and arguments.device == "gpu":
        from vit_static.bench import train_gpu

        train_gpu.run(arguments.overrides, arguments.seconds, arguments.json)
    elif arguments.bench == "train":
        from vit_static.bench import train

        train.run(config, arguments.rounds, arguments.seconds, arguments.json)
    elif arguments.bench == "data" and arguments.scale:
        from vit_static.bench import data_scale

        data_scale.run(config, arguments.json)
    elif arguments.bench == "data":
        from vit_static.bench import data

        data.run(config, *given, arguments.rounds, arguments.seconds, arguments.json)
    elif arguments.bench == "infer":
        from vit_static.bench import infer

        sizes = tuple(arguments.batch_sizes or infer.BATCH_SIZES)
        weights = config, arguments.checkpoint, arguments.overrides
        infer.run(*weights, sizes, arguments.rounds, arguments.seconds, arguments.json)
    elif arguments.bench == "profile":
        from vit_static.bench import profile

        profile.run(config, arguments.steps, arguments.json)
    else:
        from vit_static.bench import step

        step.run(config, arguments.seconds, arguments.real_data)
