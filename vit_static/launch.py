"""`python -m vit_static.launch VERB ...`: run a verb in as many processes as it should have.

With one process it is `python -m vit_static VERB ...` itself, in this same process. With more, each
is a child that learns its rank from the variables that `python -m paddle.distributed.launch` sets,
so that either launcher, or a scheduler that sets them, may start the workers.

Why not Paddle's launcher (3.3.1), whose user interface (PADDLE_NNODES, PADDLE_MASTER,
CUDA_VISIBLE_DEVICES, log/workerlog.N) this keeps: it answers a SIGTERM with exit code 15; when one
worker has saved its state and ended it kills the others three seconds later, in the middle of
their saving; rank 0's stdout and stderr reach the terminal as one, seconds late, its errors twice
and among 40 lines of the launcher's own; it imports all of Paddle first; and it writes the whole
environment, secrets included, into the log folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED = 1, 2, 75
POLL_S = 0.05
# How long the others may take to fail by themselves once a worker has: they wait for it in a
# collective, perhaps for ever. After it comes SIGTERM, and after that once more, SIGKILL.
FAILURE_GRACE_S = 10.0
RENDEZVOUS_TIMEOUT_S = 900.0

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1


class Layout(NamedTuple):
    num_nodes: int
    num_local: int  # processes on this node
    on_gpus: bool  # one card a process, else CPUs


class Cluster(NamedTuple):
    """What all nodes agree on."""

    node: int
    store: str  # host:port where rank 0 will serve Paddle's TCPStore
    endpoints: list[list[str]]  # [node][local rank], host:port


def main() -> int:
    try:
        layout = find_layout(os.environ)
        if layout.num_nodes * layout.num_local == 1:
            # Not an import: the package's __main__ is above everything else, and parses sys.argv itself.
            runpy.run_module("vit_static", run_name="__main__", alter_sys=True)
            return 0
        handle_signals(stop_before_start)
        cluster = meet(layout, os.environ.get("PADDLE_MASTER", ""))
        return run_workers(sys.argv[1:], layout, cluster)
    except ValueError as error:
        say(str(error))
        return EXIT_USER_MISTAKE


def handle_signals(handler: Callable[[int, Any], None]) -> None:
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is to stay ignored
        signal.signal(signal.SIGHUP, handler)


def stop_before_start(signum: int, frame: Any) -> None:
    raise SystemExit(EXIT_STOPPED)


def say(line: str) -> None:
    print(f"vit_static: {line}", file=sys.stderr, flush=True)


# How many


def find_layout(environ: Mapping[str, str]) -> Layout:
    """One process a visible card, or one on a CPU, unless NPROC says otherwise.

    Raises ValueError where NPROC or PADDLE_NNODES is no positive integer, or NPROC exceeds the cards.
    """
    if "PADDLE_CURRENT_ENDPOINT" in environ:  # a worker already: another launcher started this process
        return Layout(1, 1, on_gpus=False)
    num_nodes = positive_int(environ, "PADDLE_NNODES", default=1)
    num_gpus = count_visible_gpus(environ)
    num_local = positive_int(environ, "NPROC", default=max(1, num_gpus))
    if 0 < num_gpus < num_local:
        raise ValueError(f"NPROC={num_local}: only {num_gpus} GPUs are visible; VIT_STATIC_DEVICE=cpu runs on the CPU")
    return Layout(num_nodes, num_local, on_gpus=num_gpus > 0)


def positive_int(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ValueError(f"{name}={value}: it must be a positive integer")
    return int(value)


def count_visible_gpus(environ: Mapping[str, str]) -> int:
    """Without importing Paddle, which would cost every start seconds. run.sh sets VIT_STATIC_DEVICE."""
    if environ.get("VIT_STATIC_DEVICE") == "cpu":
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    num_gpus = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if num_gpus == 0 or visible is None or visible == "all":
        return num_gpus
    entries = [entry.strip() for entry in visible.split(",")]
    # As CUDA does: whatever follows an invalid entry ("-1", nothing) is invisible too.
    return next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))


# Where: each node's place among the others


def meet(layout: Layout, master: str) -> Cluster:
    """Agree with the other nodes' launchers, through the one whose machine has PADDLE_MASTER's address.

    Every node runs the same command, so none knows its number: who can listen on the address is node
    0, the others are numbered as they come. Raises ValueError for an address that is none.
    """
    with ExitStack() as open_sockets:
        ports = []
        for _ in range(layout.num_local + 1):  # all held until the last is found, so that they differ
            probe = open_sockets.enter_context(socket.create_server(("", 0)))
            ports.append(probe.getsockname()[1])
    if layout.num_nodes == 1:
        return Cluster(0, f"127.0.0.1:{ports[0]}", [[f"127.0.0.1:{port}" for port in ports[1:]]])

    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"PADDLE_NNODES={layout.num_nodes} needs PADDLE_MASTER=IP:PORT of one of the nodes")
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while True:
        try:
            server = socket.create_server((host, int(port)))
        except socket.gaierror as error:
            raise ValueError(f"PADDLE_MASTER={master}: {error.strerror}") from None
        except OSError:  # not this machine's address, or another node of this machine has it already
            cluster = join(host, int(port), layout, ports)
            if cluster:
                return cluster
        else:
            with server:
                return gather(server, layout, ports, deadline)
        wait_for_others(deadline, f"no answer from PADDLE_MASTER={master}")


def gather(server: socket.socket, layout: Layout, ports: list[int], deadline: float) -> Cluster:
    """Node 0: hear every other node's ports, then tell each its number and everyone's endpoints."""
    server.settimeout(1.0)
    endpoints: list[list[str]] = [[]]  # node 0's address is known once the first node has reached it
    store = ""
    with ExitStack() as connections:
        peers: list[socket.socket] = []
        while len(peers) < layout.num_nodes - 1:
            try:
                peer, (peer_host, _) = server.accept()
                peer.settimeout(10.0)
                hello = receive(peer)
                peer_nodes, peer_ports = hello["num_nodes"], [int(port) for port in hello["ports"]]
            except (OSError, ValueError, KeyError, TypeError):  # nobody yet, or a stranger
                wait_for_others(deadline, f"{len(peers) + 1} of PADDLE_NNODES={layout.num_nodes} nodes came")
                continue
            connections.enter_context(peer)
            if peer_nodes != layout.num_nodes:
                raise ValueError(f"PADDLE_NNODES is {layout.num_nodes} here and {peer_nodes} on {peer_host}")
            if not peers:
                own_host = peer.getsockname()[0]
                store = f"{own_host}:{ports[0]}"
                endpoints[0] = [f"{own_host}:{port}" for port in ports[1:]]
            peers.append(peer)
            endpoints.append([f"{peer_host}:{port}" for port in peer_ports])
        for node, peer in enumerate(peers, start=1):
            send(peer, {"node": node, "store": store, "endpoints": endpoints})
    return Cluster(0, store, endpoints)


def join(host: str, port: int, layout: Layout, ports: list[int]) -> Cluster | None:
    """Another node: None where node 0 does not listen (yet)."""
    try:
        with socket.create_connection((host, port), timeout=5.0) as connection:
            connection.settimeout(RENDEZVOUS_TIMEOUT_S)
            send(connection, {"num_nodes": layout.num_nodes, "ports": ports[1:]})
            return Cluster(**receive(connection))
    except (OSError, ValueError, TypeError):
        return None


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> Any:
    with connection.makefile("rb") as stream:
        return json.loads(stream.readline(1 << 20))


def wait_for_others(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        say(f"{problem} within {RENDEZVOUS_TIMEOUT_S:.0f} s; is the same command running on every node?")
        raise SystemExit(EXIT_FAILED)
    time.sleep(POLL_S)


# The workers


class Worker(NamedTuple):
    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None: the terminal


def run_workers(argv: Sequence[str], layout: Layout, cluster: Cluster) -> int:
    """Start this node's workers, pass signals on to them, and return the job's exit code."""
    log_dir = Path("log", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        log_dir.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"no folder for the workers' logs here: {error}") from None
    received_signals: list[int] = []
    handle_signals(lambda signum, frame: received_signals.append(signum))
    workers: list[Worker] = []
    try:
        for local_rank in range(layout.num_local):
            workers.append(start_worker(argv, layout, cluster, local_rank, log_dir))
        return supervise(workers, received_signals)
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()


def start_worker(argv: Sequence[str], layout: Layout, cluster: Cluster, local_rank: int, log_dir: Path) -> Worker:
    all_endpoints = [endpoint for node in cluster.endpoints for endpoint in node]
    rank = sum(len(node) for node in cluster.endpoints[: cluster.node]) + local_rank
    environ = {
        **os.environ,
        "PADDLE_MASTER": cluster.store,
        "PADDLE_NNODES": str(layout.num_nodes),
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(all_endpoints)),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(all_endpoints),
        "PADDLE_CURRENT_ENDPOINT": all_endpoints[rank],
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_GLOBAL_SIZE": str(len(all_endpoints)),
        "PADDLE_LOCAL_RANK": str(local_rank),
        "PADDLE_LOCAL_SIZE": str(layout.num_local),
        "PADDLE_RANK_IN_NODE": str(local_rank),
        "PYTHONUNBUFFERED": "1",  # a worker that is killed should leave its last words
    }
    if layout.on_gpus:
        environ["FLAGS_selected_gpus"] = str(local_rank)  # counted among the visible cards
    else:
        environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        # Each worker would else take every core, and N of them slow one another down.
        num_threads = len(os.sched_getaffinity(0)) // layout.num_local
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_threads)))
    log = log_dir / f"workerlog.{local_rank}" if local_rank else None
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


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the launcher dies, even by SIGKILL (prctl(2))."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(workers: list[Worker], received_signals: list[int]) -> int:
    """Wait for all workers, whatever comes; `received_signals` is what a signal handler fills."""
    running = list(workers)
    own_codes: dict[int, int] = {}  # exit codes of the ranks that were not ended by us, in order of exit
    forwarded: set[int] = set()
    deadline = float("inf")
    ending = [signal.SIGKILL, signal.SIGTERM]
    while running:
        while received_signals:
            signum = received_signals.pop(0)
            forwarded.add(signum)
            for worker in running:
                worker.process.send_signal(signum)
        for worker in list(running):
            code = worker.process.poll()
            if code is None:
                continue
            running.remove(worker)
            if len(ending) == 2:
                own_codes[worker.rank] = code
            # A worker that ends with 0 or 75 may be first by any length of time: the others still save.
            if code not in (0, EXIT_STOPPED) and deadline == float("inf"):
                deadline = time.monotonic() + FAILURE_GRACE_S
        if running and time.monotonic() > deadline and ending:
            signum = ending.pop()
            deadline = time.monotonic() + FAILURE_GRACE_S
            for worker in running:
                worker.process.send_signal(signum)
        time.sleep(POLL_S)
    return judge(workers, own_codes, forwarded)


def judge(workers: list[Worker], own_codes: dict[int, int], forwarded: set[int]) -> int:
    """The job's exit code from its workers', and a word on the one that failed where no one saw it."""
    failed = {rank: code for rank, code in own_codes.items() if code not in (0, EXIT_STOPPED)}
    if not failed:
        return max(own_codes.values())
    first = next(iter(failed))
    code = failed[first]
    if -code in forwarded:
        return 128 - code  # stopped before it could listen for the signal: as a shell reports it
    all_mistakes = set(failed.values()) == {EXIT_USER_MISTAKE}
    log = next(worker.log for worker in workers if worker.rank == first)
    if code < 0:
        likely_cause = " (out of memory?)" if code == -signal.SIGKILL else ""
        say(f"rank {first} was killed by signal {-code}{likely_cause}")
    if log and not (all_mistakes and workers[0].rank in failed):  # else the terminal has shown the cause
        num_lines = 1 if all_mistakes else 20
        say(f"rank {first} failed; the end of {log.resolve()}:")
        print("\n".join(log.read_text(errors="replace").splitlines()[-num_lines:]), file=sys.stderr)
    return EXIT_USER_MISTAKE if all_mistakes else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
