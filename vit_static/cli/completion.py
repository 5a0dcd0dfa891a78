"""Shell completion: a static script by shtab, so that completing never starts Python."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vit_static.common.errors import EXIT_DONE
from vit_static.common.text import print_text, program_name
from vit_static.config.loader import CONFIGS
from vit_static.config.mistakes import all_keys

SHELLS = ("bash", "zsh")

# Functions of the script, which print the candidates for a word that begins with $1.
_BASH_FUNCTIONS = """
_vit_static_configs() {{ compgen -W "{recipes}" -- "$1"; compgen -f -X '!*.yaml' -- "$1"; compgen -d -- "$1"; }}
_vit_static_keys() {{ compgen -W "{keys}" -- "$1"; }}
"""
# After "optim.lr=" the value follows, without a space.
_BASH_END = """
_vit_static_complete() {{ _shtab_vit_static; [[ ${{COMPREPLY[0]-}} != *= ]] || compopt -o nospace; }}
complete -o bashdefault -F _vit_static_complete {program}
"""
_ZSH_FUNCTIONS = """
_vit_static_configs() {{ local -a names; names=({recipes}); _describe recipe names; _files -g '*.yaml'; }}
_vit_static_keys() {{ local -a names; names=({keys}); compadd -S '' -a names; }}
"""
_CONFIGS = {"bash": "_vit_static_configs", "zsh": "_vit_static_configs"}
_KEYS = {"bash": "_vit_static_keys", "zsh": "_vit_static_keys"}


def print_completion(arguments: argparse.Namespace) -> int:
    """Print the script for a shell."""
    print_text(completion_script(arguments.parser, arguments.shell))
    return EXIT_DONE


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell. It completes config keys after -o, recipes after -c, and files."""
    import shtab

    _complete_values(parser, shtab.FILE)
    parser.prog = program_name().rpartition("/")[2]  # shells find the script by the last part of the command
    recipes = " ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    keys = " ".join(f"{key}=" for key in all_keys())
    functions = {"bash": _BASH_FUNCTIONS, "zsh": _ZSH_FUNCTIONS}
    preamble: Any = {name: text.format(recipes=recipes, keys=keys) for name, text in functions.items()}
    script: str = shtab.complete(parser, shell, root_prefix="vit_static", preamble=preamble)
    return script + (_BASH_END.format(program=parser.prog) if shell == "bash" else "")


def _complete_values(parser: argparse.ArgumentParser, files: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_values(verb, files)
        elif action.dest == "overrides":
            action.complete = _KEYS  # type: ignore[attr-defined]
        elif action.dest == "config":
            action.complete = _CONFIGS  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = files  # type: ignore[attr-defined]
