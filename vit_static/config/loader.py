"""Config files and overrides."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vit_static.common.errors import ConfigError, os_reason, require_overrides, require_path, truncate
from vit_static.common.installation import CONFIGS
from vit_static.common.io import write_text
from vit_static.config.mistakes import describe_mistake
from vit_static.config.schema import Config
from vit_static.config.yaml_loader import DuplicateKeyError, YamlError, read_yaml

DEFAULT_CONFIGS = {  # by verb
    "pretrain": CONFIGS / "quickstart.yaml",
    "train": CONFIGS / "quickstart.yaml",  # another name of pretrain
    "finetune": CONFIGS / "quickstart_finetune.yaml",
}

_MAX_FILE_BYTES = 256 * 1024


def load_config(path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Return the config in a YAML file (None: the defaults), changed by ``section.key=value`` overrides.

    Instead of a path, the name of a config in configs/ will do: deit_s16. Raise ConfigError for a file that can't be
    read, and for unknown keys, wrong types and invalid values.
    """
    require_overrides(overrides)
    if path is not None:
        require_path("path", path)
        path = find_config(Path(path))
    values = {} if path is None else _read_file(path)
    values.setdefault("name", "run" if path is None else path.stem)
    prepared_root = _root(values)
    overridden = {tuple(_apply_override(values, override)): override for override in overrides}
    if ("data", "prepare") not in overridden and _root(values) != prepared_root:
        values["data"].pop("prepare", None)  # the file's data set belongs to the file's folder
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            describe_mistake(error, path, overridden, lambda key, value: _is_valid(values, key, value))
        ) from None


def make_config(values: dict[str, Any]) -> Config:
    """Return the config with these values of keys, as YAML has them. Raise ConfigError for mistakes in them."""
    values = {"name": "run", **values}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        message = describe_mistake(error, None, {}, lambda key, value: _is_valid(values, key, value))
        raise ConfigError(message.removeprefix("-o: ")) from None


def find_config(path: Path) -> Path:
    """Return the file of a config: the path itself or, for a name without folders, that in configs/ if there is none.

    Raise ConfigError, with similar names, for a name that neither has.
    """
    if path.exists():
        return path
    variant = _as_variant(path)
    if path.parent != Path() and variant is None:
        return path
    name = path.name.removesuffix(".yaml")
    known = {each.stem: each for each in sorted(CONFIGS.glob("*.yaml"))}
    if name in known:
        return known[name]
    if variant is not None:
        recipes = [each.stem for each in known.values() if _variant_of(each).casefold() == variant.casefold()]
        hint = f"recipes with this variant: {', '.join(recipes)}" if recipes else "'./run.sh models' lists them"
        raise ConfigError(
            f"-c {path}: is the name of a model variant, not of a config; set -o model.variant={variant} ({hint})"
        )
    similar = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(similar)}?" if similar else "-c takes a YAML file or the name of a recipe"
    raise ConfigError(f"{path}: there is no such file, nor a config of that name; {remedy} (see './run.sh recipes')")


def _as_variant(path: Path) -> str | None:
    """Return the variant of the model that a wrong name of a config seems to be: L/16, ViT-L/16, vit_l16."""
    match = re.fullmatch(r"(?:vit[-_/]?)?([a-z0-9]{1,2})[-_/]?([0-9]{2})", str(path), re.IGNORECASE)
    letters = match and (match[1] if match[1] in ("g", "G") else match[1].capitalize())
    return match and f"{letters}/{match[2]}"


def _variant_of(path: Path) -> str:
    """Return the variant of a config in configs/."""
    model = _read_file(path).get("model", {})
    return str(model.get("variant", Config.model_fields["model"].default.variant))


def _is_valid(values: dict[str, Any], key: tuple[str, ...], value: Any) -> bool:
    """Return whether the key would accept the value."""
    *sections, last = key
    changed = {**values, sections[0]: {**values[sections[0]], last: value}} if sections else {**values, last: value}
    try:
        Config.model_validate(changed)
    except ValidationError as error:
        location = error.errors()[0]["loc"]
        return tuple(location[: len(key)]) != key
    return True


def _root(values: dict[str, Any]) -> Any:
    """Return data.root of a config that hasn't been validated; None if it isn't set."""
    data = values.get("data")
    return data.get("root") if isinstance(data, dict) else None


def dump_config(config: Config, path: Path) -> None:
    """Write every key of the config, so that `load_config` returns an equal one."""
    write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False), path)


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
