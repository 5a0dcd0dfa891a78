"""Verbs that explain the program (config, models, recipes, completion), and those that run.sh runs itself."""

from __future__ import annotations

from pathlib import Path

from vit_static import verbs
from vit_static.cli.arguments import Subparsers, add_config, add_verb, positive_int
from vit_static.cli.completion import SHELLS, print_completion
from vit_static.common.installation import DATA_TOOLS, IS_WHEEL


def add_run_sh(subparsers: Subparsers) -> None:
    """Add the verbs that run.sh or `__main__.command` run: they are here to be listed."""
    of_run_sh = (
        ("setup", "Install the environment.", ["", "VIT_STATIC_DEVICE=cpu {}"]),
        ("test", "Run the tests; arguments go to pytest.", ["", "tests/data -k sampler"]),
    )
    for name, summary, examples in (
        *(() if IS_WHEEL else of_run_sh),
        ("data", "Prepare and check data sets; 'data --help' lists the tools.", ["--help", "folder --root PICTURES"]),
    ):
        verb = add_verb(subparsers, name, summary, verbs.refuse_run_sh_verb, examples=examples)
    # The tools have parsers of their own; these arguments are for the shell's completion.
    verb.add_argument("tool", nargs="?", choices=list(DATA_TOOLS), help="Run this program.")
    verb.add_argument("arguments", nargs="*", type=Path, help="Its arguments.")


def add_all(subparsers: Subparsers) -> None:
    """Add the other verbs in the order in which --help lists them."""
    _add_config_verb(subparsers)
    _add_models(subparsers)
    add_verb(
        subparsers,
        "recipes",
        "List the configs in configs/: task, expected top-1 and machine.",
        verbs.run_recipes,
        details="-c NAME trains one of them.",
        examples=["", "deit", "dinov3 linear"],
    ).add_argument("words", nargs="*", metavar="WORD", help="List only those that mention all these words.")
    verb = add_verb(
        subparsers,
        "completion",
        "Print a script with which a shell completes verbs, options, config keys and recipes.",
        print_completion,
        details="Load it in the shell's start-up file.",
        examples=["bash >> ~/.bash_completion", "zsh > ~/.zfunc/_run.sh"],
    )
    verb.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="Write the script for this shell.")


def _add_config_verb(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "config",
        "Explain the keys of the config: type, default and meaning.",
        verbs.run_config,
        details="With -c, print a config with all its keys.",
        examples=["optim", "random erasing", "--diff -c deit_s16"],
    )
    verb.add_argument(
        "query",
        nargs="*",
        metavar="SECTION|KEY",
        help="Explain this section or key, or all keys that mention this text (default: all keys).",
    )
    add_config(verb, None, "the defaults of all keys")
    verb.add_argument(
        "--diff", action="store_true", help="List only the keys whose values differ from the defaults; needs -c or -o."
    )
    verb.add_argument("--markdown", action="store_true", help="Print all keys as a page, which is configs/CONFIG.md.")


def _add_models(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "models",
        "List the model variants with their parameters and operations.",
        verbs.run_models,
        details="Set one with -o model.variant=NAME; width, depth and the rest can be set separately.",
        examples=["", "--image-size 384", "S/"],
    )
    verb.add_argument("words", nargs="*", metavar="NAME", help="List only those with this in their names.")
    verb.add_argument("--image-size", type=positive_int, metavar="PIXELS", help="Side of the images (default: 224).")
    verb.add_argument(
        "--num-classes", type=positive_int, default=1000, metavar="N", help="Width of the head (default: 1000)."
    )
