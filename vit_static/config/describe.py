"""Reference of the config: each key with its type, default and meaning, read from the schema."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from vit_static.common.errors import UserError
from vit_static.config.mistakes import fields_of, nearest_key, section_type
from vit_static.config.schema import Config

_NO_DEFAULT = "the name of the config file"  # of `name`, which has none in the schema


@dataclass(frozen=True)
class KeyInfo:
    """A key of the config. `type` and `default` are text for people; the default is as in YAML."""

    name: str
    type: str
    default: str
    meaning: str


def describe_keys() -> dict[str, list[KeyInfo]]:
    """Return the keys of every section in the schema's order, those of the top level under ""."""
    definitions = Config.model_json_schema(by_alias=True)
    sections: dict[str, list[KeyInfo]] = {"": []}
    for name, field in fields_of(Config).items():
        section = section_type([name])
        if section is None:
            sections[""].append(_describe(name, field, definitions["properties"][name]))
            continue
        properties = definitions["$defs"][section.__name__]["properties"]
        sections[name] = [_describe(f"{name}.{key}", each, properties[key]) for key, each in fields_of(section).items()]
    return sections


def describe_section(name: str) -> str:
    """Return what a section is about, in one line."""
    section = section_type([name]) if name else Config
    return " ".join((section.__doc__ or "").split()) if section else ""


def find_keys(query: str | None) -> dict[str, list[KeyInfo]]:
    """Return the keys that a query names, by section: a section, a key, or a part of a name or a meaning; None: all.

    Raise UserError, with the nearest key, if there are none.
    """
    sections = describe_keys()
    if query is None:
        return sections
    if query in sections and query:
        return {query: sections[query]}
    every = [(section, key) for section, keys in sections.items() for key in keys]
    words = query.lower().replace("_", " ")
    for matches in (
        [pair for pair in every if query == pair[1].name],
        [pair for pair in every if query == pair[1].name.rpartition(".")[2]],
        [pair for pair in every if words in f"{pair[1].name} {pair[1].meaning}".lower().replace("_", " ")],
    ):
        if matches:
            return {section: [key for other, key in matches if other == section] for section in dict(matches)}
    nearest = nearest_key(query.split("."))
    remedy = f"did you mean {nearest}?" if nearest else "'./run.sh config' lists all"
    raise UserError(f"{query}: no section or key has this name, and no meaning contains it; {remedy}")


def changed_keys(config: Config) -> list[tuple[str, str, str]]:
    """Return (key, default, value) of every key with another value than the default; both are as in YAML."""
    values = _flat(config.model_dump(mode="json", by_alias=True))
    defaults = _flat(Config(name="run").model_dump(mode="json", by_alias=True)) | {"name": None}
    return [
        (key, _NO_DEFAULT if key == "name" else to_yaml(defaults[key]), to_yaml(value))
        for key, value in values.items()
        if value != defaults[key]
    ]


def to_yaml(value: Any) -> str:
    """Return a value in one line as a config file has it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if section_type([name]) is None:
            flat[name] = value
        else:
            flat |= {f"{name}.{key}": each for key, each in value.items()}
    return flat


def _describe(name: str, field: Any, definition: Mapping[str, Any]) -> KeyInfo:
    default = _NO_DEFAULT if field.is_required() else to_yaml(_plain(field.default))
    return KeyInfo(name, type_in_words(definition), default, " ".join((field.description or "").split()))


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def type_in_words(definition: Mapping[str, Any]) -> str:
    """Return the type of a JSON schema's definition in words, with its bounds: "number, at least 0"."""
    if "anyOf" in definition:
        kinds = list(map(type_in_words, definition["anyOf"]))
        return ("; or " if any(", " in kind for kind in kinds) else " or ").join(kinds)
    if "enum" in definition or "const" in definition:
        return _alternatives(map(to_yaml, definition.get("enum") or [definition["const"]]))
    kind = definition.get("type")
    if kind == "array":
        return _list_in_words(definition)
    if kind == "object":
        return "{NAME: text, ...}"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [
        f"{text} {definition[key]:g}"
        for key, text in bounds.items()
        if abs(definition.get(key, math.inf)) < 2**31 - 1  # the largest integers are no limits to speak of
    ]
    words = {"integer": "whole number", "boolean": "true or false", "string": "text"}
    return ", ".join([words.get(str(kind), str(kind)), *limits])


def _alternatives(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _list_in_words(definition: Mapping[str, Any]) -> str:
    fixed = definition.get("prefixItems")
    if fixed is None:
        return f"list of: {type_in_words(definition['items'])}"
    kinds = list(map(type_in_words, fixed))
    return f"[{', '.join(kind.partition(',')[0] for kind in kinds)}]" + (
        f", each {kinds[0].partition(', ')[2]}" if ", " in kinds[0] and len(set(kinds)) == 1 else ""
    )
