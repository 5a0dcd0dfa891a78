"""Where this program's files are, and what it is called: a source tree has run.sh, an installed wheel a command."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has these folders of the source tree inside the package (see setup.cfg).
IS_WHEEL = (_PACKAGE / "configs").is_dir()
SOURCE_TREE = None if IS_WHEEL else _PACKAGE.parent
CONFIGS = (_PACKAGE if IS_WHEEL else _PACKAGE.parent) / "configs"
COMMAND = "vit_static" if IS_WHEEL else "./run.sh"

_PAGE = re.compile(r"(?<![\w/])configs/(?=[A-Z]+\.md)")


def localize(message: str) -> str:
    """Return a message that names ./run.sh or a page of configs/ with the names that these have in an installed wheel.

    In a source tree, nothing changes.
    """
    return _PAGE.sub(f"{CONFIGS}/", message.replace("./run.sh", COMMAND)) if IS_WHEEL else message
