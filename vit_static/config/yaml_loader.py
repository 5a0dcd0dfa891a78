"""YAML parser for configs: plain values, unique keys, no anchors, numbers that remember their text.

PyYAML's safe loader alone isn't strict enough: it silently takes the last of two equal keys and converts `2024-01-01`
to a date, and a few lines of nested aliases expand to billions of values.
"""

from __future__ import annotations

import contextlib
from typing import Any

import yaml
from yaml.composer import Composer

_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(f"{_PREFIX}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class WrittenInt(int):
    """An integer and its text in the file."""

    text: str


class WrittenFloat(float):
    """A number and its text in the file."""

    text: str


class YamlError(ValueError):
    """Invalid YAML: the line and the problem, without the name of the file."""


class DuplicateKeyError(YamlError):
    """A key that appears twice in one mapping."""


class _Loader(Composer, yaml.CSafeLoader):
    """Safe loader without dates, sets, bytes, merge keys, anchors and duplicate keys; libyaml reads the text."""

    def __init__(self, text: str) -> None:
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if event.anchor is not None:
            raise YamlError(f"{_line(event)}: anchors (&NAME) and aliases (*NAME) are not supported; repeat the value")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise DuplicateKeyError(
                        f"{_line(key)}: the key {key.value[:80]!r} appears twice; remove one of them"
                    )
                keys.add((key.tag, key.value))
        return node


def _line(event_or_node: Any) -> str:
    return f"line {event_or_node.start_mark.line + 1}"


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> WrittenInt | WrittenFloat:
    number: WrittenInt | WrittenFloat
    if node.tag.endswith(":int"):
        number = WrittenInt(loader.construct_yaml_int(node))
    else:
        number = WrittenFloat(loader.construct_yaml_float(node))
    number.text = node.value
    return number


# The constructor for the tag None raises the error for unknown tags.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in _PLAIN_TAGS
} | {f"{_PREFIX}int": _construct_number, f"{_PREFIX}float": _construct_number}
_Loader.yaml_implicit_resolvers = {
    first_character: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
    for first_character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """Parse a single YAML document into None, bool, WrittenInt, WrittenFloat, str, and lists and dicts of these.

    Raise YamlError, with a message of one line.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise YamlError(f"{where}{(error.problem or error.context or 'no YAML')[:200]}") from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError) as error:  # !!int x, a number of 5,000 digits
        raise YamlError(f"it has an invalid value ({type(error).__name__}: {str(error)[:150]})") from None
    finally:
        if loader is not None:
            with contextlib.suppress(AttributeError):  # the loader failed before it began to parse
                loader.dispose()
