"""`python -m vit_static.launch VERB ...`: run a verb in as many processes as it should have.

With one process it is `python -m vit_static VERB ...` itself, in this same process. With more, each
is a child that learns its rank from the variables that `python -m paddle.distributed.launch` sets,
so that either launcher, or a scheduler that sets them, may start the workers.

On several nodes each has a launcher, and these stay connected until the job ends: what ends one
node's part, a failure or a signal, ends the others'. Under Slurm a task of `srun` is a node where
each node has one task; where some have more, each task is a node of one process.

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
import fcntl
import itertools
import json
import os
import re
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

EXIT_FAILED, EXIT_USER_MISTAKE, EXIT_STOPPED = 1, 2, 75
POLL_S = 0.05
# How long the others may take to fail by themselves once a worker has: they wait for it in a
# collective, perhaps for ever. After it comes SIGTERM, and after that once more, SIGKILL.
FAILURE_GRACE_S = 10.0
RENDEZVOUS_TIMEOUT_S = 900.0
# After which a node that answers nothing, as one without power does, is taken for gone: before gloo's 30 s, so that
# what is said is that.
SILENCE_S = 24
# Stop signals within this time are one request: Slurm sends it to every task, and so do the other
# launchers; and a worker takes a second one as the wish to end without saving.
SAME_REQUEST_S = 3.0
SLURM_PORTS = range(20000, 30000)  # below those that Linux hands out by itself
TAIL_LINES = 20

LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
SIOCGIFADDR = 0x8915


class SlurmTask(NamedTuple):
    """This process among the tasks of a step that srun has started."""

    step: str  # JOB.STEP
    number: int  # 0 to num_tasks - 1
    num_tasks: int
    num_nodes: int
    local_number: int  # among the tasks of this machine
    num_local: int
    master: str  # host:port where task 0 will listen

    @property
    def is_one_worker(self) -> bool:
        """Whether srun has started a task a process; else it is one a machine, which starts the processes."""
        return self.num_tasks > self.num_nodes


class Layout(NamedTuple):
    num_nodes: int  # launchers
    num_local: int  # processes of this launcher
    num_gpus: int  # visible ones, of which a process takes one; 0: CPUs
    task: SlurmTask | None = None

    @property
    def first_on_machine(self) -> int:
        """The number of this launcher's first process among those of the machine."""
        return self.task.local_number if self.task and self.task.is_one_worker else 0

    @property
    def num_on_machine(self) -> int:
        return self.task.num_local if self.task and self.task.is_one_worker else self.num_local

    @property
    def num_machines(self) -> int:
        return self.task.num_nodes if self.task else self.num_nodes


class Cluster(NamedTuple):
    """What all nodes agree on."""

    node: int
    store: str  # host:port where rank 0 will serve Paddle's TCPStore
    endpoints: list[list[str]]  # [node][local rank], host:port
    names: list[str]  # [node]
    log: str  # name of the folder below log/


class Failure(NamedTuple):
    """What the job failed of, in words for any node's terminal."""

    code: int  # a worker's exit code, negative for a signal
    words: str
    tail: str = ""  # of the worker's log
    lost_node: int | None = None

    @property
    def is_a_cause(self) -> bool:
        """Whether another rank's failure can't have led to it."""
        return self.code in (-signal.SIGKILL, EXIT_USER_MISTAKE) or self.lost_node is not None


def main() -> int:
    try:
        layout = find_layout(os.environ, sys.argv[1:])
        warn_of_idle_nodes(os.environ)
        if layout.num_nodes * layout.num_local == 1:
            # Not an import: the package's __main__ is above everything else, and parses sys.argv itself.
            runpy.run_module("vit_static", run_name="__main__", alter_sys=True)
            return 0
        handle_signals(stop_before_start)
        cluster, peers = meet(layout, os.environ.get("PADDLE_MASTER", ""))
        with peers:
            return run_workers(sys.argv[1:], layout, cluster, peers)
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


