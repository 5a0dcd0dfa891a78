"""Fixtures of the config's tests."""

from helpers.config_text import load_text_fixture  # noqa: F401 - a fixture
