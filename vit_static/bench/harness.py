"""Benchmark harness: candidates run as processes, measured in interleaved rounds and compared by ratios.

Speeds on a shared machine change from minute to minute, so only measurements that are close in time can be compared.
Therefore all candidates are started first; then each works for some seconds in turn, round after round. A ratio is the
median of the ratios of the rounds.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_static.common import terminal
from vit_static.common.cpu import cpu_flags, cpu_model
from vit_static.common.errors import UserError
from vit_static.common.io import write_json
from vit_static.common.startup import user_environ
from vit_static.common.text import counted, print_text
from vit_static.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
# Of /proc/cpuinfo's flags, those that decide how fast products are
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
}
ENVIRONMENT = ROOT / ".venv-bench"
REQUIREMENTS = ROOT / ".requirements" / "bench.txt"


@dataclass(frozen=True)
class Candidate:
    """An implementation to measure.

    `command` starts a process that follows the protocol of peers/protocol.py. The process is bound to the first
    `num_cores` cores of this process; None: to all of them.
    """

    name: str
    title: str
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    num_cores: int | None = None


@dataclass
class Result:
    """Measurements of a candidate.

    `images_per_s` has one value per round, `call_seconds` one per call, `peak_bytes` is the peak memory of its process;
    `ready_info` is what the process reported when it was ready.
    """

    title: str
    version: str = ""
    images_per_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    call_seconds: list[float] = field(default_factory=list)
    ready_info: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median speed of the rounds, in images per second."""
        return statistics.median(self.images_per_s)

    def latency_ms(self, percentile: float) -> float:
        """Return a percentile (0-100) of the time of a call, linearly interpolated."""
        return 1e3 * float(np.percentile(self.call_seconds, percentile))