def find_layout(environ: Mapping[str, str], argv: Sequence[str] = ()) -> Layout:
    """One process a visible card, or one on a CPU, unless NPROC says otherwise; on as many nodes as PADDLE_NNODES or
    srun says.

    Raises ValueError where a number is none, NPROC exceeds the cards, or srun's tasks contradict NPROC.
    """
    if "PADDLE_CURRENT_ENDPOINT" in environ:  # a worker already: another launcher started this process
        return Layout(1, 1, num_gpus=0)
    task = None if environ.get("PADDLE_NNODES") else find_slurm_task(environ)
    num_gpus = count_visible_gpus(environ)
    if num_gpus and asks_for_cpu(argv):
        num_gpus = 0
    if task and task.is_one_worker:
        if positive_int(environ, "NPROC", default=task.num_local) != task.num_local:
            raise ValueError(
                f"NPROC={environ['NPROC']}: srun has started {task.num_local} tasks here, each of which is one "
                "process; leave NPROC unset, or give srun --ntasks-per-node=1"
            )
        return Layout(task.num_tasks, 1, num_gpus, task)
    num_nodes = task.num_nodes if task else positive_int(environ, "PADDLE_NNODES", default=1)
    num_local = positive_int(environ, "NPROC", default=max(1, num_gpus))
    if 0 < num_gpus < num_local:
        raise ValueError(f"NPROC={num_local}: only {num_gpus} GPUs are visible; VIT_STATIC_DEVICE=cpu runs on the CPU")
    return Layout(num_nodes, num_local, num_gpus, task)


def asks_for_cpu(argv: Sequence[str]) -> bool:
    """Whether the config says `device: cpu`. A mistake in it is left to the verb, which names it."""
    from vit_static.config import load  # takes some time, and matters on a machine with cards alone

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-c", "--config", type=Path)
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    try:
        given, _ = parser.parse_known_args(argv)
        return load(given.config, given.overrides).device == "cpu"
    except (argparse.ArgumentError, ValueError, OSError):
        return False


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


# Slurm


