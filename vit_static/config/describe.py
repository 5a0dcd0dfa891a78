"""Reference of the config: each key with its type, default and meaning, read from the schema."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vit_static.common.errors import UserError
from vit_static.config.mistakes import fields_of, nearest_key, section_type
from vit_static.config.other_names import has_words, keys_also_called
from vit_static.config.schema import Config
from vit_static.config.type_words import json_schema, to_yaml, type_in_words

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
    definitions = json_schema()
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
    """Return the keys that a query names, by section; None: all.

    That is a section, a key or, of some words, each key whose name and meaning have them all, in any form ("erase",
    "erasing"), or that the field also calls so ("cutout"). Raise UserError, with the nearest key, if there are none.
    """
    sections = describe_keys()
    if query is None:
        return sections
    if query in sections and query:
        return {query: sections[query]}
    texts = {key.name: f"{key.name} {key.meaning}".lower() for keys in sections.values() for key in keys}
    words = query.lower().replace("-", " ").replace("_", " ")
    names = {query} if query in texts else {name for name in texts if name.rpartition(".")[2] == query}
    if "." not in query:  # a wrong key of a section gets the nearest one
        names = names or {name for name, text in texts.items() if has_words(text, words)}
        names |= keys_also_called(query, texts)
        names = names or {name for name, text in texts.items() if words in text.replace("_", " ")}
        joined = words.replace(" ", "")  # "mix up" for mixup
        names = names or {name for name, text in texts.items() if joined in text.replace("_", "").replace("-", "")}
    if not names:
        nearest = nearest_key(query.split("."))
        remedy = f"did you mean {nearest}?" if nearest else "'./run.sh config' lists all"
        raise UserError(f"{query}: no section or key has this name, and no meaning contains it; {remedy}")
    matches = {section: [key for key in keys if key.name in names] for section, keys in sections.items()}
    return {section: keys for section, keys in matches.items() if keys}


def changed_keys(config: Config) -> list[tuple[str, str, str]]:
    """Return (key, default, value) of every key with another value than the default; both are as in YAML."""
    values = _flat(config.model_dump(mode="json", by_alias=True))
    defaults = _flat(Config(name="run").model_dump(mode="json", by_alias=True)) | {"name": None}
    return [
        (key, _NO_DEFAULT if key == "name" else to_yaml(defaults[key]), to_yaml(value))
        for key, value in values.items()
        if value != defaults[key]
    ]


def changed_settings(old: Config, new: Config, ignored: Collection[str] = ()) -> str | None:
    """Return the keys whose values differ between two configs in one line, "optim.lr 0.1 -> 0.2"; None if none does."""
    old_values, new_values = (_flat(each.model_dump(mode="json", by_alias=True)) for each in (old, new))
    changes = [
        f"{key} {to_yaml(old_values[key])} -> {to_yaml(value)}"
        for key, value in new_values.items()
        if value != old_values[key] and key not in ignored
    ]
    return ", ".join(changes) or None


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
