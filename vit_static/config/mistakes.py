"""Messages for mistakes in configs: unknown keys with the nearest one, wrong values with what is expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vit_static.common.errors import format_value, truncate
from vit_static.config.other_names import OTHER_NAMES
from vit_static.config.schema import Config
from vit_static.config.section import UNEXPECTED_BOOL, Section, choices_of
from vit_static.config.type_words import expected_type
from vit_static.config.yaml_loader import YamlError, read_yaml

Key = tuple[str, ...]  # (section, key), or (key,) of the top level

# Old names are refused, with the new name in the message.
RENAMED_KEYS = {
    "train.frozen": "train.freeze",
    "augment.crop_area": "augment.crop_scale",
    "augment.crop_aspect": "augment.crop_aspect_ratio",
    "augment.erase_probability": "augment.random_erasing_probability",
    "augment.erase_area": "augment.random_erasing_area",
    "augment.erase_aspect": "augment.random_erasing_aspect_ratio",
    "augment.erase_with": "augment.random_erasing_with",
    "augment.mix_switch": "augment.mixup_switch_prob",
    "augment.repeats": "augment.repeated_aug",
    "eval.crop_ratio": "eval.crop_pct",
    "model.norm_after_pool": "model.fc_norm",
    "model.class_position": "model.class_token_pos_embed",
}
RENAMED_VALUES = {("train.freeze", "body"): "backbone"}


def describe_mistake(
    error: ValidationError,
    path: Path | None,
    overridden: Mapping[Key, str],
    is_valid: Callable[[Key, Any], bool],
) -> str:
    """Return pydantic's first error in one line: where it is, the key (once), its value, the problem and the remedy.

    `overridden`: the overrides as the user wrote them. `is_valid(key, value)`: whether a key would accept a value.
    """
    mistake = error.errors()[0]
    location = [str(part) for part in mistake["loc"][: 2 if section_type(mistake["loc"][:1]) else 1]]
    message, value = mistake["msg"].removeprefix("Value error, "), format_value(mistake["input"])
    is_contradiction = mistake["type"] == "value_error" and len(location) < 2 and location[:1] != ["name"]
    if is_contradiction:  # found by a validator of the section or of the whole config, whose message names the key
        named, separator, rest = message.partition(": ")
        name, _, value_in_message = named.partition(" = ")
        candidate, value = [*location, *name.split(".")], ""
        if separator and ".".join(candidate) in all_keys():
            location, message, value = candidate, rest, value_in_message
    responsible = _responsible(mistake, overridden, is_contradiction=is_contradiction)
    key = ".".join(map(truncate, location))
    origin = " ".join(f"-o {truncate(text)}" for text in responsible.values()) or str(path or "-o")
    subject, name = f"{key} = {value}: " if value else f"{key}: ", f"{origin}: {key} "
    if list(responsible) == [tuple(location)]:  # the override itself names the key
        subject, name = "", f"-o {key} "
    if mistake["type"] == "extra_forbidden":
        return name + _unknown_key(key, location, mistake["input"])
    if mistake["type"] in ("model_type", "dict_type"):
        return f"{origin}: {subject}is a section; set its keys with -o {key}.KEY=VALUE"
    new_value = _new_value(key, mistake["input"])
    if new_value:
        return f"{origin}: {subject}{new_value}"
    if mistake["type"] == "value_error":
        subject = subject if subject and is_contradiction and value else f"{key}: " if subject and key else ""
        return f"{origin}: {subject}{message}"
    return f"{origin}: {subject}{_problem(mistake, tuple(location), is_valid)}"


def _responsible(mistake: Any, overridden: Mapping[Key, str], *, is_contradiction: bool) -> dict[Key, str]:
    """Return the overrides that have caused a mistake; none if it is in the file.

    Of a contradiction, these are the ones whose keys its message names.
    """
    section = tuple(mistake["loc"])
    concerned = {key: text for key, text in overridden.items() if _concerns(section, key)}
    if not is_contradiction:
        return dict(list(concerned.items())[:1])
    words = set(re.findall(r"[a-z0-9_.]*[a-z0-9_]", mistake["msg"]))
    # Without its section, only a name that isn't an ordinary word.
    return {
        key: text
        for key, text in (concerned if section else overridden).items()
        if ".".join(key) in words or (key[-1] in words and (section or "_" in key[-1]))
    }


def _concerns(location: Sequence[Any], key: Key) -> bool:
    """Return whether a mistake at `location` is in the overridden `key`, or in a section on the way to it."""
    length = min(len(location), len(key))
    return length > 0 and tuple(location[:length]) == key[:length]


def _problem(mistake: Any, key: Key, is_valid: Callable[[Key, Any], bool]) -> str:
    """Return what is wrong with a value. For the commonest types of pydantic's errors in words of this program."""
    value, context = mistake["input"], mistake.get("ctx", {})
    is_of_union = len(mistake["loc"]) > len(key) and isinstance(mistake["loc"][len(key)], str)
    if isinstance(value, str):
        items = _as_list(value)
        if items is not None and is_valid(key, items):
            return f"a list needs brackets; write [{', '.join(map(str, items))}]"
    kind, bounds = mistake["type"], {"greater_than": "above", "less_than": "below"}
    if kind in ("tuple_type", "list_type"):
        default = _default(key)
        return f"must be a list{f', such as {list(default)}' if isinstance(default, tuple) and default else ''}"
    if kind in bounds:
        return f"must be {bounds[kind]} {_number(next(iter(context.values())))}"
    if kind == UNEXPECTED_BOOL or (is_of_union and not kind.endswith("_than_equal")):
        return f"must be {expected_type(key)}{_similar_choice(key, value)}"
    words = {
        "float_type": "must be a number",
        "float_parsing": "must be a number",
        "int_type": "must be a whole number",
        "int_parsing": "must be a whole number",
        "int_from_float": "must be a whole number",
        "bool_type": "must be true or false",
        "bool_parsing": "must be true or false",
        "string_type": "must be text",
        "finite_number": "must be a finite number",
        "greater_than_equal": f"must be at least {_number(context.get('ge'))}",
        "less_than_equal": f"must be at most {_number(context.get('le'))}",
        "literal_error": f"must be {context.get('expected')}{_similar_choice(key, value)}",
    }
    message: str = mistake["msg"]
    return words.get(kind, f"{message[0].lower()}{message[1:]}")


