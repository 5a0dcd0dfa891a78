"""Command-line parser: the verbs and their flags. Handlers are in `verbs.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, get_args

from vit_static import verbs
from vit_static.common.errors import UserError
from vit_static.common.hardware import GPUS, GPUS_PER_NODE, INTERCONNECTS
from vit_static.config.loader import CONFIGS, DEFAULT_CONFIGS
from vit_static.config.schema import InferencePrecision

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["_Parser"]

Handler = Callable[[argparse.Namespace], int]

RENAMED_VERBS = {"attend": "visualize"}  # by the old name
RENAMED_FLAGS = {"--cards-per-node": "--gpus-per-node", "--fed": "--real-data"}
RUN_SH_VERBS = {"setup": "install the environment", "test": "run the tests", "data": "prepare data sets"}


class _Parser(argparse.ArgumentParser):
    """Raise UserError for a wrong argument, instead of printing the usage and exiting as argparse does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ('./run.sh --help' lists the verbs, './run.sh VERB --help' the arguments)")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; its `handler` runs the verb. Raise UserError for a wrong argument."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in RENAMED_VERBS:
        raise UserError(f"the verb {argv[0]} is now called {RENAMED_VERBS[argv[0]]}: ./run.sh {RENAMED_VERBS[argv[0]]}")
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag in RENAMED_FLAGS:
            raise UserError(f"{flag} is now called {RENAMED_FLAGS[flag]}")
    return make_parser().parse_args(argv)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs, in the order in which --help lists them."""
    parser = _Parser(prog="./run.sh", description="Vision Transformers: train, evaluate, export, predict.")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for name, help_text in RUN_SH_VERBS.items():  # run.sh runs these itself; they are here to be listed
        _add_verb(subparsers, name, help_text, verbs.refuse_run_sh_verb)
    for name, default_config in DEFAULT_CONFIGS.items():
        _add_training(subparsers, name, default_config)
    _add_eval(subparsers)
    _add_export(subparsers)
    _add_predict(subparsers)
    _add_serve(subparsers)
    _add_visualize(subparsers)
    _add_probe(subparsers)
    _add_report(subparsers)
    _add_convert(subparsers)
    _add_plan(subparsers)
    _add_doctor(subparsers)
    _add_benches(subparsers)
    return parser


# Arguments that several verbs share


def _add_verb(subparsers: Subparsers, name: str, help_text: str, handler: Handler) -> argparse.ArgumentParser:
    verb = subparsers.add_parser(name, help=help_text, description=help_text)
    verb.add_argument("-v", "--verbose", action="store_true", help="also show the messages of Paddle and DALI")
    verb.set_defaults(handler=handler)
    return verb


def _add_config(verb: argparse.ArgumentParser, default: Path | None) -> None:
    default_name = "the config stored with the weights" if default is None else default.name
    verb.add_argument("-c", "--config", type=Path, default=default, help=f"YAML file (default: {default_name})")
    verb.add_argument(
        "-o", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config key"
    )


def _add_checkpoint(
    verb: argparse.ArgumentParser,
    alternatives: argparse._MutuallyExclusiveGroup | None = None,
    default_weights: Literal["best", "last"] = "last",
) -> None:
    (alternatives or verb).add_argument(
        "--checkpoint",
        type=Path,
        required=alternatives is None,
        help="a run folder, a checkpoint, or a file: .pdparams, .npz, .safetensors",
    )
    verb.add_argument("--ema", action="store_true", help="use the moving average of the weights (optim.ema_decay)")
    verb.add_argument(
        "--weights",
        choices=["best", "last"],
        default=default_weights,
        help=f"of a run folder: of its best result by eval.metric, or of its last step (default: {default_weights})",
    )


def _add_exported_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", type=Path, required=True, help="folder written by export")
    verb.add_argument(
        "--precision",
        choices=get_args(InferencePrecision),
        help="precision of the computation (default: the one the model was exported for)",
    )


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")


def _add_rounds(verb: argparse.ArgumentParser, rounds: int = 5) -> None:
    verb.add_argument(
        "--rounds", type=_positive_int, default=rounds, help=f"in each, all are measured in turn (default: {rounds})"
    )
    verb.add_argument(
        "--seconds", type=_positive_float, default=8.0, help="how long to measure each in a round (default: 8)"
    )
    _add_json(verb)


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def _positive_float(text: str) -> float:
    number = float(text)
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number


# Parsers


def _add_training(subparsers: Subparsers, name: str, default_config: Path) -> None:
    verb = _add_verb(subparsers, name, f"train a model; without arguments: {default_config.name}", verbs.run_training)
    _add_config(verb, default_config)
    verb.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): resume from the latest checkpoint of the run, if there is one; never: start from the "
        "beginning; PATH: resume from this checkpoint or run",
    )


def _add_eval(subparsers: Subparsers) -> None:
    verb = _add_verb(subparsers, "eval", "measure top-1, top-5 and loss on the validation images", verbs.run_eval)
    _add_config(verb, None)
    _add_checkpoint(verb)
    verb.add_argument(
        "--per-class", type=Path, metavar="FILE.csv", help="also write precision, recall, F1 and support of every class"
    )
    labels = verb.add_mutually_exclusive_group()
    labels.add_argument("--real", type=Path, metavar="FILE", help="use ImageNet's ReaL labels: the file real.json")
    labels.add_argument(
        "--imagenet-v2", type=Path, metavar="DIR", help="use ImageNet-V2: a folder with subfolders 0 to 999"
    )


def _add_export(subparsers: Subparsers) -> None:
    verb = _add_verb(
        subparsers, "export", "write files for inference, checked against the trained model", verbs.run_export
    )
    _add_config(verb, None)
    _add_checkpoint(verb, default_weights="best")
    verb.add_argument("--out", type=Path, required=True, help="folder to write to")
    verb.add_argument("--onnx", action="store_true", help="also write model.onnx (float32)")


def _add_predict(subparsers: Subparsers) -> None:
    verb = _add_verb(
        subparsers, "predict", "print one line per image: its path and its most likely classes", verbs.run_predict
    )
    _add_exported_model(verb)
    verb.add_argument(
        "--top-k",
        type=int,
        help="number of classes per image (default: all that reach the thresholds of the export, or 5 without any)",
    )
    verb.add_argument("--batch-size", type=int, default=32, help="images per batch (default: 32)")
    verb.add_argument(
        "--format", choices=["json", "csv", "table"], default="json", help="default: json, one object per line"
    )
    verb.add_argument(
        "--features",
        type=Path,
        metavar="OUT.npy",
        help="also write the features that the head reads: one row per line printed, NaN for an unreadable image",
    )
    verb.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="files or folders; - reads a list of files from stdin"
    )


def _add_serve(subparsers: Subparsers) -> None:
    help_text = "serve an exported model over HTTP: POST an image to /predict; a page at /, /health, /metrics"
    verb = _add_verb(subparsers, "serve", help_text, verbs.run_serve)
    _add_exported_model(verb)
    verb.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, only this machine")
    verb.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free port")
    verb.add_argument("--batch-size", type=_positive_int, default=32, help="images per batch at most (default: 32)")
    verb.add_argument(
        "--max-wait-ms", type=float, default=5.0, help="how long a request waits for others to join (default: 5)"
    )
    verb.add_argument("--max-mb", type=_positive_float, default=20.0, help="size of an image file (default: 20)")
    verb.add_argument("--max-megapixels", type=_positive_float, default=64.0, help="size of an image (default: 64)")
    verb.add_argument(
        "--max-total-mb", type=_positive_float, default=256.0, help="size of all waiting image files (default: 256)"
    )
    verb.add_argument(
        "--max-total-megapixels",
        type=_positive_float,
        default=64.0,
        help="size of all images that are decoded at once (default: 64)",
    )
    verb.add_argument("--max-waiting", type=_positive_int, default=256, help="waiting requests (default: 256)")
    verb.add_argument("--timeout-s", type=_positive_float, default=30.0, help="per request (default: 30)")
    verb.add_argument(
        "--header-timeout-s", type=_positive_float, default=10.0, help="until a request's headers end (default: 10)"
    )
    verb.add_argument(
        "--min-kb-per-s",
        type=_positive_float,
        default=10.0,
        help="speed at which a client must send an image, after 5 s (default: 10)",
    )
    verb.add_argument(
        "--max-connections", type=_positive_int, help="default: 512, or fewer if the limit on open files requires it"
    )
    verb.add_argument(
        "--max-connections-per-client",
        type=_positive_int,
        help="per IPv4 address or IPv6 /64 network (default: half of all; behind a proxy, set it to --max-connections)",
    )


def _add_visualize(subparsers: Subparsers) -> None:
    help_text = "draw what a model attends to, its position embedding and its patch filters"
    verb = _add_verb(subparsers, "visualize", help_text, verbs.run_visualize)
    _add_config(verb, None)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder written by export")
    _add_checkpoint(verb, source)
    verb.add_argument("--out", type=Path, default=Path("visualize"), help="folder to write to (default: visualize)")
    verb.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")


def _add_probe(subparsers: Subparsers) -> None:
    help_text = "measure frozen features by k-NN, logistic regression and few-shot classification"
    verb = _add_verb(subparsers, "probe", help_text, verbs.run_probe)
    _add_config(verb, None)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder written by export; -o data.root=DIR names the images")
    _add_checkpoint(verb, source)
    verb.add_argument(
        "--only",
        action="append",
        default=[],
        choices=["knn", "logistic", "fewshot"],
        help="measure only this; can be repeated",
    )
    verb.add_argument("--refresh", action="store_true", help="extract the features again, even if they are cached")
    _add_json(verb)


def _add_report(subparsers: Subparsers) -> None:
    verb = _add_verb(
        subparsers, "report", "write the page of a run, or one page that compares several runs", verbs.run_report
    )
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as output/quickstart")
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: report.html in the folder of a single run, or here for several)",
    )


def _add_convert(subparsers: Subparsers) -> None:
    help_text = "convert weights between formats; the format of the input is detected from its content"
    verb = _add_verb(subparsers, "convert", help_text, verbs.run_convert)
    _add_config(verb, None)
    verb.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="FILE", help="a file, a run folder or a checkpoint"
    )
    verb.add_argument("--to", type=Path, required=True, metavar="FILE", help="ends with .pdparams, .npz, .safetensors")
    verb.add_argument(
        "--format",
        choices=["plsc", "timm", "huggingface", "google"],
        help="default: from the ending of --to, timm for .safetensors; huggingface also writes config.json",
    )
    verb.add_argument(
        "--head", choices=["keep", "drop"], default="keep", help="the head and its tanh layer (default: keep)"
    )
    verb.add_argument("--fold-layer-scale", action="store_true", help="multiply LayerScale into the layers before it")
    verb.add_argument(
        "--ema",
        action="store_true",
        help="the moving average of the weights, of a run, a checkpoint or a nested state dict",
    )
    verb.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="image size of the weights, needed if their grid of patches isn't square",
    )


def _add_plan(subparsers: Subparsers) -> None:
    verb = _add_verb(
        subparsers, "plan", "predict the cost of a run on a mesh of GPUs, without these GPUs", verbs.run_plan
    )
    _add_config(verb, CONFIGS / "quickstart.yaml")
    verb.add_argument(
        "--mesh",
        metavar="dp=8,mp=2,sharding=1",
        help="instead of the mesh of the config: dp, mp, pp, sharding (stage), accum (grad_accum_steps), recompute",
    )
    verb.add_argument("--world", type=_positive_int, metavar="N", help="number of GPUs (default: the mesh's)")
    verb.add_argument("--device", default="a100-80g", choices=list(GPUS), help="GPU model (default: a100-80g)")
    verb.add_argument(
        "--interconnect", default="ib-hdr", choices=list(INTERCONNECTS), help="between nodes (default: ib-hdr)"
    )
    verb.add_argument(
        "--gpus-per-node", type=_positive_int, default=GPUS_PER_NODE, metavar="N", help=f"default: {GPUS_PER_NODE}"
    )
    verb.add_argument(
        "--rank", type=int, default=0, help="rank whose program is compiled (default: 0, in the first stage)"
    )
    verb.add_argument("--search", action="store_true", help="compare all valid meshes of --world GPUs")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the plan to this file")


def _add_doctor(subparsers: Subparsers) -> None:
    help_text = "check a config on this machine's GPUs, or CPU, before a long run; takes about two minutes"
    verb = _add_verb(subparsers, "doctor", help_text, verbs.run_doctor)
    _add_config(verb, CONFIGS / "quickstart.yaml")
    verb.add_argument(
        "--only", action="append", default=[], metavar="CHECK", help="perform only this check; can be repeated"
    )
    _add_json(verb)
    verb.add_argument("--worker", type=Path, metavar="DIR", help=argparse.SUPPRESS)  # for doctor/runner.py


def _add_benches(subparsers: Subparsers) -> None:
    help_text = "measure speeds, as ratios within one run"
    verb = subparsers.add_parser("bench", help=help_text, description=help_text)
    benches = verb.add_subparsers(dest="bench", required=True, metavar="BENCHMARK", parser_class=_Parser)

    bench = _add_bench(
        benches, "train", "the training step against PyTorch and a dynamic-graph Paddle loop", verbs.run_bench_train
    )
    _add_rounds(bench)
    bench.add_argument(
        "--device", choices=["cpu", "gpu"], default="cpu", help="gpu: the four configs of PLSC on this machine's GPUs"
    )
    bench.add_argument(
        "--scaling",
        action="store_true",
        help="instead compare one process with several, data-parallel and tensor-parallel",
    )

    bench = _add_bench(
        benches,
        "data",
        "DALI's training images against PIL's, and how long training waits for them",
        verbs.run_bench_data,
    )
    _add_rounds(bench)
    bench.add_argument(
        "--device", choices=["cpu", "gpu"], default="cpu", help="gpu: pixels and speed of a GPU against the CPU's"
    )
    bench.add_argument(
        "--scale", action="store_true", help="instead measure the cost of lists of 1.28 and 14.2 million images"
    )

    bench = _add_bench(benches, "infer", "the exported model against PyTorch and ONNX Runtime", verbs.run_bench_infer)
    _add_rounds(bench)
    bench.add_argument(
        "--checkpoint", type=Path, help="also measure the top-1 of this trained model, on its validation images"
    )
    bench.add_argument(
        "--batch-size", type=_positive_int, action="append", dest="batch_sizes", metavar="N", help="default: 1, 8, 32"
    )

    bench = _add_bench(benches, "profile", "the time of a training step, by operator", verbs.run_bench_profile)
    bench.add_argument("--steps", type=_positive_int, default=3, help="number of steps to average over (default: 3)")
    _add_json(bench)

    bench = _add_bench(
        benches,
        "step",
        "the training step of this mesh alone, as a line of JSON",
        verbs.run_bench_step,
        CONFIGS / "quickstart.yaml",
    )
    bench.add_argument("--seconds", type=_positive_float, default=10.0, help="how long to measure (default: 10)")
    bench.add_argument("--real-data", action="store_true", help="train on images of data.root instead of noise")


def _add_bench(
    benches: Subparsers, name: str, help_text: str, handler: Handler, config: Path = CONFIGS / "bench_s16.yaml"
) -> argparse.ArgumentParser:
    bench = _add_verb(benches, name, help_text, handler)
    _add_config(bench, config)
    return bench
