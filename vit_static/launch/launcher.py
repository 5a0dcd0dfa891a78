"""Launcher: `python -m vit_static.launch VERB ...` runs a verb in one or many processes.

A single process runs `python -m vit_static.worker VERB ...` in the launcher's own process, unless restarts are
enabled (`train.max_restarts`). Several processes are children of the launcher. They read their rank from the
variables that `python -m paddle.distributed.launch` sets, so either launcher, or a scheduler that sets
these variables, can start the workers.

On several nodes, each node has a launcher, and the launchers stay connected until the job ends: a failure
or a signal on one node ends the job on all nodes. Under Slurm, each task of `srun` counts as a node. If each
machine has one task, the task starts the machine's processes; otherwise, each task is a single process.

With `train.max_restarts`, training continues after a failure: every launcher ends its workers, connects to
the other launchers again, and restarts its workers from the latest checkpoint. A lost node joins again when
its launcher is restarted, by hand or by a scheduler, while the other nodes wait for it. Under Slurm, a task's
launcher restarts a worker that died, but srun never starts a task of a step twice, and depending on the
site's settings (KillOnBadExit, --wait, --no-kill) it ends the step when a task or node is lost. So a lost
node ends the job, and `sbatch --requeue` restarts it.

This launcher has the user interface of Paddle's launcher (PADDLE_NNODES, PADDLE_MASTER,
CUDA_VISIBLE_DEVICES, log/workerlog.N). It replaces that one because Paddle's (3.3.1) has these problems:

- It answers SIGTERM with exit code 15.
- When one worker has saved its state and ended, it kills the others three seconds later, while they save.
- It merges the stdout and stderr of rank 0, prints them seconds late, and repeats errors among 40 lines of its own.
- It imports all of Paddle first.
- It writes all environment variables, including secrets, to the log folder.
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
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vit_static.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_UNANSWERED, EXIT_USER_MISTAKE
from vit_static.common.startup import STARTED_FOLDER, ignored_or
from vit_static.common.text import positive_int, print_text, say
from vit_static.config.loader import DEFAULT_CONFIGS, load_config
from vit_static.config.schema import Config
from vit_static.launch.rendezvous import (
    POLL_S,
    RENDEZVOUS_TIMEOUT_S,
    Cluster,
    Failure,
    Peers,
    RestartState,
    meet,
)
from vit_static.launch.topology import Layout, find_layout, is_worker, warn_of_idle_nodes

# After a worker has failed, the others wait for it in a collective, perhaps forever. If they don't fail
# by themselves within this time, they get SIGTERM, and SIGKILL after the same time again.
FAILURE_GRACE_S = 10.0
# Stop signals within this time count as one request: Slurm and the other launchers send one to every task,
# and a worker that receives a second one ends without saving.
SAME_REQUEST_S = 3.0
# After a stop signal, a worker that hasn't begun to train gets SIGKILL: it has nothing to save, and may be waiting in
# native code, where its handler can't run, for the connection of a rank that has ended already.
START_GRACE_S = 10.0
TAIL_LINES = 20

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


class Worker(NamedTuple):
    """A process of this node."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None: the terminal


class Ending(NamedTuple):
    """How the processes of a job ended."""

    code: int  # the launcher's exit code, unless it restarts the workers
    failure: Failure | None = None  # to report; None if a rank with a terminal has already reported a user's mistake
    is_shown: bool = False  # a rank with a terminal has printed why it failed
    was_stopped: bool = False  # a stop signal came before the failure


def main() -> int:
    """Run the verb in as many processes as requested, and return the exit code."""
    argv = sys.argv[1:]
    try:
        config = load_config(None) if is_worker(os.environ) else config_of(argv)
        layout = find_layout(os.environ, config.device)
        warn_of_idle_nodes(os.environ)
        max_restarts = config.train.max_restarts if is_training(argv) else 0
        if layout.num_nodes * layout.num_local == 1 and max_restarts == 0:
            # Run as a module, not imported: it is the highest layer, and parses sys.argv itself.
            runpy.run_module("vit_static.worker", run_name="__main__", alter_sys=True)
            return EXIT_DONE
        return launch(argv, layout, config, max_restarts)
    except ValueError as error:
        say(str(error))
        return EXIT_USER_MISTAKE
    except TimeoutError as error:
        say(str(error))
        return EXIT_FAILED


