"""List of the configs in configs/, read from the comments that each begins with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vit_static.config.loader import CONFIGS


@dataclass(frozen=True)
class Recipe:
    """A config that trains something. `top1` is what its comment expects, "" if it names no number."""

    name: str
    task: str
    top1: str
    machine: str


def list_recipes() -> list[Recipe]:
    """Return the configs that have a machine and an expected result, sorted by name."""
    recipes = (read_recipe(path) for path in sorted(CONFIGS.glob("*.yaml"), key=lambda path: path.stem.lower()))
    return [recipe for recipe in recipes if recipe is not None]


def read_recipe(path: Path) -> Recipe | None:
    """Read the comment at the beginning of a config: the task up to an empty line, then "Machine:" and "Expected:".

    Return None if these two are missing, as in the configs of benchmarks.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    task = " ".join(lines[: lines.index("")] if "" in lines else lines)
    text = "\n".join(lines)
    machine = re.search(r"^Machine: (.+?)\.?$", text, re.MULTILINE)
    expected = re.search(r"^(?:Expected|PLSC's figures): ([\s\S]+)", text, re.MULTILINE)
    if machine is None or expected is None:
        return None
    task = re.split(r"(?<=\.) (?=[A-Z])", task)[0]  # the first sentence
    return Recipe(path.stem, task, _top1(expected[1]), machine[1])


def _top1(expected: str) -> str:
    number = re.search(r"(?:(at least|about|above)\b[^%.\n]*?)?\b([\d.]+) % top-1", expected)
    if number is None:
        return ""
    source = "published" if "not run here" in expected.lower().replace("\n", " ") else "measured"
    return f"{f'{number[1]} ' if number[1] else ''}{number[2]} % ({source})"
