"""Launcher: `python -m vit_static.launch VERB ...` runs a verb in one or many processes.

With one process it is `python -m vit_static VERB ...` itself, in this same process, unless that may
have to be started again (`train.max_restarts`). Else each process is a child that learns its rank
from the variables that `python -m paddle.distributed.launch` sets, so that either launcher, or a
scheduler that sets them, may start the workers.

On several nodes each has a launcher, and these stay connected until the job ends: what ends one
node's part, a failure or a signal, ends the others'. Under Slurm a task of `srun` is a node where
each node has one task; where some have more, each task is a node of one process.

With `train.max_restarts` a failure is not the end of training: every launcher ends its workers,
connects to the others again, and restarts its workers from the latest checkpoint. A lost node joins
again when its launcher is restarted, by hand or by a scheduler, while the others wait for it.
Slurm limits this: a worker that dies is restarted by its task's launcher, but srun never starts a task
of a step twice, and depending on the site's settings (KillOnBadExit, --wait, --no-kill) it ends the step
with the first lost task or node. So a lost node ends the job, and `sbatch --requeue` restarts it.

Why not Paddle's launcher (3.3.1), whose user interface (PADDLE_NNODES, PADDLE_MASTER,
CUDA_VISIBLE_DEVICES, log/workerlog.N) this keeps: it answers a SIGTERM with exit code 15; when one
worker has saved its state and ended it kills the others three seconds later, in the middle of
their saving; rank 0's stdout and stderr reach the terminal as one, seconds late, its errors twice
and among 40 lines of the launcher's own; it imports all of Paddle first; and it writes the whole
environment, secrets included, into the log folder.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vit_static.common.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USER_MISTAKE
from vit_static.common.text import positive_int, say
from vit_static.config.loader import DEFAULT_CONFIGS, load_config
from vit_static.config.schema import Config
from vit_static.launch.rendezvous import (
    POLL_S,
    RENDEZVOUS_TIMEOUT_S,
    Cluster,
    Earlier,
    Failure,
    Peers,
    meet,
)
from vit_static.launch.topology import Layout, find_layout, is_worker, warn_of_idle_nodes

# How long the others may take to fail by themselves once a worker has: they wait for it in a
# collective, perhaps for ever. After it comes SIGTERM, and after that once more, SIGKILL.
FAILURE_GRACE_S = 10.0
# Stop signals within this time are one request: Slurm sends it to every task, and so do the other
# launchers; and a worker takes a second one as the wish to end without saving.
SAME_REQUEST_S = 3.0
TAIL_LINES = 20

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


class Worker(NamedTuple):
    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None: the terminal


class Ending(NamedTuple):
    """How the processes of a job ended."""

    code: int  # the launch's exit code, if this is its end
    failure: Failure | None = None  # to report; None if a rank with a terminal has already reported it
    was_stopped: bool = False  # a stop signal came before the failure


def main() -> int:
    argv = sys.argv[1:]
    try:
        config = load_config(None) if is_worker(os.environ) else config_of(argv)
        layout = find_layout(os.environ, config.device)
        warn_of_idle_nodes(os.environ)
        max_restarts = config.train.max_restarts if argv[:1] in (["pretrain"], ["finetune"]) else 0
        if layout.num_nodes * layout.num_local == 1 and max_restarts == 0:
            # Not an import: the package's __main__ is above everything else, and parses sys.argv itself.
            runpy.run_module("vit_static", run_name="__main__", alter_sys=True)
            return 0
        return launch(argv, layout, config, max_restarts)
    except ValueError as error:
        say(str(error))
        return EXIT_USER_MISTAKE
    except TimeoutError as error:
        say(str(error))
        return EXIT_FAILED


def config_of(argv: Sequence[str]) -> Config:
    """Return the config of the verb; the defaults if it has a mistake, which the verb itself then reports."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-c", "--config", type=Path, default=DEFAULT_CONFIGS.get(argv[0]) if argv else None)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    try:
        given, _ = parser.parse_known_args(argv)
        return load_config(given.config, given.overrides)
    except (argparse.ArgumentError, ValueError, OSError):
        return load_config(None)


