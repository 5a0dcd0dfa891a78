"""Answers to wrong words on the command line: misspelt verbs and options, config keys in another form than -o takes."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Mapping, Sequence

from vit_static.common.errors import UserError, truncate
from vit_static.common.text import program_name
from vit_static.config.mistakes import all_keys, nearest_key, with_brackets

RENAMED_VERBS = {"attend": "visualize"}  # by the old name
RENAMED_FLAGS = {"--cards-per-node": "--gpus-per-node", "--fed": "--real-data"}
# Flags of other programs, and of other verbs, with those that they may stand for
OTHER_FLAGS = {
    **dict.fromkeys(("--output", "--output-dir", "--out-dir", "--save", "--outfile"), ("--out",)),
    **dict.fromkeys(("--gpus", "--num-gpus", "--ngpus", "--nproc", "--world-size"), ("--world",)),
    **dict.fromkeys(("--ckpt", "--checkpoints", "--model", "--run", "--model-path"), ("--checkpoint", "--model")),
    **dict.fromkeys(("--checkpoint",), ("--model",)),
    **dict.fromkeys(("--cfg", "--recipe", "--yaml"), ("--config",)),
    **dict.fromkeys(("--topk", "--k", "--num-results"), ("--top-k",)),
    **dict.fromkeys(("--key", "--token", "--auth"), ("--api-key",)),
    **dict.fromkeys(("--set", "--override", "--overrides", "--opt", "--opts"), ("-o",)),
    **dict.fromkeys(("--images", "--train-images"), ("--num-images",)),
}
# Flags of other programs that set a value
FLAG_SETTINGS = {
    **dict.fromkeys(("--fp16", "--half", "--float16"), "amp.dtype=float16"),
    **dict.fromkeys(("--bf16", "--bfloat16"), "amp.dtype=bfloat16"),
    **dict.fromkeys(("--fp32", "--float32", "--no-amp"), "amp.level=O0"),
    "--amp": "amp.level=O1",
    "--cpu": "device=cpu",
}
_PROCESSES = ("--gpus", "--num-gpus", "--ngpus", "--nproc", "--world-size", "--world")
_KEY = re.compile(r"[A-Za-z_]+(\.[A-Za-z_0-9]+)*")
_NUMBER = re.compile(r"-[\d.]")


def check_words(words: Sequence[str], verbs: Mapping[str, argparse.ArgumentParser]) -> None:
    """Raise UserError for a renamed or unknown verb, a renamed flag, and config keys in another form than -o takes."""
    program = program_name()
    if words and words[0] in RENAMED_VERBS:
        new_name = RENAMED_VERBS[words[0]]
        raise UserError(f"the verb {words[0]} is now called {new_name}: {program} {new_name}")
    for word in words:
        flag = word.partition("=")[0]
        if flag in RENAMED_FLAGS:
            raise UserError(f"{flag} is now called {RENAMED_FLAGS[flag]}")
    if words and not words[0].startswith("-") and words[0] not in verbs:
        settings, _ = _settings_at(words, 0)
        if settings:
            raise UserError(f"a verb comes first, and config keys after -o: {program} pretrain {_overrides(settings)}")
        similar = difflib.get_close_matches(words[0][:100], verbs, n=1)
        remedy = f"did you mean {similar[0]}?" if similar else "choose one of the list"
        raise UserError(f"{truncate(words[0])} is not a verb; {remedy} ('{program} --help' lists the verbs)")
    if words and words[0] in verbs and _takes_overrides(verbs[words[0]]):
        _check_overrides(words)


def check_flags(words: Sequence[str], verb: argparse.ArgumentParser) -> None:
    """Raise UserError for a flag that the verb doesn't have, before argparse misses those that it stands for."""
    for number, word in enumerate(words):
        if word == "--":
            break
        if word.startswith("--") and word.partition("=")[0] not in verb._option_string_actions:
            raise UserError(describe_unknown(words[number:], verb))


def _takes_overrides(verb: argparse.ArgumentParser) -> bool:
    nested = (action for action in verb._actions if isinstance(action, argparse._SubParsersAction))
    return "-o" in verb._option_string_actions or any(
        _takes_overrides(each) for action in nested for each in action.choices.values()
    )


