"""Verbs that use a trained model: average, export, predict, serve, visualize, convert."""

from __future__ import annotations

from pathlib import Path

from vit_static import verbs
from vit_static.cli.arguments import (
    Subparsers,
    add_checkpoint,
    add_config,
    add_exported_model,
    add_verb,
    add_verbose,
    positive_float,
    positive_int,
)


def add_all(subparsers: Subparsers) -> None:
    """Add these verbs in the order in which --help lists them."""
    _add_average(subparsers)
    _add_export(subparsers)
    _add_predict(subparsers)
    _add_serve(subparsers)
    _add_visualize(subparsers)
    _add_convert(subparsers)


def _add_average(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "average",
        "Average the weights of a run's last checkpoints, or of several runs.",
        verbs.run_average,
        details="The average is written to a folder that eval, export and init.from take for a run's.",
        examples=[
            "output/quickstart --last 2",
            "output/first output/second output/third --greedy --out output/soup",
        ],
    )
    add_verbose(verb)
    add_config(verb, None)
    verb.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="A run folder, a checkpoint or a file of weights."
    )
    verb.add_argument(
        "--last",
        type=positive_int,
        metavar="N",
        help="Use the last N checkpoints of each run (default: at most 5 of a single run, or the latest of several).",
    )
    verb.add_argument(
        "--greedy",
        action="store_true",
        help="Use only weights that improve the average's result on the validation images (arXiv 2203.05482).",
    )
    verb.add_argument("--ema", action="store_true", help="Use the moving averages of the weights (optim.ema_decay).")
    verb.add_argument(
        "--out", type=Path, metavar="DIR", help="Write to this folder (default: NAME_average, beside the first run)."
    )


def _add_export(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "export",
        "Write files for inference, and check them against the trained model.",
        verbs.run_export,
        examples=[
            "--checkpoint output/quickstart --out exported",
            "--checkpoint output/quickstart --out exported_int8 -o export.precision=int8",
        ],
    )
    add_verbose(verb)
    add_config(verb, None)
    add_checkpoint(verb, default_weights="best")
    verb.add_argument("--out", type=Path, required=True, help="Write to this folder.")
    verb.add_argument("--onnx", action="store_true", help="Also write model.onnx, in float32.")


def _add_predict(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "predict",
        "Print one line per image: its path and its most likely classes.",
        verbs.run_predict,
        examples=["--model exported data/digits/val/7", "--model exported --top-k 2 --format csv one.jpg two.png"],
    )
    add_verbose(verb)
    add_exported_model(verb)
    verb.add_argument(
        "--top-k",
        type=int,
        help="Number of classes per image (default: all that reach the thresholds of the export, or 5 without any).",
    )
    verb.add_argument("--batch-size", type=int, default=32, help="Number of images per batch (default: 32).")
    verb.add_argument(
        "--format",
        choices=["json", "csv", "table"],
        default="json",
        help="Format of the lines (default: json, one object per line).",
    )
    verb.add_argument(
        "--features",
        type=Path,
        metavar="OUT.npy",
        help="Also write the features that the head reads: one row per line printed, NaN for an unreadable image.",
    )
    verb.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="Files or folders; - reads a list of files from stdin."
    )


