"""Fixtures of the doctor's tests."""

from helpers.doctor import doctor  # noqa: F401 - a fixture
