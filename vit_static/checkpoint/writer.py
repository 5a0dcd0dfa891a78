"""Checkpoints written beside the training: what is to be written is copied, and a thread of each rank does the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import paddle

import vit_static
from vit_static.checkpoint.folder import (
    CLASS_NAMES,
    CONFIG,
    FORMAT,
    META,
    checkpoint_dir,
    commit_checkpoint,
    file_record,
    remove_checkpoint,
    remove_old,
    shard_name,
    write_class_names,
)
from vit_static.checkpoint.progress import DataPosition, FileRecord, Manifest, Progress
from vit_static.checkpoint.sharded_state import RankShard, rank_shard, write_shard
from vit_static.common.io import fsync, replace_symlink, write_json
from vit_static.config.loader import dump_config
from vit_static.config.schema import Config
from vit_static.parallel.host_collectives import HostGroup
from vit_static.parallel.mesh import Mesh


@dataclass(frozen=True)
class SaveResult:
    """How the writing of a checkpoint went: it is there, or `problem` says why not, and those before it are."""

    step: int
    num_bytes: int
    seconds_waited: float  # by training, for the copy and for the checkpoint before
    seconds_written: float
    problem: str | None


@dataclass
class SaveStats:
    """Of all checkpoints so far."""

    num_written: int = 0
    num_bytes: int = 0
    seconds_waited: float = 0.0
    seconds_written: float = 0.0

    def add(self, written: SaveResult) -> None:
        self.num_written += written.problem is None
        self.num_bytes = written.num_bytes
        self.seconds_waited += written.seconds_waited
        self.seconds_written += written.seconds_written

    def describe(self) -> str:
        each_waited, each_took = (
            1e3 * s / max(self.num_written, 1) for s in (self.seconds_waited, self.seconds_written)
        )
        return (
            f"{self.num_written} of {self.num_bytes / 1e6:.1f} MB; for each training waited {each_waited:.0f} ms, "
            f"and it took {each_took:.0f} ms beside it"
        )


class CheckpointWriter:
    """Writes a run's checkpoints, one after the other. All ranks call its methods together.

    `run` is the run's number, which all of its checkpoints bear. What became of them comes into `written`.
    """

    def __init__(self, config: Config, mesh: Mesh, class_names: list[str], run: str) -> None:
        self._config, self._mesh, self._class_names, self._run = config, mesh, class_names, run
        self._host_group = HostGroup("checkpoints")
        self._host_group.connect(mesh.rank, mesh.world_size)
        self._thread: threading.Thread | None = None
        self.written: SimpleQueue[SaveResult] = SimpleQueue()
        self.costs = SaveStats()

    def save_async(
        self, state: Mapping[str, paddle.Tensor], progress: Progress, data: DataPosition, learning_rate: float
    ) -> None:
        """Copies the state, waits for the checkpoint before, and leaves the writing of this one to a thread."""
        started = time.perf_counter()
        self.wait()
        part = rank_shard(state, self._mesh.rank)
        meta = self._meta(progress, data, learning_rate)
        arguments = part, progress, meta, time.perf_counter() - started
        # A daemon: where another rank dies it waits in vain, and keeps the process from ending no longer.
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="vit_static checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _meta(self, progress: Progress, data: DataPosition, learning_rate: float) -> dict[str, Any]:
        """What meta.json says. Random numbers are functions of the seed and the step, so no generator's state is kept;
        the rate is there to be read."""
        sizes, parallel = self._mesh.shape, self._config.parallel
        return {
            "format": FORMAT,
            "progress": asdict(progress),
            "epoch": progress.step * self._config.data.global_batch_size / data.num_images,
            "learning_rate": learning_rate,
            "data": asdict(data),
            "mesh": {**asdict(sizes), "sharding_stage": parallel.sharding_stage},
            "versions": {"vit_static": vit_static.__version__, "paddle": paddle.__version__},
        }

    def _write(self, part: RankShard, progress: Progress, meta: dict[str, Any], seconds_waited: float) -> None:
        """A thread's whole work. Nothing of it may raise."""
        started = time.perf_counter()
        num_bytes = part.num_bytes
        try:
            num_bytes, problem = self._try(part, progress, meta)
        except (OSError, EOFError) as error:
            problem = f"another rank has gone ({error})"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        written = SaveResult(progress.step, num_bytes, seconds_waited, time.perf_counter() - started, problem)
        self.costs.add(written)
        self.written.put(written)

    def _try(self, part: RankShard, progress: Progress, meta: dict[str, Any]) -> tuple[int, str | None]:
        """How many bytes all ranks write, and why the checkpoint isn't there, the same words on all of them."""
        final = checkpoint_dir(self._config.run_dir, progress.step)
        unfinished = final.with_name(f".{final.name}.part")
        is_first = self._mesh.rank == 0
        # Each round tells all ranks what went wrong on any of them.
        problem = _attempt(unfinished, 0, lambda: _recreate(unfinished)) if is_first else None
        if problem := self._first(problem):
            return part.num_bytes, problem
        path = unfinished / shard_name(self._mesh.rank)
        found: list[FileRecord] = []
        problem = _attempt(path, part.num_bytes, lambda: found.append(self._write_part(part, progress.step, path)))
        told = {"name": path.name, "problem": problem, **(asdict(found[0]) if found else {})}
        of_all = self._host_group.all_gather_object(told, self._mesh.rank, self._mesh.world_size)
        num_bytes = sum(one.get("bytes", 0) for one in of_all)
        problem = next((one["problem"] for one in of_all if one["problem"] is not None), None)
        if is_first and problem is None:
            records = {one["name"]: FileRecord(one["bytes"], one["sha256"]) for one in of_all}
            problem = _attempt(unfinished, num_bytes, lambda: self._complete(unfinished, final, records, meta))
        if problem is not None and is_first:
            _attempt(unfinished, 0, lambda: remove_checkpoint(unfinished))
        if is_first and problem is None and progress.best_step == progress.step:
            problem = _attempt(final, num_bytes, lambda: replace_symlink(final.parent / "best", final.name))
        if is_first and problem is None:
            kept = self._config.checkpoint
            problem = _attempt(final.parent, 0, lambda: remove_old(final.parent, kept.keep_last, kept.keep_every))
        return num_bytes, self._first(problem)

    def _first(self, problem: str | None) -> str | None:
        found: str | None = self._host_group.first_non_none(problem, self._mesh.rank, self._mesh.world_size)
        return found

    def _write_part(self, part: RankShard, step: int, path: Path) -> FileRecord:
        write_shard(part, path, {"run": self._run, "step": str(step), "rank": str(self._mesh.rank)})
        fsync(path)
        return file_record(path)

    def _complete(self, unfinished: Path, final: Path, records: dict[str, FileRecord], meta: dict[str, Any]) -> None:
        dump_config(self._config, unfinished / CONFIG)
        write_class_names(unfinished, self._class_names)
        write_json(meta, unfinished / META)
        for name in (CONFIG, CLASS_NAMES, META):
            records[name] = file_record(unfinished / name)
        commit_checkpoint(unfinished, final, Manifest(self._run, meta["progress"]["step"], records))


def _recreate(folder: Path) -> None:
    remove_checkpoint(folder)  # a killed run's
    folder.mkdir()


def _attempt(path: Path, num_bytes: int, action: Callable[[], None]) -> str | None:
    """Does it; what kept it from being done, if anything did. It never raises: the other ranks wait to hear of it."""
    said = f" ({num_bytes:,} bytes were to be written)" if num_bytes else ""
    try:
        action()
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}{said}"
    except Exception as error:  # safetensors has its own for what the system refuses
        return f"{path}: {error}{said}"
    return None
