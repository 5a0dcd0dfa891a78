"""YAML as a config has it: plain values, keys that stand once, numbers that know how they were written.

PyYAML's safe loader takes the last of two equal keys without a word, makes days of `2024-01-01`, and lets merges
(``<<: [*a, *a]``) double with every line.
"""

from __future__ import annotations

import contextlib
from typing import Any

import yaml

_PLAIN = frozenset({"null", "bool", "int", "float", "str", "seq", "map"})
_PREFIX = "tag:yaml.org,2002:"


class WrittenInt(int):
    """A whole number, and its text."""

    text: str


class WrittenFloat(float):
    """A number, and its text."""

    text: str


class YamlError(ValueError):
    """What can't be read, and on which line, without the name of the file."""


class DuplicateKeyError(YamlError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without the tags of dates, sets and bytes; see the module."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flat: dict[int, yaml.MappingNode] = {}  # by id; the nodes are held, so that no id comes twice

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts what is merged into a mapping into it, once, what stands later over what stands earlier."""
        if id(node) in self._flat:
            return
        self._flat[id(node)] = node
        _refuse_duplicates(node)
        super().flatten_mapping(node)
        last = {(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key): key for key, _ in node.value}
        if len(last) < len(node.value):
            values = {id(key): value for key, value in node.value}
            node.value = [(key, values[id(key)]) for key in last.values()]


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != f"{_PREFIX}merge":
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise DuplicateKeyError(f"line {line}: the key {key.value[:80]!r} is there twice; take one of them out")
            seen.add((key.tag, key.value))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """An int or a float that keeps its text."""
    found: WrittenInt | WrittenFloat
    if node.tag.endswith(":int"):
        found = WrittenInt(loader.construct_yaml_int(node))
    else:
        found = WrittenFloat(loader.construct_yaml_float(node))
    found.text = node.value
    return found


_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_PREFIX) in _PLAIN
} | {f"{_PREFIX}int": _number, f"{_PREFIX}float": _number}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.removeprefix(_PREFIX) in _PLAIN | {"merge"}]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The one document of a YAML text: None, bool, WrittenInt, WrittenFloat, str, and lists and dicts of them.

    Raises YamlError, of one line.
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
        raise YamlError("is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError) as error:  # !!int x, a number of 5,000 digits
        raise YamlError(f"has a value that is none ({type(error).__name__}: {str(error)[:150]})") from None
    finally:
        if loader is not None:
            with contextlib.suppress(AttributeError):  # of a loader that did not get as far as parsing
                loader.dispose()
