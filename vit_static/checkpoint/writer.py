"""Asynchronous checkpoint writer: training waits for a host copy, and a thread per rank writes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
    remove_checkpoint,
    remove_old,
    shard_name,
    write_class_names,
)
from vit_static.checkpoint.progress import DataPosition, KernelRecord, LoraBase, Manifest, Progress, TeacherRecord
from vit_static.checkpoint.sharded_state import RankShard, write_shard
from vit_static.common.errors import RunFailed
from vit_static.common.io import FileRecord, file_record, fsync, replace_symlink, write_json
from vit_static.common.text import duration, say
from vit_static.config.loader import dump_config
from vit_static.config.schema import Config
from vit_static.parallel.host_collectives import HostGroup
from vit_static.parallel.mesh import Mesh

_NOTICE_AFTER_S = 60.0  # of a wait for a checkpoint, a line says so


@dataclass(frozen=True)
class SaveResult:
    """Outcome of one checkpoint. `problem` is None if it was written, otherwise the reason why not; earlier
    checkpoints stay valid.
    """

    step: int
    num_bytes: int  # over all ranks
    seconds_waited: float  # by training: for the host copy, and for the previous checkpoint to be finished
    seconds_written: float  # in the background
    problem: str | None


@dataclass
class SaveStats:
    """Totals over the checkpoints of a run so far."""

    num_written: int = 0
    num_bytes: int = 0  # of the last one
    seconds_waited: float = 0.0
    seconds_written: float = 0.0

    def add(self, result: SaveResult) -> None:
        """Count another checkpoint."""
        self.num_written += result.problem is None
        self.num_bytes = result.num_bytes
        self.seconds_waited += result.seconds_waited
        self.seconds_written += result.seconds_written

    def describe(self) -> str:
        """Return one line for people, with averages per checkpoint."""
        written_ms, waited_ms = (
            1e3 * seconds / max(self.num_written, 1) for seconds in (self.seconds_written, self.seconds_waited)
        )
        return (
            f"{self.num_written} of {self.num_bytes / 1e6:.1f} MB; each write took {written_ms:.0f} ms in the "
            f"background and delayed training by {waited_ms:.0f} ms"
        )


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time. All ranks call its methods together.

    `run_id` identifies the run in all of its checkpoints; `teacher` is the model that it is distilled from, and
    `lora_base` the frozen weights of a run with LoRA. `kernels` returns the choices of kernels that a resumed run
    keeps. Outcomes arrive in the queue `results`; `stats` adds them up.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        class_names: list[str],
        run_id: str,
        teacher: TeacherRecord | None = None,
        lora_base: LoraBase | None = None,
        kernels: Callable[[], KernelRecord | None] = lambda: None,
    ) -> None:
        self._config, self._mesh, self._class_names, self._run_id = config, mesh, class_names, run_id
        self._teacher, self._lora_base, self._kernels = teacher, lora_base, kernels
        self._host_group = HostGroup("checkpoints")
        self._host_group.connect(mesh.rank, mesh.world_size)
        self._thread: threading.Thread | None = None
        self._step = 0  # of the checkpoint that the thread writes
        self.results: SimpleQueue[SaveResult] = SimpleQueue()
        self.stats = SaveStats()

    @property
    def writing_step(self) -> int | None:
        """The step of the checkpoint that is being written; None if none is."""
        return self._step if self._thread is not None and self._thread.is_alive() else None

    def save_async(
        self, copy_shard: Callable[[], RankShard], progress: Progress, data: DataPosition, learning_rate: float
    ) -> None:
        """Wait for the previous checkpoint, copy the state to the host, and start a thread that writes it.

        Raises RunFailed like `wait`.
        """
        started = time.perf_counter()
        self.wait()
        shard = copy_shard()
        meta = self._meta(progress, data, learning_rate)
        self._step = progress.step
        arguments = shard, progress, meta, time.perf_counter() - started
        # A daemon thread: if another rank dies, this one waits for it in vain and must not keep the process alive.
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="vit_static checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises RunFailed if that takes longer than `checkpoint.write_timeout_s`.
        """
        if self._thread is None:
            return
        limit_s, folder = self._config.checkpoint.write_timeout_s, self._config.run_dir / "checkpoints"
        self._thread.join(min(_NOTICE_AFTER_S, limit_s))
        if self._thread.is_alive() and limit_s > _NOTICE_AFTER_S:
            say(
                f"waiting for a checkpoint that is still being written to {folder}; the run ends if that takes "
                f"{duration(limit_s)} (checkpoint.write_timeout_s)"
            )
            self._thread.join(limit_s - _NOTICE_AFTER_S)
        if self._thread.is_alive():
            raise RunFailed(
                f"a checkpoint has not been written to {folder} within {duration(limit_s)} "
                "(checkpoint.write_timeout_s): the disk of this or of another rank doesn't answer, or is too slow; the "
                "same command resumes from the latest checkpoint"
            )
        self._thread = None

    def _meta(self, progress: Progress, data: DataPosition, learning_rate: float) -> dict[str, Any]:
        """Return the content of meta.json.

        It holds no generator's state: random numbers are functions of the seed and the step. Epoch, learning rate and
        versions are for people.
        """
        mesh_shape, parallel, kernels = self._mesh.shape, self._config.parallel, self._kernels()
        return {
            "format": FORMAT,
            "progress": asdict(progress),
            "epoch": progress.step * self._config.data.global_batch_size / data.num_images,
            "learning_rate": learning_rate,
            "data": asdict(data),
            **({} if self._teacher is None else {"teacher": asdict(self._teacher)}),
            **({} if self._lora_base is None else {"lora_base": asdict(self._lora_base)}),
            **({} if kernels is None else {"kernels": asdict(kernels)}),
            "mesh": {**asdict(mesh_shape), "sharding_stage": parallel.sharding_stage},
            "versions": {"vit_static": vit_static.__version__, "paddle": paddle.__version__},
        }

    # -- in the thread: nothing below may call Paddle, which the main thread is training with meanwhile --------------

    def _write(self, shard: RankShard, progress: Progress, meta: dict[str, Any], seconds_waited: float) -> None:
        """Write a checkpoint and queue its result. Target of the thread; never raises."""
        started = time.perf_counter()
        num_bytes = shard.num_bytes
        try:
            num_bytes, problem = self._write_and_commit(shard, progress, meta)
        except (OSError, EOFError) as error:
            problem = f"lost the connection to another rank ({error})"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        result = SaveResult(progress.step, num_bytes, seconds_waited, time.perf_counter() - started, problem)
        self.stats.add(result)
        self.results.put(result)

    def _write_and_commit(self, shard: RankShard, progress: Progress, meta: dict[str, Any]) -> tuple[int, str | None]:
        """Return the bytes of all ranks' shards, and why there is no checkpoint (None if there is one).

        The ranks exchange problems after each phase (folder, shards, commit): all return the same, and none waits for
        a rank that has failed.
        """
        final = checkpoint_dir(self._config.run_dir, progress.step)
        unfinished = final.with_name(f".{final.name}.part")
        is_first = self._mesh.rank == 0
        problem = _attempt(unfinished, 0, lambda: _recreate(unfinished)) if is_first else None
        if problem := self._first_problem(problem):
            return shard.num_bytes, problem
        records, problem, num_bytes = self._write_shards(shard, progress.step, unfinished)
        if is_first and problem is None:
            problem = _attempt(unfinished, num_bytes, lambda: self._commit(unfinished, final, records, meta))
        if is_first and problem is not None:
            _attempt(unfinished, 0, lambda: remove_checkpoint(unfinished))
        if is_first and problem is None and progress.best_step == progress.step:
            problem = _attempt(final, num_bytes, lambda: replace_symlink(final.parent / "best", final.name))
        if is_first and problem is None:
            retention = self._config.checkpoint
            keep_last, keep_every = retention.keep_last, retention.keep_every
            problem = _attempt(final.parent, 0, lambda: remove_old(final.parent, keep_last, keep_every))
        return num_bytes, self._first_problem(problem)

    def _write_shards(self, shard: RankShard, step: int, folder: Path) -> tuple[dict[str, FileRecord], str | None, int]:
        """Write this rank's file; return the records of all ranks' files, the first problem, and their bytes."""
        path = folder / shard_name(self._mesh.rank)
        metadata = {"format": str(FORMAT), "run_id": self._run_id, "step": str(step), "rank": str(self._mesh.rank)}
        records: list[FileRecord] = []

        def write() -> None:
            write_shard(shard, path, metadata)
            fsync(path)
            records.append(file_record(path))

        problem = _attempt(path, shard.num_bytes, write)
        outcome = {"name": path.name, "problem": problem, "record": asdict(records[0]) if records else None}
        outcomes = self._host_group.all_gather_object(outcome, self._mesh.rank, self._mesh.world_size)
        all_records = {each["name"]: FileRecord(**each["record"]) for each in outcomes if each["record"] is not None}
        problem = next((each["problem"] for each in outcomes if each["problem"] is not None), None)
        return all_records, problem, sum(record.num_bytes for record in all_records.values())

    def _commit(self, unfinished: Path, final: Path, records: dict[str, FileRecord], meta: dict[str, Any]) -> None:
        dump_config(self._config, unfinished / CONFIG)
        write_class_names(unfinished, self._class_names)
        write_json(meta, unfinished / META)
        others = {name: file_record(unfinished / name) for name in (CONFIG, CLASS_NAMES, META)}
        commit_checkpoint(unfinished, final, Manifest(self._run_id, meta["progress"]["step"], records | others))

    def _first_problem(self, problem: str | None) -> str | None:
        first: str | None = self._host_group.first_non_none(problem, self._mesh.rank, self._mesh.world_size)
        return first


def _recreate(folder: Path) -> None:
    remove_checkpoint(folder)  # left by a killed run
    folder.mkdir()


def _attempt(path: Path, num_bytes: int, action: Callable[[], None]) -> str | None:
    """Run `action`. Return None on success, otherwise why it failed. Never raises, because the other ranks wait for
    this one.
    """
    size = f" ({num_bytes:,} bytes were to be written)" if num_bytes else ""
    try:
        action()
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}{size}"
    except Exception as error:  # safetensors raises its own class for errors of the system
        return f"{path}: {error}{size}"
    return None
