"""YAML config files, overrides, and messages for mistakes in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vit_static.common.errors import ConfigError, format_value, os_reason, truncate
from vit_static.common.io import write_atomically
from vit_static.config.schema import Config
from vit_static.config.section import Section
from vit_static.config.yaml_loader import DuplicateKeyError, YamlError, read_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT_CONFIGS = {"pretrain": CONFIGS / "quickstart.yaml", "finetune": CONFIGS / "quickstart_finetune.yaml"}  # by verb

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

_MAX_FILE_BYTES = 256 * 1024


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Return the config in a YAML file (None: the defaults), changed by ``section.key=value`` overrides.

    Raise ConfigError for a file that can't be read, and for unknown keys, wrong types and invalid values.
    """
    values = {} if path is None else _read_file(path)
    values.setdefault("name", "run" if path is None else path.stem)
    prepared_root = _root(values)
    overridden = {tuple(_apply_override(values, override)): override for override in overrides}
    if ("data", "prepare") not in overridden and _root(values) != prepared_root:
        values["data"].pop("prepare", None)  # the file's data set belongs to the file's folder
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        location = error.errors()[0]["loc"]
        override = next((text for key, text in overridden.items() if _concerns(location, key)), None)
        origin = f"-o {truncate(override)}" if override is not None else path or "-o"
        raise ConfigError(f"{origin}: {_describe_first_mistake(error)}") from None


def _root(values: dict[str, Any]) -> Any:
    """Return data.root of a config that hasn't been validated; None if it isn't set."""
    data = values.get("data")
    return data.get("root") if isinstance(data, dict) else None


def _concerns(location: Sequence[Any], key: Sequence[Any]) -> bool:
    """Return whether a mistake at `location` is in the overridden `key`, or in a section on the way to it."""
    length = min(len(location), len(key))
    return length > 0 and tuple(location[:length]) == tuple(key[:length])


def dump_config(config: Config, path: Path) -> None:
    """Write every key of the config, so that `load_config` returns an equal one."""
    with write_atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: is longer than {_MAX_FILE_BYTES // 1024} KiB, so it can't be a config")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read ({os_reason(error)}); -c takes a YAML file, such as those in configs/"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; -c takes a YAML file") from None
    try:
        values = read_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: can't be parsed as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must contain keys and values, not {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> list[str]:
    """Set the override's key in `values`; return the path of the key."""
    key, separator, text = override.partition("=")
    origin = f"-o {truncate(override)}"
    if not separator or not key:
        raise ConfigError(f"{origin}: must be section.key=value, such as -o optim.lr=3e-3")
    try:
        value = read_yaml(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except YamlError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: {truncate(section)} is not a section")
    values[last] = value
    return [*sections, last]


def _describe_first_mistake(error: ValidationError) -> str:
    """Describe pydantic's first error in one line: the path of the key, its value, the problem, and the remedy."""
    mistake = error.errors()[0]
    location = [str(part) for part in mistake["loc"][: 2 if _section(mistake["loc"][:1]) else 1]]
    key = ".".join(map(truncate, location))
    if mistake["type"] == "extra_forbidden":
        return _describe_unknown_key(key, location, mistake["input"])
    if mistake["type"] in ("model_type", "dict_type"):
        return f"{key} = {format_value(mistake['input'])}: is a section; set its keys with -o {key}.KEY=VALUE"
    new_value = _new_value(key, mistake["input"])
    if new_value:
        return f"{key} = {mistake['input']}: {new_value}"
    problem = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{key}: {problem}" if key else problem
    return f"{key} = {format_value(mistake['input'])}: {problem[0].lower()}{problem[1:]}"


def _describe_unknown_key(key: str, location: Sequence[str], value: Any) -> str:
    if key in RENAMED_KEYS:
        new_value = _new_value(RENAMED_KEYS[key], value)
        return f"{key} is now called {RENAMED_KEYS[key]}" + (f"; {new_value}" if new_value else "")
    section = _section(location[:-1]) or Config
    siblings = [field.alias or name for name, field in section.model_fields.items()]
    nearest = difflib.get_close_matches(location[-1][:100], siblings, n=1)
    if nearest:
        return f"{key} is not a key; did you mean {'.'.join([*location[:-1], *nearest])}?"
    return f"{key} is not a key; there are {', '.join(siblings)}"


def _new_value(key: str, value: Any) -> str:
    is_renamed = isinstance(value, str) and (key, value) in RENAMED_VALUES
    return f"the value {value} is now called {RENAMED_VALUES[key, value]}" if is_renamed else ""


def _section(path: Sequence[Any]) -> type[Section] | None:
    """Return the section of the config with this name, or None if it isn't a section."""
    annotation = Config.model_fields[str(path[0])].annotation if path and path[0] in Config.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
