"""Contenders that take turns: each a process that stays, so that what is compared has met the same machine.

Speeds on a shared machine change from minute to minute; a ratio is only worth something between neighbours in time. So
all contenders are made ready first, then each works for some seconds, in turn, round after round, and a ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common.errors import UserError
from vit_static.common.io import write_json
from vit_static.common.startup import user_environ
from vit_static.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
ENVIRONMENT = ROOT / ".venv-bench"
REQUIREMENTS = ROOT / ".requirements" / "bench.txt"


@dataclass(frozen=True)
class Contender:
    """A way to do the same work. `command` starts a process that speaks as peers/protocol.py does, and that has the
    first `cores` of this process's, or all."""

    name: str
    title: str
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    cores: int | None = None


@dataclass
class Result:
    """What a contender did: images a second in each round, the seconds of each call, and the most memory that its
    process had. `known`: what it said when it was ready."""

    title: str
    version: str = ""
    images_per_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    calls: list[float] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_s)

    def latency_ms(self, per_cent: float) -> float:
        """How long that share of the calls took at most, linear between two."""
        return 1e3 * float(np.percentile(self.calls, per_cent))


def peers_python() -> str:
    """The interpreter of the peers' environment, which is made where it is missing: none of it is a dependency of the
    program. Raises UserError if it can't be installed."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "bench.txt"
    wanted = REQUIREMENTS.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing the peers ({REQUIREMENTS.relative_to(ROOT)}) into {ENVIRONMENT.name} ...", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        finished = subprocess.run([*install, str(REQUIREMENTS)], capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"{REQUIREMENTS}: can't be installed ({reason}); the benchmark measures against these")
        stamp.write_text(wanted)
    return str(python)


def our_python() -> str:
    return sys.executable


def worker_command(kind: str, spec: str) -> tuple[str, ...]:
    """Return the command that starts one of our workers (worker.py)."""
    return our_python(), "-m", "vit_static.bench.worker", kind, spec


def config_spec(config: Config) -> str:
    """Return the config as the JSON that worker.py reads."""
    return config.model_dump_json(by_alias=True)


def peer(
    name: str, title: str, python: str, script: str, spec: Mapping[str, Any], cores: int | None = None
) -> Contender:
    """A script of `peers`, which gets its `spec` as JSON."""
    return Contender(name, title, (python, str(PEERS / script), json.dumps(spec)), {"PYTHONPATH": str(PEERS)}, cores)


def run_in_turns(contenders: Sequence[Contender], rounds: int, seconds: float) -> dict[str, Result]:
    """By name, what each contender did in all rounds. Raises RuntimeError if one of them fails."""
    results = {contender.name: Result(contender.title) for contender in contenders}
    with contextlib.ExitStack() as stack:
        running: dict[str, _Running] = {}
        for contender in contenders:
            process = running[contender.name] = stack.enter_context(_Running(contender))
            known = process.hear()
            results[contender.name].version = str(known.pop("version", ""))
            results[contender.name].known = known
        for number in range(rounds):
            for contender in contenders:
                done = running[contender.name].work(seconds)
                speed = done["num_images"] / done["seconds"]
                results[contender.name].images_per_s.append(speed)
                results[contender.name].calls += done.get("calls", [])
                print(f"round {number + 1}  {contender.title:<44} {speed:9.2f} images/s", flush=True)
        for contender in contenders:
            results[contender.name].peak_bytes = int(running[contender.name].end()["peak_bytes"])
    return results


class _Running:
    """A contender's process, until the end of the block."""

    def __init__(self, contender: Contender) -> None:
        self._title = contender.title
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        cores = sorted(os.sched_getaffinity(0))[: contender.cores]
        self._process = subprocess.Popen(
            contender.command,
            env={**user_environ(), "OMP_NUM_THREADS": str(len(cores)), **contender.environ},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def work(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then `hear` says why
            print(seconds, file=self._process.stdin, flush=True)
        return self.hear()

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next thing that the contender says; what libraries print in between is passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                return said
        self._errors.seek(0)
        raise RuntimeError(f"{self._title}: its process has ended:\n{self._errors.read()[-4000:]}")


def ratio(ours: Result, theirs: Result) -> float:
    """The median of the rounds' ratios of speeds."""
    return statistics.median(a / b for a, b in zip(ours.images_per_s, theirs.images_per_s, strict=True))


def print_table(results: Mapping[str, Result], rounds: int, *, latencies: bool = False) -> None:
    """`latencies`: with those of a call, p50 and p99."""
    head = f"{'p50':>11}{'p99':>11}" if latencies else ""
    print(f"\n{f'median of {rounds} rounds':<46}{'images/s':>10}{'least':>9}{'most':>9}{head}{'peak memory':>14}")
    for result in results.values():
        title = f"{result.title} {result.version}".strip()
        least, most = min(result.images_per_s), max(result.images_per_s)
        took = f"{result.latency_ms(50):8.1f} ms{result.latency_ms(99):8.1f} ms" if latencies else ""
        print(f"{title:<46}{result.median:10.2f}{least:9.2f}{most:9.2f}{took}{result.peak_bytes / 1e6:11.0f} MB")


def print_ratios(ratios: Mapping[str, float], targets: Mapping[str, float] | None = None) -> None:
    """`targets`: what a ratio should be at least, or at most where it is of memory."""
    print(f"\n{'ratio, ours over theirs':<46}{'measured':>10}{'target':>9}")
    for name, value in ratios.items():
        target = (targets or {}).get(name)
        print(f"{name:<46}{value:10.2f}{'' if target is None else f'{target:.1f}':>9}")


def write_results(
    path: Path | None,
    ratios: Mapping[str, float],
    results: Mapping[str, Result],
    others: Mapping[str, Any] | None = None,
) -> None:
    """`others`: what was found besides ratios, by name."""
    if path is None:
        return
    found = {
        "ratios": dict(ratios),
        **(others or {}),
        "contenders": {
            name: {
                "title": result.title,
                "version": result.version,
                "images_per_s": result.images_per_s,
                "median_images_per_s": result.median,
                "peak_bytes": result.peak_bytes,
                **({f"p{share}_ms": result.latency_ms(share) for share in (50, 99)} if result.calls else {}),
            }
            for name, result in results.items()
        },
    }
    write_json(found, path)


def check_writable(path: Path | None) -> None:
    """Raises UserError, before anything is measured, for a file that could not be written at the end."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}; make it, or name another file")