def peers_python(given: Path | None = None) -> str:
    """Return the Python interpreter of the peers' environment: the given one, or ours, which is created if needed.

    The environment is separate because none of the peers is a dependency of the program. Raise UserError if the given
    one doesn't exist, or if the peers can't be installed.
    """
    if given is not None:
        if not os.access(given, os.X_OK) or given.is_dir():
            raise UserError(
                f"--peer-python {given}: is not a program; name the Python of an environment that has the peers"
            )
        return str(given)
    if not REQUIREMENTS.is_file():
        raise UserError(
            "this benchmark compares with other programs, which only a source tree has the requirements of: call "
            "'./run.sh bench' there"
        )
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "bench.txt"
    requirements = REQUIREMENTS.read_text()
    if not stamp.is_file() or stamp.read_text() != requirements:
        print_text(f"installing the peers ({REQUIREMENTS.relative_to(ROOT)}) into {ENVIRONMENT.name} ...", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        finished = subprocess.run([*install, str(REQUIREMENTS)], capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["pip printed no reason"])[-1]
            raise UserError(
                f"{REQUIREMENTS}: pip can't install the peers that the benchmark compares with ({reason}); run this "
                "benchmark where a package index can be reached"
            )
        stamp.write_text(requirements)
    return str(python)


def missing_packages(python: str, packages: Iterable[str]) -> list[str]:
    """Return those of the packages that an interpreter's environment doesn't have."""
    names = sorted(set(packages))
    script = "import sys, importlib.util as u; print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])"
    finished = subprocess.run([python, "-c", script, *names], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise UserError(f"{python}: doesn't run ({finished.stderr.strip()[-200:]}); name another with --peer-python")
    return finished.stdout.split()


def worker_command(kind: str, spec: str) -> tuple[str, ...]:
    """Return the command that starts one of our workers (worker.py)."""
    return sys.executable, "-m", "vit_static.bench.worker", kind, spec


def config_spec(config: Config) -> str:
    """Return the config as the JSON that worker.py reads."""
    return config.model_dump_json(by_alias=True)


def peer_candidate(
    name: str, title: str, python: str, script: str, spec: Mapping[str, Any], num_cores: int | None = None
) -> Candidate:
    """Return the candidate that runs a script of peers/, which gets `spec` as JSON."""
    command = (python, str(PEERS / script), json.dumps(spec))
    return Candidate(name, title, command, {"PYTHONPATH": str(PEERS)}, num_cores)


def measure_interleaved(candidates: Sequence[Candidate], num_rounds: int, seconds: float) -> dict[str, Result]:
    """Measure all candidates in turn, each for `seconds` per round; return the results by name.

    Raise RuntimeError if a candidate fails.
    """
    results = {candidate.name: Result(candidate.title) for candidate in candidates}
    with contextlib.ExitStack() as stack:
        processes: dict[str, _CandidateProcess] = {}
        for candidate in candidates:
            process = processes[candidate.name] = stack.enter_context(_CandidateProcess(candidate))
            ready_info = process.receive()
            results[candidate.name].version = str(ready_info.pop("version", ""))
            results[candidate.name].ready_info = ready_info
        for number in range(1, num_rounds + 1):
            for candidate in candidates:
                reply = processes[candidate.name].work(seconds)
                speed = reply["num_images"] / reply["seconds"]
                results[candidate.name].images_per_s.append(speed)
                results[candidate.name].call_seconds += reply.get("call_seconds", [])
                print_text(f"round {number}  {candidate.title:<44} {speed:9.2f} images/s", flush=True)
        for candidate in candidates:
            results[candidate.name].peak_bytes = int(processes[candidate.name].finish()["peak_bytes"])
    return results


class _CandidateProcess:
    """The process of a candidate, killed at the end of the block."""

    def __init__(self, candidate: Candidate) -> None:
        self._title = candidate.title
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        cores = sorted(os.sched_getaffinity(0))[: candidate.num_cores]
        self._process = subprocess.Popen(
            candidate.command,
            env={**user_environ(), "OMP_NUM_THREADS": str(len(cores)), **candidate.environ},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> _CandidateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def work(self, seconds: float) -> dict[str, Any]:
        """Have the process work for at least `seconds`; return its reply."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has died; `receive` raises with its stderr
            print(seconds, file=self._process.stdin, flush=True)
        return self.receive()

    def finish(self) -> dict[str, Any]:
        """End the process's input; return its last reply."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """Return the next reply, skipping lines that libraries print. Raise RuntimeError if the process has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        self._errors.seek(0)
        raise RuntimeError(f"{self._title}: its process has ended:\n{self._errors.read()[-4000:]}")


def ratio(ours: Result, theirs: Result) -> float:
    """Return the median over the rounds of the ratio of two speeds."""
    return statistics.median(a / b for a, b in zip(ours.images_per_s, theirs.images_per_s, strict=True))


def machine(precisions: Sequence[str]) -> dict[str, Any]:
    """Return what the speeds depend on: CPU, instruction sets, cores and the measured precisions."""
    flags = cpu_flags()
    sets = [title for flag, title in _INSTRUCTION_SETS.items() if flag in flags]
    return {
        "cpu": cpu_model(),
        "instruction_sets": sets,
        "cores": len(os.sched_getaffinity(0)),
        "precisions": list(precisions),
    }


def machine_line(values: Mapping[str, Any]) -> str:
    """Return the description of `machine` for people."""
    sets = ", ".join(values["instruction_sets"]) or "no vector instructions"
    return f"{values['cpu']} ({sets}), {counted(values['cores'], 'core')}; precision: {', '.join(values['precisions'])}"


def print_missing(missing: Mapping[str, str]) -> None:
    """Print a line for each peer that isn't measured, by its title: the package that it needs."""
    for title, package in missing.items():
        print_text(f"{title}: not installed: pip install {package}")


def print_table(results: Mapping[str, Result], num_rounds: int, *, latencies: bool = False) -> None:
    """Print one line per candidate; with `latencies`, also the 50th and 99th percentile of the time of a call."""
    rows = []
    for result in results.values():
        title = f"{result.title} {result.version}".strip()
        low, high = min(result.images_per_s), max(result.images_per_s)
        percentiles = [f"{result.latency_ms(share):.1f} ms" for share in (50, 99) if latencies]
        speeds = [f"{speed:.2f}" for speed in (result.median, low, high)]
        rows.append((title, *speeds, *percentiles, f"{result.peak_bytes / 1e6:.0f} MB"))
    latency_headers = ("p50", "p99") if latencies else ()
    headers = (f"median of {counted(num_rounds, 'round')}", "images/s", "min", "max", *latency_headers, "peak memory")
    print_text("")
    terminal.print_table(headers, rows, right=range(1, len(headers)))


def print_ratios(ratios: Mapping[str, float], targets: Mapping[str, float] | None = None) -> None:
    """Print ratios beside their targets: a lower bound for speeds, an upper bound for memory."""
    rows = []
    for name, value in ratios.items():
        target = (targets or {}).get(name)
        rows.append((name, f"{value:.2f}", "" if target is None else target_text(name, target)))
    print_text("")
    terminal.print_table(("ratio, ours over theirs", "measured", "target"), rows, right=(1, 2))


def target_text(name: str, target: float) -> str:
    """Return a target with the direction in which it is met: memory is an upper bound."""
    return f"{'<=' if name.startswith('memory') else '>='} {target:g}"


def write_results(
    path: Path | None,
    ratios: Mapping[str, float],
    results: Mapping[str, Result],
    others: Mapping[str, Any] | None = None,
) -> None:
    """Write the results as JSON, `others` under their own keys; do nothing if `path` is None."""
    if path is None:
        return
    values = {
        "ratios": dict(ratios),
        **(others or {}),
        "candidates": {
            name: {
                "title": result.title,
                "version": result.version,
                "images_per_s": result.images_per_s,
                "median_images_per_s": result.median,
                "peak_bytes": result.peak_bytes,
                **({f"p{n}_ms": result.latency_ms(n) for n in (50, 99)} if result.call_seconds else {}),
            }
            for name, result in results.items()
        },
    }
    write_json(values, path)


def check_writable(path: Path | None) -> None:
    """Raise UserError if `path` can't be written at the end of the benchmark because its folder is missing."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}; create it, or name another file")
