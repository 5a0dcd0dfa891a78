"""The run's folder: lock, recovery, verification."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vit_static.checkpoint.folder import latest_checkpoint
from vit_static.checkpoint.resume import suggest_fallback, verify_files
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.common.io import lock
from vit_static.parallel.mesh import Mesh


def resume_hint(run_dir: Path) -> str:
    newest = latest_checkpoint(run_dir)
    return "it has no checkpoint" if newest is None else f"the same command goes on from {newest}"


@contextmanager
def locked_run_dir(run_dir: Path) -> Iterator[None]:
    """Makes a run's folder and holds it against every other run, for some seconds waiting for one that is at its end.

    One that stays empty is removed again. Raises ConfigError where another run has it.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    refusal = f"{run_dir}: another run is using this folder; wait for its end, or give this one its own (-o name=...)"
    try:
        with ExitStack() as held:
            try:
                held.enter_context(lock(run_dir, refusal, LOCK_WAIT_S))
            except ValueError as error:
                raise ConfigError(str(error)) from None
            yield
    finally:
        for folder in (run_dir / "checkpoints", *new):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def verify_checkpoint(path: Path, mesh: Mesh | None = None) -> str:
    """Verifies a checkpoint, each rank a share of its parts, or without a mesh none of them; its run's number. Raises
    WeightsError, the same on all ranks, with what can be done."""
    share = slice(0) if mesh is None else slice(mesh.rank, None, mesh.world_size)
    problem, run = None, ""
    try:
        run = verify_files(path, share).run
    except WeightsError as error:
        problem = str(error)
    if mesh is not None:
        problem = mesh.first_non_none(problem)
    if problem is not None:
        raise WeightsError(f"{problem}; {suggest_fallback(path)}")
    return run


LOCK_WAIT_S = 30.0
