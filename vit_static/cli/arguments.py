"""Parsers of verbs, and the arguments that several verbs share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias, get_args

from vit_static.common.errors import UserError
from vit_static.common.text import program_name
from vit_static.config.schema import BackendChoice, InferencePrecision

Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"
Handler = Callable[[argparse.Namespace], int]

_EXAMPLES = "Examples:\n"


class HelpFormatter(argparse.HelpFormatter):
    """Formatter that wraps descriptions, and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Parser that raises UserError for a wrong argument, instead of printing the usage and exiting as argparse does."""

    example: str | None = None  # of a verb: a command that is complete

    def error(self, message: str) -> NoReturn:
        help_command = f"'{self.prog} --help' lists the {'verbs' if self.prog == program_name() else 'arguments'}"
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message and self.example is not None:
            raise UserError(f"{self.prog} needs {missing}, as in: {self.example} ({help_command})")
        raise UserError(f"{message} ({help_command})")


def add_verb(
    subparsers: Subparsers,
    name: str,
    summary: str,
    handler: Handler,
    *,
    examples: Sequence[str],
    details: str = "",
    aliases: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Add the parser of a verb.

    `summary` and `details` are full sentences; `examples` are arguments of the
    verb, or whole commands with {} for the verb.
    """
    command = f"{subparsers._prog_prefix} {name}"
    lines = [each.format(command) if "{}" in each else f"{command} {each}".rstrip() for each in examples]
    verb = subparsers.add_parser(
        name,
        aliases=list(aliases),
        help=summary,
        description=f"{summary} {details}".strip(),
        epilog=_EXAMPLES + "\n".join(f"  {line}" for line in lines),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    verb.set_defaults(handler=handler)
    verb.example = lines[0]
    return verb


def add_verbose(verb: argparse.ArgumentParser) -> None:
    """Add -v."""
    verb.add_argument("-v", "--verbose", action="store_true", help="Also show the messages of Paddle and DALI.")


def add_config(
    verb: argparse.ArgumentParser, default: Path | None, default_name: str = "the config stored with the weights"
) -> None:
    """Add -c and -o. `default_name`: what the help says about the default if that is None."""
    default_name = default_name if default is None else default.name
    verb.add_argument(
        "-c",
        "--config",
        type=Path,
        default=default,
        help=f"Read this YAML file, or the recipe of this name in configs/ (default: {default_name}).",
    )
    verb.add_argument(
        "-o",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="Set a config key, such as optim.lr=3e-4; repeat -o for each key. The verb 'config' lists all keys.",
    )


def add_checkpoint(
    verb: argparse.ArgumentParser,
    alternatives: argparse._MutuallyExclusiveGroup | None = None,
    default_weights: Literal["best", "last"] = "last",
) -> None:
    """Add --checkpoint, --ema and --weights."""
    (alternatives or verb).add_argument(
        "--checkpoint",
        type=Path,
        required=alternatives is None,
        help="Use the weights of this run folder, checkpoint or file (.pdparams, .npz, .safetensors).",
    )
    verb.add_argument("--ema", action="store_true", help="Use the moving average of the weights (optim.ema_decay).")
    verb.add_argument(
        "--weights",
        choices=["best", "last"],
        default=default_weights,
        help=f"Of a run folder, use the weights with the best result by eval.metric, or those of its last step "
        f"(default: {default_weights}).",
    )


def add_exported_model(verb: argparse.ArgumentParser) -> None:
    """Add --model, --precision and --backend."""
    verb.add_argument("--model", type=Path, required=True, help="Use the model in this folder, written by export.")
    verb.add_argument(
        "--precision",
        choices=get_args(InferencePrecision),
        help="Compute in this precision (default: the one the model was exported for).",
    )
    verb.add_argument(
        "--backend",
        choices=get_args(BackendChoice),
        default="auto",
        help="Run the model in this library; auto: in the one that runs it fastest on this machine (default: auto).",
    )


def add_json(verb: argparse.ArgumentParser) -> None:
    """Add --json."""
    verb.add_argument("--json", type=Path, metavar="FILE", help="Also write the results to this file.")


def add_rounds(verb: argparse.ArgumentParser, rounds: int = 5) -> None:
    """Add --rounds, --seconds and --json, of benchmarks."""
    verb.add_argument(
        "--rounds",
        type=positive_int,
        default=rounds,
        help=f"Measure all in turn, this many times (default: {rounds}).",
    )
    verb.add_argument(
        "--seconds", type=positive_float, default=8.0, help="Measure each for this long in a round (default: 8)."
    )
    add_json(verb)


def positive_int(text: str) -> int:
    """Return the number. Raise ArgumentTypeError unless it is above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def image_size(text: str) -> tuple[int, int]:
    """Return height and width of "PIXELS" or "HxW". Raise ArgumentTypeError for any other text."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of pixels, such as 224, or HxW, such as 192x256")
    return int(match[1]), int(match[2] or match[1])


def positive_float(text: str) -> float:
    """Return the number. Raise ArgumentTypeError unless it is finite and above 0."""
    number = float(text)
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number
