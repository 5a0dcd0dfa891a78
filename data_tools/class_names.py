"""Writing class_names.txt."""

from collections.abc import Sequence
from pathlib import Path

from vit_static.common.io import write_atomically
from vit_static.data.open_set import CLASS_NAMES_FILE


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write one line per class, in label order: the name with underscores for spaces, as a folder, and the name."""
    with write_atomically(folder / CLASS_NAMES_FILE) as temporary:
        temporary.write_text("".join(f"{'_'.join(name.split())} {name}\n" for name in names), encoding="utf-8")
