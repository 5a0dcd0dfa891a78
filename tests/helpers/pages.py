"""The documents, the commands in their code blocks, and the output that they show."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from helpers.small import ROOT

CONFIGS = ROOT / "configs"
PAGES = [ROOT / "README.md", *sorted(CONFIGS.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_RUN = re.compile(r"(?:\$ )?(?P<before>(?:\w+=\S+ |srun (?:--\S+ )*)*)(?:\./run\.sh |(?=curl ))(?P<arguments>.*)")


@dataclass
class Command:
    """A `./run.sh` or curl command in a code block. What precedes it (variables, srun) is in `before`."""

    text: str
    before: str
    arguments: list[str]
    output: list[str] = field(default_factory=list)  # the lines that the page shows below a command after "$ "


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read_commands(page: Path) -> list[Command]:
    """Return the page's commands in order, except those that are cut short by three dots."""
    commands: list[Command] = []
    for kind, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind not in ("", "bash"):
            continue
        last = None
        for line in block.replace("\\\n", " ").splitlines():
            match = _RUN.match(line)
            if match:
                arguments = shlex.split(match["arguments"], comments=True)
                last = Command(line.strip(), match["before"], arguments)
                if "..." not in arguments:
                    commands.append(last)
                if not line.startswith("$ "):
                    last = None
            elif line.startswith("$ "):
                last = None
            elif last is not None and line.strip():
                last.output.append(line)
    return commands