def find_slurm_task(environ: Mapping[str, str]) -> SlurmTask | None:
    """This task of a step that srun has started with more than one; None where there is no such step.

    What an `sbatch` script or an `salloc` shell runs without srun runs once, on one node: Slurm's users know it so, and
    to reach for the other nodes from there would be to wait for launchers that nobody starts. (SLURM_PROCID=0 and the
    job's SLURM_NTASKS stand there too, so that only the step's own variables tell; an `salloc` shell may be a step
    itself, of one task, with the job's SLURM_NTASKS.)
    """
    if not all(environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID")):
        return None
    num_tasks = positive_int(environ, "SLURM_STEP_NUM_TASKS", positive_int(environ, "SLURM_NTASKS", 1))
    if num_tasks == 1:
        return None
    num_job_nodes = positive_int(environ, "SLURM_NNODES", positive_int(environ, "SLURM_JOB_NUM_NODES", 1))
    num_nodes = positive_int(environ, "SLURM_STEP_NUM_NODES", num_job_nodes)
    node = whole_number(environ, "SLURM_NODEID")
    tasks_per_node = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    job, step = whole_number(environ, "SLURM_JOB_ID"), whole_number(environ, "SLURM_STEP_ID")
    # 16: steps of one job that run at once should differ, and not have the next job's ports.
    port = SLURM_PORTS[(16 * job + step) % len(SLURM_PORTS)]
    return SlurmTask(
        step=f"{job}.{step}",
        number=whole_number(environ, "SLURM_PROCID"),
        num_tasks=num_tasks,
        num_nodes=num_nodes,
        local_number=whole_number(environ, "SLURM_LOCALID"),
        num_local=tasks_per_node[node] if node < len(tasks_per_node) else -(-num_tasks // num_nodes),
        master=environ.get("PADDLE_MASTER") or f"{'127.0.0.1' if num_nodes == 1 else first_host(environ)}:{port}",
    )


def first_host(environ: Mapping[str, str]) -> str:
    """The step's first node, where task 0 is."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return expand_hosts(environ[name])[0]
    raise ValueError("srun has set no SLURM_STEP_NODELIST; set PADDLE_MASTER=HOST:PORT, HOST being task 0's")


def expand_hosts(hosts: str) -> list[str]:
    """Slurm's `node[001-003,7],login` as node001, node002, node003, node7, login."""
    ranges = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
    group = rf"(?:[^][,\s]|{ranges})+"
    if not re.fullmatch(rf"{group}(?:,{group})*", hosts):
        raise ValueError(f"{hosts!r}: not a list of nodes as Slurm writes it; set PADDLE_MASTER=HOST:PORT")
    expanded = []
    for name in re.findall(group, hosts):
        parts = re.split(rf"({ranges})", name)
        choices = [list(expand_ranges(part[1:-1])) if part.startswith("[") else [part] for part in parts]
        expanded += ["".join(choice) for choice in itertools.product(*choices)]
    return expanded


def expand_ranges(ranges: str) -> Iterator[str]:
    """`001-003,7` as 001, 002, 003, 7."""
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield f"{number:0{len(first)}d}"


def expand_counts(counts: str) -> list[int]:
    """Slurm's `2(x3),1` as 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, repeats in found for _ in range(int(repeats or 1))]


def whole_number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name) or "0"
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value}: it must be a whole number")
    return int(value)


def warn_of_idle_nodes(environ: Mapping[str, str]) -> None:
    """Says where a job of several nodes runs this on one, as it does without srun (see `find_slurm_task`)."""
    decided = any(environ.get(name) for name in ("SLURM_STEP_ID", "PADDLE_NNODES", "PADDLE_CURRENT_ENDPOINT"))
    num_nodes = whole_number(environ, "SLURM_JOB_NUM_NODES")
    if not decided and num_nodes > 1:
        say(
            f"this runs on one of the Slurm job's {num_nodes} nodes; start it with srun to use all, "
            "or with PADDLE_NNODES=1 if one is meant"
        )


# Where: each node's place among the others


def meet(layout: Layout, master: str) -> tuple[Cluster, Peers]:
    """Agree with the other nodes' launchers, through node 0's, which listens at `master`.

    Under Slurm a task's number is its node's. Else every node runs the same command, so none knows its number: who can
    listen on the address is node 0, the others are numbered as they come. Raises ValueError for an address that is
    none.
    """
    with ExitStack() as open_sockets:
        ports = []
        for _ in range(layout.num_local + 1):  # all held until the last is found, so that they differ
            probe = open_sockets.enter_context(socket.create_server(("", 0)))
            ports.append(probe.getsockname()[1])
    if layout.num_nodes == 1:
        endpoints = [[f"127.0.0.1:{port}" for port in ports[1:]]]
        return Cluster(0, f"127.0.0.1:{ports[0]}", endpoints, [socket.gethostname()], log_name()), Peers({}, [])

    master = layout.task.master if layout.task else master
    host, _, digits = master.rpartition(":")
    if not host or not digits.isdecimal() or not 0 < int(digits) < 1 << 16:
        raise ValueError(f"{layout.num_nodes} nodes need PADDLE_MASTER=IP:PORT of one of them, not '{master}'")
    port = int(digits)
    try:
        socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"PADDLE_MASTER={master}: {error.strerror}; name an IP address of one of the nodes") from None
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while True:
        server = listen(layout.task, host, port)
        if server:
            with server:
                return gather(server, layout, ports, deadline)
        joined = join(host, port, layout, ports)
        if joined:
            return joined
        wait_for_others(deadline, f"no answer from {'task 0' if layout.task else 'PADDLE_MASTER'} at {master}")


def listen(task: SlurmTask | None, host: str, port: int) -> socket.socket | None:
    """Node 0's server; None for another node."""
    if task and task.number > 0:
        return None
    try:
        # Under Slurm on every address: a machine may know its own name as 127.0.1.1, where no other reaches it.
        return socket.create_server(("", port) if task and host != "127.0.0.1" else (host, port))
    except OSError as error:  # not this machine's address, or another node of this machine has it already
        if task:
            raise ValueError(f"port {port}: {error.strerror}; set PADDLE_MASTER={host}:PORT") from None
        return None


def gather(server: socket.socket, layout: Layout, ports: list[int], deadline: float) -> tuple[Cluster, Peers]:
    """Node 0: hear every other node's ports, then tell each its number and everyone's endpoints."""
    server.settimeout(1.0)
    arrived: dict[int, tuple[socket.socket, str, dict[str, Any]]] = {}
    while len(arrived) < layout.num_nodes - 1:
        try:
            peer, (peer_host, _) = server.accept()
            peer.settimeout(10.0)
            hello = receive(peer)
            node = int(hello["node"] or len(arrived) + 1)
            is_ours = hello["job"] == job_of(layout) and {"ports", "name", "num_nodes"} <= hello.keys()
        except (OSError, ValueError, KeyError, TypeError):  # nobody yet, or a stranger
            is_ours = False
        if not is_ours:
            came = f"{len(arrived) + 1} of {layout.num_nodes} {'tasks' if layout.task else 'nodes'} came"
            wait_for_others(deadline, came)
            continue
        if hello["num_nodes"] != layout.num_nodes:
            raise ValueError(f"PADDLE_NNODES is {layout.num_nodes} here and {hello['num_nodes']} on {hello['name']}")
        arrived[node] = peer, peer_host, hello

    # Node 0's address is the one at which others reach it; those of its own machine may have come by another.
    own_addresses = [peer.getsockname()[0] for peer, _, _ in arrived.values()]
    own_host = next((address for address in own_addresses if not is_loopback(address)), own_addresses[0])
    endpoints = [[f"{own_host}:{port}" for port in ports[1:]]]
    names = [socket.gethostname()]
    for _, (_, peer_host, hello) in sorted(arrived.items()):
        host = own_host if is_loopback(peer_host) else peer_host
        endpoints.append([f"{host}:{port}" for port in hello["ports"]])
        names.append(hello["name"])
    cluster = Cluster(0, f"{own_host}:{ports[0]}", endpoints, names, log_name())
    connections = {node: peer for node, (peer, _, _) in arrived.items()}
    for node, peer in connections.items():
        with suppress(OSError):  # it is gone, as will be heard
            send(peer, cluster._replace(node=node)._asdict())
    return cluster, Peers(connections, names)


def is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def join(host: str, port: int, layout: Layout, ports: list[int]) -> tuple[Cluster, Peers] | None:
    """Another node: None where node 0 does not listen (yet)."""
    with ExitStack() as on_failure:
        try:
            connection = on_failure.enter_context(socket.create_connection((host, port), timeout=5.0))
            connection.settimeout(RENDEZVOUS_TIMEOUT_S)
            number = layout.task.number if layout.task else None
            hello = {"job": job_of(layout), "node": number, "num_nodes": layout.num_nodes, "ports": ports[1:]}
            send(connection, hello | {"name": socket.gethostname()})
            cluster = Cluster(**receive(connection))
        except (OSError, ValueError, TypeError):
            return None
        on_failure.pop_all()
        return cluster, Peers({0: connection}, cluster.names)


def job_of(layout: Layout) -> str | None:
    """What keeps Slurm jobs apart whose ports are the same by chance."""
    return layout.task.step if layout.task else None


def log_name() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> Any:
    """One message, and no byte of the next."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 1 << 20:
            raise ValueError("no message")
        line += byte
    return json.loads(line)


def wait_for_others(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        say(f"{problem} within {RENDEZVOUS_TIMEOUT_S:.0f} s; is the same command running on every node?")
        raise SystemExit(EXIT_FAILED)
    time.sleep(POLL_S)


class Peers:
    """The other nodes' launchers: node 0 is connected with all of them, and passes on what it hears; they with it.

    The kernel finds out a machine that has vanished. A worker alone may not: NCCL waits for its peers for ever.
    """

    def __init__(self, connections: Mapping[int, socket.socket], names: Sequence[str]) -> None:
        self.running = set(connections)  # the nodes that have not said that their part is done
        self._names = names
        self._unread = dict.fromkeys(connections, b"")
        self._selector = selectors.DefaultSelector()
        for node, connection in connections.items():
            connection.settimeout(5.0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 6)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(connection, selectors.EVENT_READ, node)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._selector.get_map().values()):
            self._hang_up(key.fileobj)
        self._selector.close()

    def __bool__(self) -> bool:
        """Whether there ever was another node."""
        return bool(self._names)

    def tell(self, message: dict[str, Any], but: int | None = None) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data != but:
                with suppress(OSError):  # it is gone, as `hear` will find
                    send(key.fileobj, message)  # type: ignore[arg-type]

    def hear(self, timeout_s: float) -> list[dict[str, Any]]:
        """The signals and failures of other nodes; waits for them if there are none."""
        heard = []
        for key, _ in self._selector.select(timeout_s):
            for message in self._read(key.fileobj, key.data):
                if message == {"done": True}:
                    self.running.discard(key.data)
                else:
                    heard.append(message)
                    self.tell(message, but=key.data)
        return heard

    def _read(self, connection: Any, node: int) -> list[dict[str, Any]]:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if data:
            *lines, self._unread[node] = (self._unread[node] + data).split(b"\n")
            return [json.loads(line) for line in lines]
        self._hang_up(connection)
        if node not in self.running:
            return []
        self.running.discard(node)
        words = f"node {node} ({self._names[node]}) is gone: its launcher was killed, or its machine or network failed"
        return [{"failure": Failure(EXIT_FAILED, words, lost_node=node)._asdict()}]

    def _hang_up(self, connection: Any) -> None:
        self._selector.unregister(connection)
        connection.close()


# The workers


class Worker(NamedTuple):
    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None: the terminal


def run_workers(argv: Sequence[str], layout: Layout, cluster: Cluster, peers: Peers) -> int:
    """Start this node's workers, pass signals on to them, and return the job's exit code."""
    received_signals: list[int] = []
    handle_signals(lambda signum, frame: received_signals.append(signum))
    workers: list[Worker] = []
    try:
        for local_rank in range(layout.num_local):
            workers.append(start_worker(argv, layout, cluster, local_rank))
        return supervise(workers, layout, cluster, peers, received_signals)
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
        "PYTHONUNBUFFERED": "1",  # a worker that is killed should leave its last words
    }
    # Each worker would else take every core, and N of them slow one another down.
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores_a_worker(layout))))
    if layout.num_gpus:
        # Counted among the visible cards: srun may show a task all of the machine's, or its own alone.
        environ["FLAGS_selected_gpus"] = str(number % layout.num_gpus)
    else:
        environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        # Without it gloo takes the address of the machine's name: none, perhaps, or 127.0.1.1.
        interface = interface_of(all_endpoints[rank].partition(":")[0])
        if interface:
            environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # srun brings the terminals of all tasks together; else each node has its own.
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


def cores_a_worker(layout: Layout) -> int:
    num_cores = len(os.sched_getaffinity(0)) // layout.num_local
    if layout.task and layout.task.is_one_worker:  # bound to its own cores, or to those of all tasks here
        num_on_node = positive_int(os.environ, "SLURM_CPUS_ON_NODE", default=os.cpu_count() or 1)
        num_cores = min(num_cores, num_on_node // layout.task.num_local)
    return num_cores


def interface_of(address: str) -> str | None:
    """The network interface whose first address this is (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the launcher dies, even by SIGKILL (prctl(2))."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(
    workers: list[Worker], layout: Layout, cluster: Cluster, peers: Peers, received_signals: list[int]
) -> int:
    """Wait for all workers and the other nodes, whatever comes; `received_signals` is what a signal handler fills.

    A failure here ends the other nodes' workers too, and theirs ours.
    """
    running = list(workers)
    own_codes: dict[int, int] = {}  # exit codes of the ranks that were not ended by us
    failure: Failure | None = None
    forwarded: set[int] = set()
    last_forwarded, deadline = float("-inf"), float("inf")
    ending = [signal.SIGKILL, signal.SIGTERM]
    is_done = False
    while running or (failure is None and peers.running):
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
            own_codes[worker.rank] = code
            # A worker that ends with 0 or 75 may be first by any length of time: the others still save.
            if code not in (0, EXIT_STOPPED):
                own = describe(worker, code, cluster)
                failures.append(own)
                peers.tell({"failure": own._asdict()})
        for candidate in failures:
            failure = likelier_cause(failure, candidate)
        if failure and deadline == float("inf"):
            deadline = time.monotonic() + FAILURE_GRACE_S
        if running and time.monotonic() > deadline and ending:
            signum = ending.pop()
            deadline = time.monotonic() + FAILURE_GRACE_S
            for worker in running:
                worker.process.send_signal(signum)
        if not running and not failure and not is_done:
            is_done = True
            peers.tell({"done": True})

    if failure is None:
        return max(own_codes.values())
    if -failure.code in forwarded:  # before it could listen for the signal, so that nothing was left to save
        return EXIT_STOPPED if -failure.code in (signal.SIGTERM, signal.SIGINT) else 128 - failure.code
    is_shown = failure.code == EXIT_USER_MISTAKE and any(
        worker.log is None and own_codes.get(worker.rank) == EXIT_USER_MISTAKE for worker in workers
    )  # by a rank that has made the same mistake and has the terminal
    if (layout.task is None or cluster.node == 0 or failure.lost_node == 0) and not is_shown:
        say(failure.words)
        if failure.tail:
            print(failure.tail, file=sys.stderr, flush=True)
    return EXIT_USER_MISTAKE if failure.code == EXIT_USER_MISTAKE else EXIT_FAILED


def likelier_cause(known: Failure | None, other: Failure) -> Failure:
    """The first failure, except that a rank may fail of another's end before that is known."""
    return other if known is None or (other.is_a_cause and not known.is_a_cause) else known


def describe(worker: Worker, code: int, cluster: Cluster) -> Failure:
    """A worker's end, for all nodes' terminals."""
    who = f"rank {worker.rank}" + (f" on {cluster.names[cluster.node]}" if len(cluster.names) > 1 else "")
    if code < 0:
        words = f"{who} was killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    else:
        words = f"{who} failed with exit code {code}"
    lines = worker.log.read_text(errors="replace").splitlines() if worker.log else []
    if not worker.log or not lines:
        return Failure(code, words)
    tail = "\n".join(lines[-1 if code == EXIT_USER_MISTAKE else -TAIL_LINES :])
    return Failure(code, f"{words}; the end of {worker.log.resolve()}:", tail)


if __name__ == "__main__":
    sys.exit(main())