def launch(argv: Sequence[str], layout: Layout, config: Config, max_restarts: int) -> int:
    """Run the processes of the verb, restart them after a failure as configured, and return the exit code."""
    initial_checkpoints = complete_checkpoints(config.run_dir)
    earlier = Earlier(num_restarts=0, has_saved=False)
    while True:
        handle_signals(stop_without_workers)
        cluster, peers = meet(layout, os.environ.get("PADDLE_MASTER", ""), config.train.node_timeout_s, earlier)
        # The last of several --resume counts. Until something is saved, the arguments of the first attempt stay
        # as they are: with --resume never, checkpoints of an earlier run must not be used.
        resume = ["--resume", "auto"] if cluster.has_saved else []
        received_signals: list[int] = []
        with peers:
            ending = run_workers([*argv, *resume], layout, cluster, peers, received_signals)
        failure = ending.failure
        if failure is None:
            return ending.code
        lost_for_good = layout.task is not None and failure.lost_node is not None  # srun starts no task again
        has_failed = ending.code == EXIT_FAILED and not ending.was_stopped and not lost_for_good
        speaks = layout.task is None or cluster.node == 0 or failure.lost_node == 0
        if not has_failed or cluster.num_restarts >= max_restarts:
            if speaks:
                used_up = f"; train.max_restarts = {max_restarts} is used up" if has_failed and max_restarts else ""
                say(failure.message + used_up + (f"; the end of {failure.log}:" if failure.log else ""))
                if failure.tail:
                    print(failure.tail, file=sys.stderr, flush=True)
                if has_failed and argv[:1] in (["pretrain"], ["finetune"]) and (config.run_dir / "log").is_dir():
                    say(f"the output of Paddle and DALI is in {config.run_dir / 'log'}")
            return ending.code

        handle_signals(stop_without_workers)
        if received_signals:  # after the last look at them
            return EXIT_STOPPED
        has_saved = cluster.has_saved or bool(complete_checkpoints(config.run_dir) - initial_checkpoints)
        earlier = Earlier(cluster.num_restarts + 1, has_saved)
        if speaks:
            log = f" ({failure.log})" if failure.log else ""
            start = "from the latest checkpoint" if has_saved else "from the beginning, since nothing is saved yet"
            wait = (
                ""
                if failure.lost_node is None
                else (f", when its launcher is started again; waiting {RENDEZVOUS_TIMEOUT_S:.0f} s for it")
            )
            say(f"{failure.message}{log}; restart {earlier.num_restarts} of {max_restarts}, {start}{wait}")


def complete_checkpoints(run_dir: Path) -> set[tuple[str, int]]:
    """Return the run's complete checkpoints as (name, time in ns): one that is written again is a new one."""
    checkpoints = set()
    for path in (run_dir / "checkpoints").glob("step_*/meta.json"):
        with suppress(OSError):  # removed in the meantime
            checkpoints.add((path.parent.name, path.stat().st_mtime_ns))
    return checkpoints


def handle_signals(handler: Callable[[int, Any], None]) -> None:
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is to stay ignored
        signal.signal(signal.SIGHUP, handler)


def stop_without_workers(signum: int, frame: Any) -> None:
    raise SystemExit(EXIT_STOPPED)


def run_workers(
    argv: Sequence[str], layout: Layout, cluster: Cluster, peers: Peers, received_signals: list[int]
) -> Ending:
    """Start this node's workers, pass on to them the signals that come, which `received_signals` then holds for a
    moment, and return when all nodes' have ended."""
    handle_signals(lambda signum, frame: received_signals.append(signum))
    workers: list[Worker] = []
    try:
        for local_rank in range(layout.num_local):
            workers.append(start_worker(argv, layout, cluster, local_rank))
        return supervise(workers, cluster, peers, received_signals)
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()


def start_worker(argv: Sequence[str], layout: Layout, cluster: Cluster, local_rank: int) -> Worker:
    all_endpoints = [endpoint for node in cluster.endpoints for endpoint in node]
    rank = sum(len(node) for node in cluster.endpoints[: cluster.node]) + local_rank
    number = layout.first_on_machine + local_rank
    environ = {
        **os.environ,
        "PADDLE_MASTER": cluster.store,
        "PADDLE_NNODES": str(layout.num_machines),
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(all_endpoints)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(all_endpoints),
        "PADDLE_CURRENT_ENDPOINT": all_endpoints[rank],
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_GLOBAL_SIZE": str(len(all_endpoints)),
        "PADDLE_LOCAL_RANK": str(number),
        "PADDLE_LOCAL_SIZE": str(layout.num_on_machine),
        "PADDLE_RANK_IN_NODE": str(number),
        "PYTHONUNBUFFERED": "1",  # a worker that is killed should leave its last lines in the log
    }
    # Otherwise each worker would use every core, and they would slow each other down.
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores_per_worker(layout))))
    if layout.num_gpus:
        # An index into the visible GPUs: srun may show a task all GPUs of the machine, or only one.
        environ["FLAGS_selected_gpus"] = str(number % layout.num_gpus)
    else:
        environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        # Otherwise gloo uses the address of the host name, which may be 127.0.1.1 or not exist.
        interface = interface_of(all_endpoints[rank].partition(":")[0])
        if interface:
            environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # srun merges the output of all tasks into one terminal; otherwise each node has its own.
    has_terminal = local_rank == 0 and (layout.task is None or cluster.node == 0)
    log = None if has_terminal else make_log_dir(cluster.log) / f"workerlog.{rank}"
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log else None
        process = subprocess.Popen(
            [sys.executable, "-m", "vit_static", *argv],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # A session of its own: Ctrl-C at the terminal then reaches a worker once, through us.
            start_new_session=True,
            preexec_fn=stop_with_parent,
        )
    return Worker(rank, process, log)


