"""Writing class_names.txt."""

from collections.abc import Sequence
from pathlib import Path

from vit_static.common.io import write_text
from vit_static.data.open_set import CLASS_NAMES_FILE, class_line


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write one line per class, in label order: the name, as a folder, and the name."""
    write_text("".join(f"{class_line(name, name)}\n" for name in names), folder / CLASS_NAMES_FILE)
