"""Load YAML configs with overrides; write resolved configs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from vit_static.common.errors import ConfigError, format_value, truncate
from vit_static.common.io import write_atomically
from vit_static.config.schema import Config, Section
from vit_static.config.yaml_loader import DuplicateKeyError, YamlError, read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT_CONFIGS = {"pretrain": CONFIGS / "quickstart.yaml", "finetune": CONFIGS / "quickstart_finetune.yaml"}  # by verb


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """The config of a YAML file (or of the defaults alone) with ``section.key=value`` overrides on top.

    Raises ConfigError for a file that can't be read, and for keys, types and values that aren't right.
    """
    values = {} if path is None else _read_yaml(path)
    values.setdefault("name", "run" if path is None else path.stem)
    overridden = {tuple(_apply_override(values, override)): override for override in overrides}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        override = next((text for key, text in overridden.items() if place[: len(key)] == key), None)
        origin = f"-o {truncate(override or '')}" if override is not None or path is None else path
        raise ConfigError(f"{origin}: {_first_mistake(error)}") from None


def dump_config(config: Config, path: Path) -> None:
    """Writes the resolved config, every key of it, so that `load` gives it back."""
    with write_atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False))


_MAX_BYTES = 256 * 1024  # of a config file


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: is longer than {_MAX_BYTES // 1024} KiB, which no config is")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read ({error.strerror}); -c takes a YAML file, such as those in configs/"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; -c takes a YAML file") from None
    try:
        values = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, not {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> list[str]:
    """Sets the override's key in `values`; returns the key's path."""
    key, separator, text = override.partition("=")
    said = f"-o {truncate(override)}"
    if not separator or not key:
        raise ConfigError(f"{said}: must be section.key=value, such as -o optim.lr=3e-3")
    try:
        value = read_yaml(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{said}: {error}") from None
    except YamlError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        found = values.setdefault(section, {})
        if not isinstance(found, dict):
            raise ConfigError(f"{said}: {truncate(section)} is not a section")
        values[section] = dict(found)  # which an alias in the file may have made another section's, too
        values = values[section]
    values[last] = value
    return [*sections, last]


def _first_mistake(error: ValidationError) -> str:
    """One line for the first of pydantic's errors: the key's path, its value, what is wrong, the nearest key."""
    mistake = error.errors()[0]
    path = [truncate(str(part)) for part in mistake["loc"][: 2 if _section(mistake["loc"][:1]) else 1]]
    key = ".".join(path)
    if mistake["type"] == "extra_forbidden":
        siblings = [field.alias or name for name, field in (_section(path[:-1]) or Config).model_fields.items()]
        nearest = difflib.get_close_matches(path[-1], siblings, n=1)
        if nearest:
            return f"{key} is not a key; did you mean {'.'.join([*path[:-1], *nearest])}?"
        return f"{key} is not a key; there are {', '.join(siblings)}"
    if mistake["type"] in ("model_type", "dict_type"):
        return f"{key} = {format_value(mistake['input'])}: is a section; set its keys with -o {key}.KEY=VALUE"
    problem = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{key}: {problem}" if key else problem
    return f"{key} = {format_value(mistake['input'])}: {problem[0].lower()}{problem[1:]}"


def _section(path: Sequence[Any]) -> type[Section] | None:
    """The section that a path of one name leads to, if it is one."""
    annotation = Config.model_fields[str(path[0])].annotation if path and path[0] in Config.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
