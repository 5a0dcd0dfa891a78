"""The documents: their links resolve, and the program accepts their commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.pages import CONFIGS, PAGES, page_name, read_commands
from helpers.small import ROOT

from vit_static.cli.parser import make_parser
from vit_static.config.loader import DEFAULT_CONFIGS, load_config


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_pages_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_pages_commands_are_accepted(page: Path) -> None:
    """By the argument parser, with the page's own settings; their configs load. test_page_commands.py runs them."""
    for command in read_commands(page):
        if command.arguments[0] in ("data", "test", "setup", "curl"):
            continue
        given = make_parser().parse_args(command.arguments)
        config = getattr(given, "config", None)
        if config is not None and config.is_relative_to("configs"):
            load_config(ROOT / config, given.overrides)
        elif getattr(given, "overrides", None):
            load_config(DEFAULT_CONFIGS.get(command.arguments[0]), given.overrides)


def test_every_config_is_in_the_index_and_no_other() -> None:
    listed = re.findall(r"`(\w+\.yaml)`", (CONFIGS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", ["own_images", "own_images_scratch"])
def test_a_config_for_peoples_own_images_names_what_data_folder_writes(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["data.root=pictures", "model.num_classes=3"])
    assert (config.data.train, config.data.val) == ("train_list.txt", "val_list.txt")
    header = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"-c configs/{name}.yaml -o data.root=PICTURES" in header
