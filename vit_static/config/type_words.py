"""Types of config keys in words, from the schema: "number, at least 0"."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from vit_static.config.schema import Config

_ARTICLES = {"number": "a ", "whole number": "a ", "list": "a ", "[": "a list ", "{": "a mapping "}  # by what follows
_WITHOUT_ARTICLE = re.compile(r"(?:^|(?<= or ))(number|whole number|list|\[|\{)")


@functools.cache
def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the whole config, by the names that config files have."""
    return Config.model_json_schema(by_alias=True)


def definition_of(key: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the JSON schema's definition of a key, (section, key) or (key,); None if there is none."""
    properties, name = json_schema()["properties"], key[-1]
    if len(key) == 2:
        reference = properties.get(key[0], {}).get("$ref", "")
        properties = json_schema()["$defs"].get(reference.rpartition("/")[2], {}).get("properties", {})
    definition: Mapping[str, Any] | None = properties.get(name)
    return definition


def expected_type(key: Sequence[str]) -> str | None:
    """Return the type of a key as a message has it: "a number, at least 0"; None if there is no such key."""
    definition = definition_of(key)
    if definition is None:
        return None
    return _WITHOUT_ARTICLE.sub(lambda match: _ARTICLES[match[1]] + match[1], type_in_words(definition))


def to_yaml(value: Any) -> str:
    """Return a value in one line as a config file has it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


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
