"""The journal of `data check`: results so far, so that a check that was stopped can be resumed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import WriteError
from vit_static.common.io import lock, write_errors
from vit_static.common.text import say
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
        self._path, self._is_lost = path, False
        header = {split: images.digest() for split, images in sets.items()}
        entries = _read_entries(path)
        if not entries or entries[0] != header:
            entries = [header]
            path.write_text("", encoding="utf-8")
            self._append(json.dumps(header))
        else:
            self._append("")  # a process that was killed may have left half a line
        self._entries = {f"{entry.get('split')}/{entry.get('start')}": entry for entry in entries[1:]}

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
        self._append(json.dumps({**entry, "problems": [asdict(problem) for problem in result.problems]}))

    def _append(self, line: str) -> None:
        """Append a line. On a disk that is full, remove the file: the report, which is still to be written, matters."""
        if self._is_lost:
            return
        try:
            with write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except WriteError as error:
            self._is_lost = True
            self.remove()
            reason = os.strerror(error.errno or 0)
            say(f"{self._path}: can't be written ({reason}); if this check is stopped, it begins again", "check")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def open_journal(path: Path, sets: dict[str, ImageDataset]) -> Iterator[Journal]:
    """Open the journal under a lock, and remove it if the block raises before there are results.

    Raise ValueError while another check holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a link in a dataset could lead to any file
        raise ValueError(f"{path}: is not a regular file; remove it")
    path.touch()
    with lock(path, f"{path}: another check is writing it; wait until it has ended, or use another --json"):
        try:
            yield Journal(path, sets)
        except BaseException:
            if path.exists() and len(_read_entries(path)) < 2:  # besides the header
                path.unlink()
            raise


def _read_entries(path: Path) -> list[dict[str, Any]]:
    return [entry for line in path.read_bytes().splitlines() if (entry := _parse_entry(line)) is not None]


def _parse_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
