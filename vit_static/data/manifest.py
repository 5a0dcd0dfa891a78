"""Files beside a dataset's images: the names of its classes, and the record of how the folder was made."""

import json
from pathlib import Path
from typing import Any

CLASS_NAMES_FILE = "class_names.txt"
SOURCE_FILE = "source.json"  # written last, in a folder that is then complete


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest's content; empty if there is no such file, or if it isn't a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not JSON, or not UTF-8
        return {}
    return content if isinstance(content, dict) else {}
