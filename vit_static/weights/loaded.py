"""Weights that were loaded, with the config and class names next to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vit_static.checkpoint.folder import CONFIG
from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.model.variants import grid_of
from vit_static.weights.formats import ExternalWeights, State


@dataclass(frozen=True)
class Weights:
    """Weights that were found, with the config and class names next to them; None for what isn't there."""

    external: ExternalWeights
    config: Config | None
    class_names: list[str] | None
    source: Path  # the file or checkpoint that they are from
    has_adapters: bool = False  # the source has adapters (LoRA), which are merged here

    @property
    def state(self) -> State:
        return self.external.state

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches that the weights were trained on; None if unknown."""
        return None if self.config is None else grid_of(self.config.model)

    def config_with(self, overrides: Iterable[str]) -> Config:
        """Return the config with ``section.key=value`` overrides. Raises ConfigError if there is no config."""
        if self.config is None:
            raise ConfigError(f"{self.source}: there is no {CONFIG} next to it; name the run's config with -c")
        return load_config(self.source.parent / CONFIG if self.source.is_file() else self.source / CONFIG, overrides)