def is_training(argv: Sequence[str]) -> bool:
    """Return whether the arguments are those of a verb that trains."""
    return bool(argv) and argv[0] in DEFAULT_CONFIGS


def config_of(argv: Sequence[str]) -> Config:
    """Return the config of the verb, or the defaults if it is invalid, which the verb itself reports."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-c", "--config", type=Path, default=DEFAULT_CONFIGS.get(argv[0]) if argv else None)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    try:
        known, _ = parser.parse_known_args(argv)
        return load_config(known.config, known.overrides)
    except (argparse.ArgumentError, ValueError, OSError):
        return load_config(None)


def launch(argv: Sequence[str], layout: Layout, config: Config, max_restarts: int) -> int:
    """Run the processes of the verb, restart them after a failure as configured, and return the exit code."""
    initial_checkpoints = complete_checkpoints(config.run_dir)
    restart_state = RestartState(num_restarts=0, has_saved=False)
    while True:
        handle_signals(stop_without_workers)
        cluster, peers = meet(layout, os.environ.get("PADDLE_MASTER", ""), config.train.node_timeout_s, restart_state)
        # The last of several --resume arguments takes effect. Until this launch has saved a checkpoint, the arguments
        # stay the same: with --resume never, checkpoints of an earlier run must not be used.
        resume = ["--resume", "auto"] if cluster.has_saved else []
        received_signals: list[int] = []
        with peers:
            ending = run_workers([*argv, *resume], layout, cluster, peers, received_signals)
        failure = ending.failure
        if failure is None:
            return ending.code
        is_lost_for_good = layout.task is not None and failure.lost_node is not None  # srun starts no task again
        is_restartable = ending.code == EXIT_FAILED and not ending.was_stopped and not is_lost_for_good
        is_reporter = layout.task is None or cluster.node == 0 or failure.lost_node == 0
        if not is_restartable or cluster.num_restarts >= max_restarts:
            if is_reporter and not ending.is_shown:
                used_up = f"; train.max_restarts = {max_restarts} is used up" if is_restartable and max_restarts else ""
                say(failure.message + used_up + (f"; the end of {failure.log}:" if failure.log else ""))
                if failure.tail:
                    print_text(failure.tail, sys.stderr, flush=True)
                has_log = is_training(argv) and (config.run_dir / "log").is_dir()
                if is_restartable and failure.code != EXIT_UNANSWERED and has_log:
                    say(f"the output of Paddle and DALI is in {config.run_dir / 'log'}")
            return ending.code

        handle_signals(stop_without_workers)
        if received_signals:  # arrived after the workers had ended
            return EXIT_STOPPED
        has_saved = cluster.has_saved or bool(complete_checkpoints(config.run_dir) - initial_checkpoints)
        restart_state = RestartState(cluster.num_restarts + 1, has_saved)
        if is_reporter:
            log = f" ({failure.log})" if failure.log else ""
            start = (
                "from the latest checkpoint" if has_saved else "from the beginning, since no checkpoint has been saved"
            )
            wait = (
                ""
                if failure.lost_node is None
                else (f", when its launcher is started again; waiting up to {RENDEZVOUS_TIMEOUT_S:.0f} s")
            )
            reason = "a rank did not answer" if ending.is_shown else failure.message
            say(f"{reason}{log}; restart {restart_state.num_restarts} of {max_restarts}, {start}{wait}")


def complete_checkpoints(run_dir: Path) -> set[tuple[str, int]]:
    """Return the run's complete checkpoints as (name, time in ns), so that one that is written again counts as new."""
    checkpoints = set()
    for path in (run_dir / "checkpoints").glob("step_*/meta.json"):
        with suppress(OSError):  # removed in the meantime
            checkpoints.add((path.parent.name, path.stat().st_mtime_ns))
    return checkpoints


def handle_signals(handler: Callable[[int, Any], None]) -> None:
    """Set the handler of SIGTERM, SIGINT and SIGHUP."""
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGHUP, ignored_or(handler, signal.SIGHUP))