def _add_serve(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "serve",
        "Serve an exported model over HTTP.",
        verbs.run_serve,
        details="POST images to /predict, or drop them on the page at /; the page /docs describes all endpoints.",
        examples=["--model exported", "--model exported --host 0.0.0.0 --port 9000 --api-key key.txt"],
    )
    add_verbose(verb)
    add_exported_model(verb)
    verb.add_argument("--host", default="127.0.0.1", help="Listen on this address (default: 127.0.0.1).")
    verb.add_argument("--port", type=int, default=8000, help="Listen on this port (default: 8000; 0: any free port).")
    verb.add_argument(
        "--api-key",
        type=Path,
        metavar="FILE",
        help="Answer only clients that send the key in this file (default: that in VIT_STATIC_API_KEY, if it is set).",
    )
    verb.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="Let web pages of this origin use the server, such as https://example.org; can be repeated; *: of all.",
    )
    verb.add_argument("--batch-size", type=positive_int, default=32, help="Images per batch at most (default: 32).")
    verb.add_argument(
        "--max-wait-ms", type=float, default=5.0, help="A request waits this long for others to join (default: 5)."
    )
    verb.add_argument("--max-mb", type=positive_float, default=20.0, help="Size of a request's images (default: 20).")
    verb.add_argument("--max-images", type=positive_int, default=32, help="Images of a request (default: 32).")
    verb.add_argument("--max-megapixels", type=positive_float, default=64.0, help="Size of an image (default: 64).")
    verb.add_argument(
        "--max-total-mb", type=positive_float, default=256.0, help="Size of all waiting image files (default: 256)."
    )
    verb.add_argument(
        "--max-total-megapixels",
        type=positive_float,
        default=64.0,
        help="Size of all images that are decoded at once (default: 64).",
    )
    verb.add_argument("--max-waiting", type=positive_int, default=512, help="Number of waiting images (default: 512).")
    verb.add_argument("--timeout-s", type=positive_float, default=30.0, help="Time limit of a request (default: 30).")
    verb.add_argument(
        "--header-timeout-s",
        type=positive_float,
        default=10.0,
        help="Time limit for a request's headers (default: 10).",
    )
    verb.add_argument(
        "--min-kb-per-s",
        type=positive_float,
        default=10.0,
        help="Speed at which a client must send an image, after 5 s (default: 10).",
    )
    verb.add_argument(
        "--max-connections",
        type=positive_int,
        help="Number of connections (default: 512, or fewer if the limit on open files requires it).",
    )
    verb.add_argument(
        "--max-connections-per-client",
        type=positive_int,
        help="Number of connections per IPv4 address or IPv6 /64 network (default: half of all; behind a proxy, set it "
        "to --max-connections). A client may use the same share of the waiting images and of --max-total-mb.",
    )


def _add_visualize(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "visualize",
        "Draw what a model attends to, its position embedding and its patch filters.",
        verbs.run_visualize,
        examples=[
            "--checkpoint output/quickstart data/digits/val/3/digit_0059.jpeg",
            "--model exported --out pictures one.jpg two.png",
        ],
    )
    add_verbose(verb)
    add_config(verb, None)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="Use the model in this folder, written by export.")
    add_checkpoint(verb, source)
    verb.add_argument("--out", type=Path, default=Path("visualize"), help="Write to this folder (default: visualize).")
    verb.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="Image files, or folders of them.")


def _add_convert(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "convert",
        "Convert weights between formats.",
        verbs.run_convert,
        details="The format of the input is detected from its content.",
        examples=[
            "--from output/quickstart --to quickstart.safetensors",
            "--from B_16.npz --to b16.pdparams --head drop",
            "--from output/lora --to output/adapters/adapter_model.safetensors --lora adapters",
        ],
    )
    add_verbose(verb)
    add_config(verb, None)
    verb.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="FILE",
        help="Read this file, run folder or checkpoint.",
    )
    verb.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="FILE",
        help="Write this file; its name ends with .pdparams, .npz or .safetensors.",
    )
    verb.add_argument(
        "--format",
        choices=["plsc", "timm", "huggingface", "google", "openclip"],
        help="Names of the arrays (default: from the ending of --to, timm for .safetensors); huggingface also writes "
        "config.json, and openclip the image tower alone.",
    )
    verb.add_argument(
        "--head", choices=["keep", "drop"], default="keep", help="Keep or drop the head and its tanh layer."
    )
    verb.add_argument(
        "--lora",
        choices=["merged", "adapters"],
        help="Of a run with LoRA, write the merged weights (default), or only its adapters and head, in peft's layout.",
    )
    verb.add_argument("--fold-layer-scale", action="store_true", help="Multiply LayerScale into the layers before it.")
    verb.add_argument(
        "--ema",
        action="store_true",
        help="Use the moving average of the weights, of a run, a checkpoint or a nested state dict.",
    )
    verb.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="Image size of the weights, needed if their grid of patches isn't square.",
    )
