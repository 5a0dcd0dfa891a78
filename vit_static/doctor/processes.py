"""The processes that perform a group of checks: started, watched, and ended when they hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from vit_static.common.errors import UserError, escape
from vit_static.config.schema import Config
from vit_static.doctor.check import Result
from vit_static.doctor.checks import BY_NAME
from vit_static.doctor.subject import Job
from vit_static.launch.launcher import stop_with_parent

POLL_S = 0.1
START_TIMEOUT_S = 240.0  # until the first check of new processes: on several nodes they wait for each other
# After one rank has failed a check, the others may wait for it in a collective; they are ended after this time.
STRAGGLER_S = 5.0


class Outcome(NamedTuple):
    """The result of a check over all ranks of this machine, and how long it took."""

    name: str
    result: Result
    seconds: float


@dataclass(frozen=True)
class Request:
    """The user's request, and the number of ranks that follows from it."""

    config: Config
    config_path: Path
    overrides: Sequence[str]
    names: Sequence[str]  # of the checks
    world_size: int
    num_local: int
    is_verbose: bool = False

    def command(self, group: str, folder: Path) -> list[str]:
        """Return the command that starts a group's processes."""
        flags = [argument for override in self.overrides for argument in ("-o", override)]
        module = "vit_static.launch" if group == "ranks" else "vit_static.worker"
        verbose = ["-v"] if self.is_verbose else []
        return [
            *(sys.executable, "-m", module, "doctor", "-c", str(self.config_path), *flags),
            *("--worker", str(folder), *verbose),
        ]


@contextmanager
def started_processes(
    request: Request, group: str, checks: Sequence[str], failed: Sequence[str], folder: Path
) -> Iterator[Processes]:
    """Start the processes of a group, and end them all after the block."""
    folder.mkdir()
    Job(tuple(checks), tuple(failed), request.world_size, request.num_local).write(folder)
    processes = Processes(request, group, folder)
    try:
        yield processes
    finally:
        processes.kill()


class Processes:
    """The processes of a group on this machine, and the events that they have written."""

    def __init__(self, request: Request, group: str, folder: Path) -> None:
        self._request, self._folder = request, folder
        self._num_ranks = request.num_local if group == "ranks" else 1
        self._output = folder / "output.log"
        environ = dict(os.environ)
        if group != "ranks":  # one process, whatever a scheduler says
            environ = {name: value for name, value in environ.items() if not name.startswith(("PADDLE_", "SLURM_"))}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                request.command(group, folder.resolve()),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=None if request.is_verbose else output,
                stderr=None if request.is_verbose else output,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )
        self._ranks: dict[str, _RankEvents] = {}
        self.reason_of_end = ""

    def outcomes(self, pending: Sequence[str]) -> Iterator[Outcome]:
        """Yield the outcome of each check, until all have ended, one has failed, or the processes are gone."""
        for name in list(pending):
            outcome = self._wait_for(name, time.monotonic())
            if outcome is None:
                return
            yield outcome
            if outcome.result.status == "failed":
                return

    def _wait_for(self, name: str, since: float) -> Outcome | None:
        """Return the outcome of a check; None if the processes end, or need too long, before they start it."""
        first_failure: float | None = None
        while True:
            has_ended = self._process.poll() is not None  # asked before the last events are read
            self._read_events()
            now = time.monotonic()
            begun = min((rank.started[name] for rank in self._ranks.values() if name in rank.started), default=None)
            results = {stem: rank.ended[name] for stem, rank in sorted(self._ranks.items()) if name in rank.ended}
            is_failed = any(result.status == "failed" for result, _ in results.values())
            first_failure = now if is_failed and first_failure is None else first_failure
            limit_s = START_TIMEOUT_S if begun is None else BY_NAME[name].timeout_s
            is_late = now > (since if begun is None else begun) + limit_s
            if len(results) == self._num_ranks or has_ended or is_late:
                break
            if first_failure is not None and now > first_failure + STRAGGLER_S:
                break
            time.sleep(POLL_S)
        self.reason_of_end = self._reason_of_end() if has_ended else f"no answer within {limit_s:.0f} s"
        if is_failed or len(results) == self._num_ranks:
            return Outcome(name, self._merged(results), max(seconds for _, seconds in results.values()))
        if begun is None:
            return None
        remedy = next(rank.remedies[name] for rank in self._ranks.values() if name in rank.remedies)
        return Outcome(name, Result("failed", self.reason_of_end, remedy), now - begun)

    def _reason_of_end(self) -> str:
        """Return how the processes ended: the signal or exit code, or what the launcher says of a rank."""
        with suppress(OSError):
            for line in self._output.read_text(errors="replace").splitlines():
                if line.startswith("vit_static: rank "):
                    return escape(line.removeprefix("vit_static: ").partition("; the end of")[0])
        code = self._process.returncode
        if code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"

    def _read_events(self) -> None:
        for path in self._folder.glob("rank_*.jsonl"):
            rank = self._ranks.setdefault(path.stem, _RankEvents(path))
            rank.read()
            if rank.refusal is not None:
                raise UserError(rank.refusal)

    def _merged(self, results: Mapping[str, tuple[Result, float]]) -> Result:
        """Return the quickest failure of the ranks, which may have caused the others, or the first rank's result."""
        failures = {stem: seconds for stem, (result, seconds) in results.items() if result.status == "failed"}
        if not failures:
            return next(iter(results.values()))[0]
        stem = min(failures, key=lambda rank: failures[rank])
        where = f"rank {stem.removeprefix('rank_')}: " if self._request.world_size > 1 else ""
        return replace(results[stem][0], message=f"{where}{results[stem][0].message}")

    def kill(self) -> None:
        """End all processes that are still running: after their last check, a few seconds are enough."""
        deadline = time.monotonic() + (STRAGGLER_S if all(rank.is_done for rank in self._ranks.values()) else 0.0)
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if self._process.poll() is not None:
            return
        # First the launcher, which would report the others' end; a process in a hanging kernel ignores SIGTERM.
        for number in (self._process.pid, *(rank.pid for rank in self._ranks.values() if rank.pid)):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self._process.wait()


@dataclass
class _RankEvents:
    """The events of one rank: when checks started, by this process's clock, and their results."""

    path: Path
    started: dict[str, float] = field(default_factory=dict)
    ended: dict[str, tuple[Result, float]] = field(default_factory=dict)
    remedies: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None
    pid: int = 0
    _position: int = 0

    @property
    def is_done(self) -> bool:
        """Whether no check is running."""
        return len(self.started) == len(self.ended)

    def read(self) -> None:
        """Read the complete lines that have been added."""
        with self.path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._position += len(complete)
        for line in complete.splitlines():
            event = json.loads(line)
            if "pid" in event:
                self.pid = event["pid"]
            elif "refused" in event:
                self.refusal = event["refused"]
            elif "started" in event:
                self.started[event["started"]] = time.monotonic()
                self.remedies[event["started"]] = event["remedy"]
            else:
                self.ended[event["ended"]] = Result(**event["result"]), event["seconds"]