def _check_overrides(words: Sequence[str]) -> None:
    """Raise UserError, with the correct form, for keys without -o, for several after one, and for spaces around =."""
    for number, word in enumerate(words):
        settings, num_words = _settings_at(words, number)
        follows_flag = number > 0 and words[number - 1].startswith("-")
        if word != "-o" and settings and not follows_flag:
            raise UserError(f"config keys are set with -o; write {_overrides(settings)}")
        if word != "-o":
            continue
        if len(settings := _joined_settings("".join(words[number + 1 : number + 2]))) > 1:
            raise UserError(f"-o takes one key; write {_overrides(settings)}")
        settings, num_words = _settings_at(words, number + 1, any_key=True)
        if len(settings) > 1:
            raise UserError(f"-o takes one key; write {_overrides(settings)}")
        if num_words > 1:
            raise UserError(f"-o takes key=value without spaces; write {_overrides(settings)}")


def _settings_at(words: Sequence[str], start: int, *, any_key: bool = False) -> tuple[list[str], int]:
    """Return the settings of config keys, key=value, that begin at a word, and the number of their words.

    Spaces may be around the equals sign. `any_key`: the first key may be one that doesn't exist.
    """
    sections = {key.partition(".")[0] for key in all_keys()}
    settings: list[str] = []
    position = start
    while position < len(words):
        key, separator, value = words[position].partition("=")
        rest = words[position + 1 : position + 3]
        is_key = key.partition(".")[0] in sections or (any_key and not settings)
        if not (is_key and _KEY.fullmatch(key)):
            break
        num_words = 1
        if not separator and rest and rest[0].startswith("="):
            separator, value, num_words = "=", rest[0][1:], 2
            rest = rest[1:]
        if not separator:
            break
        if not value and rest and _is_value(rest[0]):
            value, num_words = rest[0], num_words + 1
        settings.append(f"{key}={value}")
        position += num_words
    return settings, position - start


def _joined_settings(word: str) -> list[str]:
    """Return the settings that one word joins with commas, semicolons or spaces: "optim.lr=1,train.epochs=2"."""
    known = {key.partition(".")[0] for key in all_keys()}
    starts = [
        match.start() for match in re.finditer(r"(?:^|(?<=[,;\s]))([a-z_]+)[a-z_0-9.]*\s*=", word) if match[1] in known
    ]
    if starts[:1] != [0]:
        return []
    ends = [*starts[1:], len(word)]
    return [word[start:end].rstrip(",; \t") for start, end in zip(starts, ends, strict=True)]


def _is_value(word: str) -> bool:
    is_setting = "=" in word and _KEY.fullmatch(word.partition("=")[0]) is not None
    return not is_setting and (not word.startswith("-") or _NUMBER.match(word) is not None)


def _overrides(settings: Sequence[str]) -> str:
    return truncate(" ".join(f"-o {shlex.quote(setting)}" for setting in settings), 300)


def describe_unknown(words: Sequence[str], verb: argparse.ArgumentParser) -> str:
    """Return what is wrong with arguments that the verb doesn't have, and the correct form if it can be guessed."""
    word = words[0]
    help_command = f"'{verb.prog} --help' lists the arguments"
    has_overrides = "-o" in verb._option_string_actions
    if has_overrides and not word.startswith("-") and _KEY.fullmatch(word.partition("=")[0]) and "=" in word:
        return f"{truncate(word)}: config keys are set with -o; write -o {shlex.quote(truncate(word))}"
    if not word.startswith("-"):
        return f"{truncate(word)}: unexpected argument ({help_command})"
    flag, separator, value = word.partition("=")
    flags = [option for action in verb._actions for option in action.option_strings if action.help != argparse.SUPPRESS]
    similar = [each for each in OTHER_FLAGS.get(flag.replace("_", "-"), ()) if each in flags]
    if not similar and flag in _PROCESSES and "--resume" in flags:
        return f"{flag} is not an option; NPROC=N sets the number of processes, and CUDA_VISIBLE_DEVICES=0,1 the GPUs"
    if has_overrides and flag in FLAG_SETTINGS and flag not in flags:
        return f"{flag} is not an option; config keys are set with -o: -o {FLAG_SETTINGS[flag]}"
    has_synonym = bool(similar)
    similar = similar or difflib.get_close_matches(flag[:100], flags, n=1, cutoff=0.75)
    name = flag.lstrip("-").replace("-", "_")
    key = name if name in all_keys() else None
    if key is None and not similar:
        nearest = nearest_key(name.split("."))
        key = nearest if nearest in all_keys() else None
    if key is not None and has_overrides and not has_synonym:
        if not separator:
            value = next((each for each in words[1:2] if not each.startswith("-")), "VALUE")
        return f"{truncate(flag)} is not an option; config keys are set with -o: {_override(key, value)}"
    remedy = f"; did you mean {similar[0]}?" if similar else ""
    return f"{truncate(flag)} is not an option of {verb.prog}{remedy} ({help_command})"


def _override(key: str, value: str) -> str:
    return f"-o {shlex.quote(f'{key}={truncate(with_brackets(key, value))}')}"