def make_log_dir(name: str) -> Path:
    folder = Path("log", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # other nodes may see the same folder
    except OSError as error:
        raise ValueError(f"no folder for the workers' logs here: {error}") from None
    return folder


def cores_per_worker(layout: Layout) -> int:
    num_cores = len(os.sched_getaffinity(0)) // layout.num_local
    if layout.task and layout.task.is_one_worker:  # bound to its own cores, or to those of all tasks here
        num_on_node = positive_int(os.environ, "SLURM_CPUS_ON_NODE", default=os.cpu_count() or 1)
        num_cores = min(num_cores, num_on_node // layout.task.num_local)
    return num_cores


def interface_of(address: str) -> str | None:
    """Return the network interface with this IPv4 address, or None."""
    import psutil  # here: a launch of a single process doesn't need it

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == address for entry in addresses):
            return name
    return None


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the launcher dies, even by SIGKILL (prctl(2))."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(workers: list[Worker], cluster: Cluster, peers: Peers, received_signals: list[int]) -> Ending:
    """Wait until all workers and the other nodes have ended; a signal handler fills `received_signals`.

    A failure on one node ends the workers of all nodes. All nodes return together and with the same information, so
    that they agree on what to do next.
    """
    running = list(workers)
    exit_codes: dict[int, int] = {}  # exit codes of the ranks that were not ended by us
    failure: Failure | None = None
    forwarded: set[int] = set()
    last_forwarded, failed_at = float("-inf"), float("inf")
    ending = [signal.SIGKILL, signal.SIGTERM]
    is_done = False
    # Of others that can't end theirs either, a stopped launcher perhaps, the patience ends.
    while running or (peers.running and time.monotonic() < failed_at + 3 * FAILURE_GRACE_S):
        heard = peers.hear(POLL_S)
        signals = [(message["signal"], False) for message in heard if "signal" in message]
        while received_signals:
            signals.append((received_signals.pop(0), True))
        for signum, is_own in signals:
            if peers and time.monotonic() < last_forwarded + SAME_REQUEST_S:
                continue
            last_forwarded = time.monotonic()
            forwarded.add(signum)
            for worker in running:
                worker.process.send_signal(signum)
            if is_own:
                peers.tell({"signal": signum})

        failures = [Failure(**message["failure"]) for message in heard if "failure" in message]
        for worker in list(running):
            code = worker.process.poll()
            if code is None:
                continue
            running.remove(worker)
            if len(ending) < 2:
                continue  # ended by us
            exit_codes[worker.rank] = code
            # A worker that ends with 0 or 75 may be first by any length of time: the others still save.
            if code not in (0, EXIT_STOPPED):
                failed = describe(worker, code, cluster)
                failures.append(failed)
                peers.tell({"failure": failed._asdict()})
        for candidate in failures:
            failure = likelier_cause(failure, candidate)
        if failure and failed_at == float("inf"):
            failed_at = time.monotonic()
        if running and ending and time.monotonic() > failed_at + (3 - len(ending)) * FAILURE_GRACE_S:
            signum = ending.pop()
            for worker in running:
                worker.process.send_signal(signum)
        # Who hangs up after this is not lost. Node 0 says it last, so that all hear how all have ended.
        if not running and not is_done and (cluster.node > 0 or not peers.running):
            is_done = True
            peers.tell({"done": True})

    if failure is None:
        return Ending(max(exit_codes.values()))
    if -failure.code in forwarded:  # before it could listen for the signal, so that nothing was left to save
        code = EXIT_STOPPED if -failure.code in (signal.SIGTERM, signal.SIGINT) else 128 - failure.code
        return Ending(code)
    is_shown = failure.code == EXIT_USER_MISTAKE and any(
        worker.log is None and exit_codes.get(worker.rank) == EXIT_USER_MISTAKE for worker in workers
    )  # by a rank that has made the same mistake and has the terminal
    code = EXIT_USER_MISTAKE if failure.code == EXIT_USER_MISTAKE else EXIT_FAILED
    return Ending(code, None if is_shown else failure, was_stopped=bool(forwarded))


def likelier_cause(known: Failure | None, other: Failure) -> Failure:
    """Return the root cause: the first failure, unless it may be a consequence of the other."""
    return other if known is None or (other.is_root_cause and not known.is_root_cause) else known


def describe(worker: Worker, code: int, cluster: Cluster) -> Failure:
    """Describe a worker's failure, for the terminal of any node."""
    who = f"rank {worker.rank}" + (f" on {cluster.names[cluster.node]}" if len(cluster.names) > 1 else "")
    if code < 0:
        message = f"{who} was killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        message = f"{who} failed with exit code {code}"
    lines = worker.log.read_text(errors="replace").splitlines() if worker.log else []
    if not worker.log or not lines:
        return Failure(code, message)
    tail = "\n".join(lines[-1 if code == EXIT_USER_MISTAKE else -TAIL_LINES :])
    return Failure(code, message, str(worker.log.resolve()), tail)


if __name__ == "__main__":
    sys.exit(main())
