"""Shell completion: a static script by shtab, so that completing never starts Python."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from vit_static.common.errors import EXIT_DONE
from vit_static.common.text import print_text, program_name
from vit_static.config.loader import CONFIGS
from vit_static.config.mistakes import all_keys, field_of
from vit_static.config.schema import Config
from vit_static.config.section import choices_of
from vit_static.model.variants import VARIANTS

SHELLS = ("bash", "zsh")

# Functions of the script, which print the candidates for a word that begins with $1.
_BASH_FUNCTIONS = """
_vit_static_configs() {{ compgen -W "{recipes}" -- "$1"; compgen -f -X '!*.yaml' -- "$1"; compgen -d -- "$1"; }}
_vit_static_settings() {{ compgen -W "{settings}" -- "$1"; }}
_vit_static_topics() {{ compgen -W "{topics}" -- "$1"; }}
_vit_static_runs() {{ compgen -W "auto never" -- "$1"; compgen -d -- "$1"; }}
_vit_static_values() {{ case $1 in
{values}
esac; }}
"""
# After "optim.name=" the value follows, without a space. Readline takes the equals sign for a word of its own.
_BASH_END = """
_vit_static_complete() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} key="" value=""
  if [[ $word == "=" ]]; then key=$before
  elif [[ $before == "=" ]]; then key=${{COMP_WORDS[COMP_CWORD-2]}} value=$word
  fi
  if [[ -n $key ]]; then
    COMPREPLY=($(compgen -W "$(_vit_static_values "$key")" -- "$value"))
    [[ -n ${{COMPREPLY[0]-}} ]] || {{ compopt -o filenames; COMPREPLY=($(compgen -f -- "$value")); }}
    return
  fi
  _shtab_vit_static
  [[ ${{COMPREPLY[0]-}} != *= ]] || compopt -o nospace
}} 2> /dev/null
complete -o bashdefault -o default -F _vit_static_complete {program}
"""
_ZSH_FUNCTIONS = """
_vit_static_configs() {{ local -a names; names=({recipes}); _describe recipe names; _files -g '*.yaml'; }}
_vit_static_topics() {{ local -a names; names=({topics}); compadd -a names; }}
_vit_static_runs() {{ compadd auto never; _files -/; }}
_vit_static_values() {{ case $1 in
{values}
esac; }}
_vit_static_settings() {{
  local -a names
  if compset -P 1 '*='; then
    names=($(_vit_static_values ${{IPREFIX%=}}))
    (( $#names )) && compadd -a names || _files
  else
    names=({settings}); compadd -S '' -a names
  fi
}}
"""
_COMPLETERS = {  # by the argument's name
    "overrides": "_vit_static_settings",
    "config": "_vit_static_configs",
    "query": "_vit_static_topics",
    "resume": "_vit_static_runs",
}


def print_completion(arguments: argparse.Namespace) -> int:
    """Print the script for a shell."""
    print_text(completion_script(arguments.parser, arguments.shell))
    return EXIT_DONE


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell. It completes keys and their values after -o, recipes after -c, and files."""
    import shtab

    _add_help(parser)
    _complete_values(parser, shtab.FILE)
    parser.prog = program_name().rpartition("/")[2]  # shells find the script by the last part of the command
    keys = all_keys()
    words = {
        "recipes": " ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))),
        "settings": " ".join(f"{key}=" for key in keys),
        "topics": " ".join([*Config.model_fields, *(key for key in keys if "." in key)]),
        "values": "\n".join(f'{key}) echo "{" ".join(_values_of(key))}" ;;' for key in keys if _values_of(key)),
    }
    functions = {"bash": _BASH_FUNCTIONS, "zsh": _ZSH_FUNCTIONS}
    preamble: Any = {name: text.format(**words) for name, text in functions.items()}
    script: str = shtab.complete(parser, shell, root_prefix="vit_static", preamble=preamble)
    return script + (_BASH_END.format(program=parser.prog) if shell == "bash" else "")


def _values_of(key: str) -> list[str]:
    """Return the values of a key that can be listed; none for numbers and free text."""
    if key == "model.variant":
        return list(VARIANTS)
    annotation = field_of(tuple(key.split("."))).annotation
    members = {annotation, *get_args(annotation)}
    switches = ["true", "false"] if bool in members else []
    values = [*choices_of(annotation), *switches]
    return [*values, "null"] if values and NoneType in members else values


def _add_help(parser: argparse.ArgumentParser) -> None:
    """Add the verb `help`, which the parser itself doesn't need."""
    action = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    verbs = list(action.choices)
    action.add_parser("help", help="Explain a verb.").add_argument("verb", choices=verbs)


def _complete_values(parser: argparse.ArgumentParser, files: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_values(verb, files)
        elif action.dest in _COMPLETERS:
            action.complete = dict.fromkeys(SHELLS, _COMPLETERS[action.dest])  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = files  # type: ignore[attr-defined]
