"""Verbs that train and evaluate: pretrain, finetune, eval, probe, plan, doctor, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from vit_static import verbs
from vit_static.cli.arguments import (
    Subparsers,
    add_checkpoint,
    add_config,
    add_json,
    add_verb,
    add_verbose,
    image_size,
    positive_int,
)
from vit_static.common.hardware import GPUS, GPUS_PER_NODE, INTERCONNECTS
from vit_static.config.loader import CONFIGS, DEFAULT_CONFIGS

QUICKSTART = CONFIGS / "quickstart.yaml"


def add_all(subparsers: Subparsers) -> None:
    """Add these verbs in the order in which --help lists them."""
    _add_training(
        subparsers,
        "pretrain",
        "Train a model from scratch.",
        "Without -c it trains the quickstart's small model on handwritten digits, which takes about three minutes on "
        "two cores. The same command resumes a run that was stopped.",
        ["", "-c vit_s16_i1k_90ep -o data.root=data/ILSVRC2012 -o optim.lr=5e-4"],
        aliases=["train"],
    )
    _add_training(
        subparsers,
        "finetune",
        "Train a model from the weights of another.",
        "Without -c it continues from the quickstart's model. -o init.from=PATH names weights of any supported format.",
        ["", "-c own_images -o data.root=PICTURES -o model.num_classes=5 -o init.from=WEIGHTS"],
    )
    _add_eval(subparsers)
    _add_probe(subparsers)
    _add_report(subparsers)
    _add_plan(subparsers)
    _add_doctor(subparsers)


def _add_training(
    subparsers: Subparsers,
    name: str,
    summary: str,
    details: str,
    examples: list[str],
    aliases: tuple[str, ...] | list[str] = (),
) -> None:
    verb = add_verb(subparsers, name, summary, verbs.run_training, examples=examples, details=details, aliases=aliases)
    add_verbose(verb)
    add_config(verb, DEFAULT_CONFIGS[name])
    verb.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): Resume from the latest checkpoint of the run, if there is one. never: Start from the "
        "beginning. PATH: Resume from this checkpoint or run.",
    )


def _add_eval(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "eval",
        "Measure top-1, top-5 and loss on the validation images.",
        verbs.run_eval,
        details="Every image counts once, on any number of processes.",
        examples=[
            "--checkpoint output/quickstart",
            "--checkpoint output/quickstart --per-class classes.csv",
            "--checkpoint output/quickstart --image-size 24 --image-size 32",
        ],
    )
    add_verbose(verb)
    add_config(verb, None)
    add_checkpoint(verb)
    verb.add_argument(
        "--per-class",
        type=Path,
        metavar="FILE.csv",
        help="Also write precision, recall, F1 and support of every class to this file.",
    )
    verb.add_argument(
        "--image-size",
        action="append",
        default=[],
        type=image_size,
        metavar="PIXELS|HxW",
        help="Evaluate at this size instead of the model's, with the position embedding resampled; repeat it for a "
        "result per size.",
    )
    labels = verb.add_mutually_exclusive_group()
    labels.add_argument("--real", type=Path, metavar="FILE", help="Use ImageNet's ReaL labels, of the file real.json.")
    labels.add_argument(
        "--imagenet-v2", type=Path, metavar="DIR", help="Use ImageNet-V2, a folder with subfolders 0 to 999."
    )


def _add_probe(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "probe",
        "Measure frozen features by k-NN, logistic regression and few-shot classification.",
        verbs.run_probe,
        examples=["--checkpoint output/quickstart", "--model exported -o data.root=PICTURES --only knn"],
    )
    add_verbose(verb)
    add_config(verb, None)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", type=Path, help="Use the model in this folder, written by export; -o data.root=DIR names the images."
    )
    add_checkpoint(verb, source)
    verb.add_argument(
        "--only",
        action="append",
        default=[],
        choices=["knn", "logistic", "fewshot"],
        help="Measure only this; can be repeated.",
    )
    verb.add_argument("--refresh", action="store_true", help="Extract the features again, even if they are cached.")
    add_json(verb)


def _add_report(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "report",
        "Write the page of a run, or one page that compares several runs.",
        verbs.run_report,
        examples=["output/quickstart", "output/first output/second --out comparison.html"],
    )
    add_verbose(verb)
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="A run folder, such as output/quickstart.")
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="Write this file (default: report.html in the folder of a single run, or here for several).",
    )


def _add_plan(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "plan",
        "Predict the cost of a run on a mesh of GPUs, without these GPUs.",
        verbs.run_plan,
        details="The training step is compiled for the mesh, and its operations, memory and exchanges are counted.",
        examples=["-c deit_b16 --mesh dp=8", "-c deit_b16 --world 16 --search --device h200"],
    )
    add_verbose(verb)
    add_config(verb, QUICKSTART)
    verb.add_argument(
        "--mesh",
        metavar="dp=8,mp=2,sharding=1",
        help="Replace the mesh of the config: dp, mp, pp, sharding (stage), accum (grad_accum_steps), recompute.",
    )
    verb.add_argument("--world", type=positive_int, metavar="N", help="Number of GPUs (default: the mesh's).")
    verb.add_argument(
        "--device", type=str.lower, default="a100-80g", choices=list(GPUS), help="GPU model (default: a100-80g)."
    )
    verb.add_argument(
        "--interconnect", default="ib-hdr", choices=list(INTERCONNECTS), help="Network between nodes (default: ib-hdr)."
    )
    verb.add_argument(
        "--gpus-per-node",
        type=positive_int,
        default=GPUS_PER_NODE,
        metavar="N",
        help=f"Number of GPUs in a node (default: {GPUS_PER_NODE}).",
    )
    verb.add_argument(
        "--rank", type=int, default=0, help="Compile the program of this rank (default: 0, in the first stage)."
    )
    verb.add_argument(
        "--num-images",
        type=positive_int,
        metavar="N",
        help="Number of training images, for the time of the whole run (default: those of data.root, or ImageNet's).",
    )
    verb.add_argument("--search", action="store_true", help="Compare all valid meshes of --world GPUs.")
    verb.add_argument("--json", type=Path, metavar="FILE", help="Also write the plan to this file.")


def _add_doctor(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "doctor",
        "Check a config on this machine's GPUs, or CPU, before a long run.",
        verbs.run_doctor,
        details="It takes about two minutes.",
        examples=["-c deit_b16", "--only kernels --json doctor.json"],
    )
    add_verbose(verb)
    add_config(verb, QUICKSTART)
    verb.add_argument(
        "--only", action="append", default=[], metavar="CHECK", help="Perform only this check; can be repeated."
    )
    add_json(verb)
    verb.add_argument("--worker", type=Path, metavar="DIR", help=argparse.SUPPRESS)  # for doctor/runner.py