def _similar_choice(key: Key, value: Any) -> str:
    field = field_of(key)
    choices = {} if field is None else {each.lower(): each for each in choices_of(field.annotation)}
    similar = difflib.get_close_matches(value[:100].lower(), choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {choices[similar[0]]}?" if similar else ""


def _number(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def _as_list(text: str) -> list[Any] | None:
    """Return the items of a list without brackets: 224,224 or 224x224. None if it isn't one."""
    words = [word.strip() for word in re.split(r"[,x]", text.strip("()[] "))]
    try:
        return [read_yaml(word) for word in words] if len(words) > 1 and all(words) else None
    except YamlError:
        return None


def with_brackets(key: str, text: str) -> str:
    """Return the text of a value for -o: a list such as 224,224 with brackets if the key takes one."""
    field = field_of(tuple(key.split(".")))
    items = _as_list(text) if field is not None and re.search(r"\b(tuple|list)\[", str(field.annotation)) else None
    return text if items is None else f"[{','.join(map(str, items))}]"


def _default(key: Key) -> Any:
    field = field_of(key)
    return None if field is None else field.default


def field_of(key: Key) -> Any:
    return fields_of(section_type(key[:-1]) or Config).get(key[-1])


def _unknown_key(key: str, location: Sequence[str], value: Any) -> str:
    if key in RENAMED_KEYS:
        new_value = _new_value(RENAMED_KEYS[key], value)
        return f"is now called {RENAMED_KEYS[key]}" + (f"; {new_value}" if new_value else "")
    nearest = nearest_key(location)
    if nearest is not None:
        return f"is not a key; did you mean {nearest}?"
    siblings = fields_of(section_type(location[:-1]) or Config)
    return f"is not a key; there are {', '.join(siblings)}"


def nearest_key(location: Sequence[str]) -> str | None:
    """Return the key or section, with its section, that a wrong one most likely stands for; None if none is similar.

    `location`: the section, if one is given, and the key. Other programs' names come first, then similar keys of the
    same section, then keys of other sections.
    """
    *sections, name = location
    name = name[:100].lower().replace("-", "_")
    prefix = "".join(f"{section}." for section in sections)
    siblings = list(fields_of(section_type(sections) or Config)) if len(sections) < 2 else []
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    closest = difflib.get_close_matches(name, siblings, n=1, cutoff=0.8)
    if closest:
        return prefix + closest[0]
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    similar = difflib.get_close_matches(name, siblings, n=1)
    if similar:
        return prefix + similar[0]
    last_names = {key.rpartition(".")[2]: key for key in reversed(all_keys())}
    similar = difflib.get_close_matches(name, last_names, n=1, cutoff=0.8)
    return last_names[similar[0]] if similar else None


def _new_value(key: str, value: Any) -> str:
    is_renamed = isinstance(value, str) and (key, value) in RENAMED_VALUES
    return f"the value {value} is now called {RENAMED_VALUES[key, value]}" if is_renamed else ""


def section_type(path: Sequence[Any]) -> type[Section] | None:
    """Return the section of the config with this name, or None if it isn't a section."""
    annotation = Config.model_fields[str(path[0])].annotation if path and path[0] in Config.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def fields_of(section: type[Section]) -> dict[str, Any]:
    """Return the fields of a section, or of the whole config, by the names that config files have."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def all_keys() -> list[str]:
    """Return the full names of all keys, such as optim.lr, in the schema's order."""
    keys = []
    for name in Config.model_fields:
        section = section_type([name])
        keys += [name] if section is None else [f"{name}.{key}" for key in fields_of(section)]
    return keys
