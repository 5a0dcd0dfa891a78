"""The journal of `data check`: results so far, so that a check that was stopped can be resumed."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.io import lock
from vit_static.data.image_set import ImageDataset


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with an image or a class folder, or unusual."""

    path: str  # relative to the root
    split: str
    kind: str
    detail: str
    stops_training: bool


@dataclass(frozen=True)
class BatchResult:
    """The digest of each image in a batch, 0 if it couldn't be read, and the problems found."""

    digests: np.ndarray  # uint64
    problems: list[Problem]


class Journal:
    """A file with a header, the digests of the dataset, and then one line per batch of images."""

    def __init__(self, path: Path, sets: dict[str, ImageDataset]) -> None:
        self._path = path
        header = {split: images.digest() for split, images in sets.items()}
        entries = [entry for line in path.read_bytes().splitlines() if (entry := _parse_entry(line)) is not None]
        if not entries or entries[0] != header:
            entries = [header]
            path.write_text(json.dumps(header), encoding="utf-8")
        self._entries = {f"{entry.get('split')}/{entry.get('start')}": entry for entry in entries[1:]}
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # a process that was killed may have left half a line

    def find(self, split: str, start: int, state: str) -> BatchResult | None:
        """Return the result of a batch if it is recorded, valid, and of files in this state."""
        entry = self._entries.get(f"{split}/{start}", {})
        if entry.get("state") != state:
            return None
        try:
            problems = [Problem(**fields) for fields in entry["problems"]]
            digests = np.array(entry["digests"], np.uint64)
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        texts = (text for problem in problems for text in (problem.path, problem.split, problem.kind, problem.detail))
        return BatchResult(digests, problems) if all(isinstance(text, str) for text in texts) else None

    def add(self, split: str, start: int, state: str, result: BatchResult) -> None:
        entry = {"split": split, "start": start, "state": state, "digests": result.digests.tolist()}
        self._file.write(json.dumps({**entry, "problems": [asdict(problem) for problem in result.problems]}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def open_journal(path: Path, sets: dict[str, ImageDataset]) -> Iterator[Journal]:
    """Open the journal under a lock. Raise ValueError while another check holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a link in a dataset could lead to any file
        raise ValueError(f"{path}: is not a regular file; remove it")
    path.touch()
    with (
        lock(path, f"{path}: another check is writing it; wait until it has ended, or use another --json"),
        closing(Journal(path, sets)) as journal,
    ):
        yield journal


def _parse_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