def stop_without_workers(signum: int, frame: Any) -> None:
    """End the launcher on a signal while no worker is running."""
    raise SystemExit(EXIT_STOPPED)


def run_workers(
    argv: Sequence[str], layout: Layout, cluster: Cluster, peers: Peers, received_signals: list[int]
) -> Ending:
    """Start this node's workers, forward signals to them, and return when the workers of all nodes have ended.

    The signal handler appends to `received_signals`; a signal that arrives too late to be forwarded stays there.
    """
    handle_signals(lambda signum, frame: received_signals.append(signum))
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="vit_static_launch_") as started:
        try:
            for local_rank in range(layout.num_local):
                workers.append(start_worker(argv, layout, cluster, local_rank, started))
            return supervise(workers, cluster, peers, received_signals, Path(started))
        finally:
            for worker in workers:
                if worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()


def start_worker(argv: Sequence[str], layout: Layout, cluster: Cluster, local_rank: int, started: str) -> Worker:
    """Start one process of the verb, with its rank, endpoints, device and output in the environment.

    `started`: the folder in which it creates a file with its rank as name when it begins to train.
    """
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
        STARTED_FOLDER: started,
        "PYTHONUNBUFFERED": "1",  # so that the log of a killed worker has its last lines
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
            [sys.executable, "-m", "vit_static.worker", *argv],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # In a separate session, a worker receives Ctrl-C only through the launcher, not from the terminal, too.
            start_new_session=True,
            preexec_fn=stop_with_parent,
        )
    return Worker(rank, process, log)


def make_log_dir(name: str) -> Path:
    """Create the folder log/NAME, and return its path. Raise ValueError if that isn't possible."""
    folder = Path("log", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # other nodes may share the folder
    except OSError as error:
        raise ValueError(
            f"cannot create the folder for the workers' logs: {error}; run the command in a writable folder"
        ) from None
    return folder


def cores_per_worker(layout: Layout) -> int:
    """Return the number of CPU cores that each process of this machine can use."""
    num_cores = len(os.sched_getaffinity(0)) // layout.num_local
    if layout.task and layout.task.is_one_worker:  # srun may bind each task to its own cores, or to all tasks' cores
        num_on_node = positive_int(os.environ, "SLURM_CPUS_ON_NODE", default=os.cpu_count() or 1)
        num_cores = min(num_cores, num_on_node // layout.task.num_local)
    return num_cores


def interface_of(address: str) -> str | None:
    """Return the network interface with this IPv4 address, or None."""
    import psutil  # imported here, since a single process doesn't need it

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == address for entry in addresses):
            return name
    return None


def stop_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the launcher dies, even by SIGKILL (prctl(2))."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(
    workers: list[Worker], cluster: Cluster, peers: Peers, received_signals: list[int], started: Path
) -> Ending:
    """Wait until all workers and the other nodes have ended; a signal handler fills `received_signals`.

    A failure on one node ends the workers of all nodes. All nodes return together and with the same information, so
    that they agree on what to do next.
    """
    running = list(workers)
    exit_codes: dict[int, int] = {}  # exit codes of the ranks that the launcher did not end
    failure: Failure | None = None
    forwarded: set[int] = set()
    last_forwarded, failed_at, stop_requested_at = float("-inf"), float("inf"), float("inf")
    unsent = [signal.SIGKILL, signal.SIGTERM]  # sent from the end
    is_done = False
    # After a failure, don't wait forever for nodes that can't end their workers, such as one with a suspended launcher.
    while running or (peers.running and time.monotonic() < failed_at + 3 * FAILURE_GRACE_S):
        messages = peers.poll(POLL_S)
        signals = [(message["signal"], False) for message in messages if "signal" in message]
        while received_signals:
            signals.append((received_signals.pop(0), True))
        for signum, is_local in signals:
            if peers and time.monotonic() < last_forwarded + SAME_REQUEST_S:
                continue
            last_forwarded = time.monotonic()
            stop_requested_at = min(stop_requested_at, last_forwarded)
            forwarded.add(signum)
            for worker in running:
                worker.process.send_signal(signum)
            if is_local:
                peers.broadcast({"signal": signum})

        failures = [Failure(**message["failure"]) for message in messages if "failure" in message]
        for worker in list(running):
            code = worker.process.poll()
            if code is None and time.monotonic() > stop_requested_at + START_GRACE_S and not has_begun(worker, started):
                worker.process.kill()
                worker.process.wait()
                code = EXIT_STOPPED
            if code is None:
                continue
            running.remove(worker)
            if len(unsent) < 2:
                continue  # ended by the launcher
            exit_codes[worker.rank] = code
            # A worker that ends with 0 or 75 may be far ahead of the others, which are still saving.
            if code not in (0, EXIT_STOPPED):
                own_failure = describe(worker, code, cluster)
                failures.append(own_failure)
                peers.broadcast({"failure": own_failure._asdict()})
        for candidate in failures:
            failure = more_likely_cause(failure, candidate)
        if failure and failed_at == float("inf"):
            failed_at = time.monotonic()
        # Without a rank that no longer answers, the others have nothing to finish.
        grace_s = 0.0 if failure and failure.code == EXIT_UNANSWERED else FAILURE_GRACE_S
        if running and unsent and time.monotonic() > failed_at + (3 - len(unsent)) * grace_s:
            signum = unsent.pop()
            for worker in running:
                worker.process.send_signal(signum)
        # A node that disconnects after this doesn't count as lost. Node 0 reports last, so that every node learns all
        # outcomes.
        if not running and not is_done and (cluster.node > 0 or not peers.running):
            is_done = True
            peers.broadcast({"done": True})

    return ending_of(workers, exit_codes, failure, forwarded, started)


