"""Fixtures of the launcher's tests."""

from helpers.jobs import job, losses_of_one_launch, scripted_job  # noqa: F401 - fixtures
