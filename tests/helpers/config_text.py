"""Configs from text, and the messages of mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config


@pytest.fixture(name="load_text")
def load_text_fixture(tmp_path: Path):
    """Return a function load_text(text, *overrides): the config of a file run.yaml with this text."""

    def load_text(text: str | bytes, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return load_text


def message_of(error: pytest.ExceptionInfo[ConfigError]) -> str:
    """Return the message, which must be one line."""
    message = str(error.value)
    assert "\n" not in message and message == message.strip() and message
    return message