def ending_of(
    workers: list[Worker], exit_codes: dict[int, int], failure: Failure | None, forwarded: set[int], started: Path
) -> Ending:
    """Return how a job ended, from the exit codes of this node's ranks and the signals that were forwarded to them."""
    if failure is None:
        return Ending(max(exit_codes.values()))
    # Killed by the signal before its handler was set; or failed since another rank had ended before the training began.
    # There was nothing to save yet.
    has_stopped_in_start = any(
        exit_codes.get(worker.rank) == EXIT_STOPPED and not has_begun(worker, started) for worker in workers
    )
    if -failure.code in forwarded or (forwarded and has_stopped_in_start):
        return Ending(EXIT_STOPPED)
    # A rank that writes to the terminal has reported the same there.
    is_shown = failure.code in (EXIT_UNANSWERED, EXIT_USER_MISTAKE) and any(
        worker.log is None and exit_codes.get(worker.rank) == failure.code for worker in workers
    )
    if failure.code == EXIT_USER_MISTAKE:
        return Ending(EXIT_USER_MISTAKE, None if is_shown else failure, is_shown, bool(forwarded))
    return Ending(EXIT_FAILED, failure, is_shown, bool(forwarded))


def has_begun(worker: Worker, started: Path) -> bool:
    """Return whether a worker has begun to train, and so has a state to save."""
    return (started / str(worker.rank)).exists()


def more_likely_cause(known: Failure | None, other: Failure) -> Failure:
    """Return the more likely root cause: the first failure, unless it may be a consequence of the other."""
    return other if known is None or (other.is_root_cause and not known.is_root_cause) else known


def describe(worker: Worker, code: int, cluster: Cluster) -> Failure:
    """Describe a worker's failure, for the terminal of any node."""
    rank_name = f"rank {worker.rank}" + (f" on {cluster.names[cluster.node]}" if len(cluster.names) > 1 else "")
    if code < 0:
        message = f"{rank_name} was killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        message = f"{rank_name} failed with exit code {code}"
    lines = worker.log.read_text(errors="replace").splitlines() if worker.log else []
    if code == EXIT_UNANSWERED:  # its last line names the rank that it has waited for
        return Failure(code, lines[-1].removeprefix("vit_static: ") if lines else f"{rank_name} waited in vain")
    if not worker.log or not lines:
        return Failure(code, message)
    tail = "\n".join(lines[-1 if code == EXIT_USER_MISTAKE else -TAIL_LINES :])
    return Failure(code, message, str(worker.log.resolve()), tail)
