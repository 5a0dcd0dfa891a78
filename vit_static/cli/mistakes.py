"""Answers to wrong words on the command line: misspelt verbs and options, config keys in another form than -o takes."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Collection, Sequence

from vit_static.common.errors import UserError, truncate
from vit_static.common.text import program_name
from vit_static.config.mistakes import all_keys, nearest_key

RENAMED_VERBS = {"attend": "visualize"}  # by the old name
RENAMED_FLAGS = {"--cards-per-node": "--gpus-per-node", "--fed": "--real-data"}
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")


def check_words(words: Sequence[str], verbs: Collection[str]) -> None:
    """Raise UserError for a renamed or unknown verb, a renamed flag, and a second key after one -o."""
    program = program_name()
    if words and words[0] in RENAMED_VERBS:
        new_name = RENAMED_VERBS[words[0]]
        raise UserError(f"the verb {words[0]} is now called {new_name}: {program} {new_name}")
    for word in words:
        flag = word.partition("=")[0]
        if flag in RENAMED_FLAGS:
            raise UserError(f"{flag} is now called {RENAMED_FLAGS[flag]}")
    if words and not words[0].startswith("-") and words[0] not in verbs:
        similar = difflib.get_close_matches(words[0][:100], verbs, n=1)
        remedy = f"did you mean {similar[0]}?" if similar else "choose one of the list"
        raise UserError(f"{truncate(words[0])} is not a verb; {remedy} ('{program} --help' lists the verbs)")
    _check_overrides(words)


def _check_overrides(words: Sequence[str]) -> None:
    sections = {key.partition(".")[0] for key in all_keys()}
    for number, word in enumerate(words):
        if word != "-o" or number + 1 >= len(words):
            continue
        settings = [words[number + 1]]
        for following in words[number + 2 :]:
            if not (_OVERRIDE.match(following) and re.split("[.=]", following)[0] in sections):
                break
            settings.append(following)
        if len(settings) > 1:
            correct = " ".join(f"-o {shlex.quote(setting)}" for setting in settings)
            raise UserError(f"-o takes one key; write {truncate(correct, 300)}")


def describe_unknown(words: Sequence[str], verb: argparse.ArgumentParser) -> str:
    """Return what is wrong with arguments that the verb doesn't have, and the correct form if it can be guessed."""
    word = words[0]
    help_command = f"'{verb.prog} --help' lists the arguments"
    if not word.startswith("-"):
        return f"{truncate(word)}: unexpected argument ({help_command})"
    flag, separator, value = word.partition("=")
    flags = [option for action in verb._actions for option in action.option_strings if action.help != argparse.SUPPRESS]
    similar = difflib.get_close_matches(flag[:100], flags, n=1, cutoff=0.75)
    name = flag.lstrip("-").replace("-", "_")
    key = name if name in all_keys() else None
    if key is None and not similar:
        key = nearest_key(name.split("."))
    if key is not None and "-o" in flags:
        if not separator:
            value = next((each for each in words[1:2] if not each.startswith("-")), "VALUE")
        return f"{truncate(flag)} is not an option; config keys are set with -o: {_override(key, value)}"
    remedy = f"; did you mean {similar[0]}?" if similar else ""
    return f"{truncate(flag)} is not an option of {verb.prog}{remedy} ({help_command})"


def _override(key: str, value: str) -> str:
    return f"-o {shlex.quote(f'{key}={truncate(value)}')}"
