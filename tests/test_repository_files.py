"""CHANGELOG.md, CITATION.cff, and GitHub's workflow and templates."""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small import ROOT

import vit_static

GITHUB = ROOT / ".github"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_changelog_has_the_format_of_keep_a_changelog() -> None:
    """https://keepachangelog.com/en/1.1.0/: versions with ISO dates, the newest first, and six kinds of changes."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Changelog"
    headings = [line for line in lines if line.startswith("#")][1:]
    assert headings[0] == "## [Unreleased]"
    kinds: list[str] = []
    for heading in headings:
        if heading.startswith("### "):
            kinds.append(heading[4:])
            assert kinds[-1] in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"), heading
            assert len(set(kinds)) == len(kinds), f"{heading} twice in a version"
        else:
            assert re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+)\]( - \d{4}-\d\d-\d\d)?", heading), heading
            kinds = []


def test_the_citation_is_complete_and_of_this_version() -> None:
    """The required keys of CFF 1.2.0, and the licence and version of setup.cfg."""
    citation = read(ROOT / "CITATION.cff")
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    assert [author["name"] for author in citation["authors"]] == [metadata["metadata"]["author"]]
    assert citation["title"].startswith("vit_static")
    assert citation["license"] == metadata["metadata"]["license"]
    assert str(citation["version"]) == metadata["metadata"]["version"] == vit_static.__version__


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = read(GITHUB / "workflows" / "ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    (job,) = workflow["jobs"].values()
    (command,) = [step for step in job["steps"] if "run" in step]
    assert command["run"] == ".ci/run" and os.access(ROOT / ".ci" / "run", os.X_OK)
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    classifiers = re.findall(r"Python :: (3\.\d+)", metadata["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == classifiers


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_an_issue_form_is_one_that_github_accepts(path: Path) -> None:
    """The keys that GitHub requires, and ids that are used once."""
    form = read(path)
    if path.name == "config.yml":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids and len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
