"""Output of the verbs `config` and `recipes`."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from vit_static.common.terminal import print_table, with_words
from vit_static.common.text import print_line, print_text, program_name
from vit_static.config.describe import changed_keys, describe_section, find_keys
from vit_static.config.recipes import list_recipes
from vit_static.config.schema import Config


def print_keys(query: str | None) -> None:
    """Print the keys that a query names, with type, default and meaning. Raise UserError if there are none."""
    sections = find_keys(query)
    for number, (section, keys) in enumerate(sections.items()):
        if number:
            print_line("")
        rows = [(key.name, key.type, key.default, key.meaning) for key in keys]
        print_table(
            ("Key", "Type", "Default", "Meaning"), rows, title=f"{section or 'config'}: {describe_section(section)}"
        )


def print_page() -> None:
    """Print configs/CONFIG.md: all keys by section, in Markdown."""
    print_text("""# Every key of the config

Made by `./run.sh config --markdown` from the schema, `vit_static/config/`. `./run.sh config SECTION`, `KEY` or a few
words ("random erasing") print a part of it; `./run.sh config --diff -c NAME` prints what a config changes.
A config file has one mapping per section and holds only what differs from the defaults; `-o section.key=value` changes
a value on the command line. Batch sizes are global.
""")
    for section, keys in find_keys(None).items():
        title = f"`{section}`" if section else "Top level"
        print_text(
            f"\n## {title}\n\n{describe_section(section)}\n\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n"
        )
        for key in keys:
            cells = (f"`{key.name}`", key.type, key.default if key.name == "name" else f"`{key.default}`", key.meaning)
            print_text("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")


def print_changes(config: Config) -> None:
    """Print the keys whose values differ from the defaults."""
    print_table(("Key", "Default", "Value"), changed_keys(config))


def print_config(config: Config) -> None:
    """Print a config with all its keys as YAML, which -c can read."""
    print_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True))


def print_recipes(words: Sequence[str] = ()) -> None:
    """Print the configs in configs/ with what they train, or only those that mention all these words.

    Raises UserError if there are none.
    """
    rows = [(recipe.name, recipe.top1, recipe.machine, recipe.task) for recipe in list_recipes()]
    rows = with_words(rows, words, "recipe", f"'{program_name()} recipes' lists all")
    print_table(("Name", "Expected top-1", "Machine", "Task"), rows)
