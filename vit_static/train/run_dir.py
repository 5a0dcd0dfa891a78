"""The run's folder: lock, recovery and description files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vit_static.checkpoint.folder import (
    MERGED_FILES,
    archive,
    latest_checkpoint,
    recover_interrupted,
    write_class_names,
)
from vit_static.checkpoint.progress import Progress
from vit_static.common.errors import ConfigError
from vit_static.common.io import lock
from vit_static.config.loader import dump_config
from vit_static.config.schema import Config

LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class RunDir:
    """A run's folder as one rank sees it; rank 0 alone writes the files that all ranks share."""

    path: Path
    is_writer: bool

    @classmethod
    @contextmanager
    def locked(cls, config: Config, rank: int) -> Iterator[RunDir]:
        """Make the run's folder and, as rank 0, hold its lock; remove what stays empty.

        Waits LOCK_WAIT_S seconds for a run that is about to end. Raises ConfigError while another run holds the lock.
        """
        run = cls(config.run_dir, is_writer=rank == 0)
        if not run.is_writer:
            yield run
            return
        created = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
        (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        refusal = f"{run.path}: another run is using this folder; wait until it ends, or set another name (-o name=...)"
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(lock(run.path, refusal, LOCK_WAIT_S))
                except ValueError as error:
                    raise ConfigError(str(error)) from None
                yield run
        finally:
            for folder in (run.path / "checkpoints", *created):
                with suppress(OSError):  # it isn't empty
                    folder.rmdir()

    def contains(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is one of this run's own."""
        return checkpoint.resolve().parent.parent == self.path.resolve()

    def prepare(
        self, config: Config, class_names: list[str], progress: Progress, has_ended: bool, archive_after: int | None
    ) -> None:
        """Clean up after an interrupted run, and write the files that describe this one.

        `has_ended`: no step follows. `archive_after`: the step whose later checkpoints are moved out of the way; None
        where the run continues.
        """
        if not self.is_writer:
            return
        if archive_after is not None:
            archive(self.path, after=archive_after)
        if not has_ended:
            # Merged weights of a shorter run that is being continued: until its end the checkpoints hold the weights.
            for merged in MERGED_FILES:
                (self.path / merged).unlink(missing_ok=True)
        recover_interrupted(self.path, progress)
        dump_config(config, self.path / "config.yaml")
        write_class_names(self.path, class_names)

    def log_path(self, rank: int) -> Path:
        """Return the file for the output of libraries."""
        return self.path / "log" / f"rank_{rank}.log"

    def resume_hint(self) -> str:
        """Tell what the user can resume from, for the end of a message."""
        newest = latest_checkpoint(self.path)
        return "it has no checkpoint" if newest is None else f"the same command resumes from {newest}"
