"""Rendezvous of the nodes' launchers, and the connections between them until the job ends."""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from typing import Any, NamedTuple

from vit_static.common.errors import EXIT_FAILED, EXIT_USER_MISTAKE
from vit_static.launch.slurm import SlurmTask
from vit_static.launch.topology import Layout

POLL_S = 0.05
RENDEZVOUS_TIMEOUT_S = 900.0


class Earlier(NamedTuple):
    """The state of earlier attempts, with which a launcher joins the rendezvous."""

    num_restarts: int
    has_saved: bool  # a checkpoint has been written since the launch


class Cluster(NamedTuple):
    """The result of the rendezvous, on which all nodes agree."""

    node: int
    store: str  # host:port where rank 0 will serve Paddle's TCPStore
    endpoints: list[list[str]]  # [node][local rank], host:port
    names: list[str]  # [node]
    log: str  # name of the folder below log/
    # Of all nodes: the new launcher of a lost node doesn't know them.
    num_restarts: int
    has_saved: bool


class Failure(NamedTuple):
    """Why the job failed, for the terminal of any node."""

    code: int  # a worker's exit code, negative for a signal
    message: str
    log: str = ""  # the worker's
    tail: str = ""  # of the log
    lost_node: int | None = None

    @property
    def is_root_cause(self) -> bool:
        """Whether no failure of another rank can have caused it."""
        return self.code in (-signal.SIGKILL, EXIT_USER_MISTAKE) or self.lost_node is not None


def meet(layout: Layout, master: str, node_timeout_s: float, earlier: Earlier) -> tuple[Cluster, Peers]:
    """Agree with the other nodes' launchers, through node 0's, which listens at `master`.

    Under Slurm a task's number is its node's. Else every node runs the same command, so none knows its number: who can
    listen on the address is node 0, the others are numbered as they come. Raises ValueError for an address that is
    none, and TimeoutError where not all come.
    """
    with ExitStack() as open_sockets:
        ports = []
        for _ in range(layout.num_local + 1):  # all held until the last is found, so that they differ
            probe = open_sockets.enter_context(socket.create_server(("", 0)))
            ports.append(probe.getsockname()[1])
    if layout.num_nodes == 1:
        endpoints = [[f"127.0.0.1:{port}" for port in ports[1:]]]
        name = socket.gethostname()
        return Cluster(0, f"127.0.0.1:{ports[0]}", endpoints, [name], log_name(earlier), *earlier), Peers({}, [])

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
                return gather(server, layout, ports, deadline, node_timeout_s, earlier)
        joined = join(host, port, layout, ports, node_timeout_s, earlier)
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


def gather(
    server: socket.socket, layout: Layout, ports: list[int], deadline: float, node_timeout_s: float, earlier: Earlier
) -> tuple[Cluster, Peers]:
    """Node 0: hear every other node's ports, then tell each its number and everyone's endpoints."""
    server.settimeout(1.0)
    arrived: dict[int, tuple[socket.socket, str, dict[str, Any]]] = {}
    while len(arrived) < layout.num_nodes - 1:
        try:
            peer, (peer_host, _) = server.accept()
            notice_silence(peer, node_timeout_s)
            peer.settimeout(10.0)
            hello = receive(peer)
            for node in [node for node, (other, _, _) in arrived.items() if has_hung_up(other)]:
                arrived.pop(node)[0].close()  # stopped while it waited; it may be the one that comes now
            node = int(hello["node"] or next(node for node in range(1, layout.num_nodes) if node not in arrived))
            is_ours = (
                hello["job"] == job_of(layout) and {"ports", "name", "num_nodes", *Earlier._fields} <= hello.keys()
            )
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
    all_earlier = [earlier, *(Earlier(hello["num_restarts"], hello["has_saved"]) for _, _, hello in arrived.values())]
    merged = Earlier(max(each.num_restarts for each in all_earlier), any(each.has_saved for each in all_earlier))
    cluster = Cluster(0, f"{own_host}:{ports[0]}", endpoints, names, log_name(merged), *merged)
    connections = {node: peer for node, (peer, _, _) in arrived.items()}
    for node, peer in connections.items():
        with suppress(OSError):  # it is gone, as will be heard
            send(peer, cluster._replace(node=node)._asdict())
    return cluster, Peers(connections, names)


def is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def join(
    host: str, port: int, layout: Layout, ports: list[int], node_timeout_s: float, earlier: Earlier
) -> tuple[Cluster, Peers] | None:
    """Another node: None where node 0 does not listen (yet)."""
    with ExitStack() as on_failure:
        try:
            connection = on_failure.enter_context(socket.create_connection((host, port), timeout=5.0))
            notice_silence(connection, node_timeout_s)
            connection.settimeout(RENDEZVOUS_TIMEOUT_S)
            number = layout.task.number if layout.task else None
            hello = {"job": job_of(layout), "node": number, "num_nodes": layout.num_nodes, "ports": ports[1:]}
            send(connection, hello | {"name": socket.gethostname()} | earlier._asdict())
            cluster = Cluster(**receive(connection))
        except (OSError, ValueError, TypeError):
            return None
        on_failure.pop_all()
        return cluster, Peers({0: connection}, cluster.names)


def job_of(layout: Layout) -> str | None:
    """Return the Slurm step, which distinguishes jobs that happen to use the same port."""
    return layout.task.step if layout.task else None


def log_name(earlier: Earlier) -> str:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return f"{name}-restart{earlier.num_restarts}" if earlier.num_restarts else name


def notice_silence(connection: socket.socket, node_timeout_s: float) -> None:
    """Have the kernel end a connection whose other machine has answered nothing for so long (tcp(7)).

    It asks from a third of the time on, in whole seconds, so that less than 2 s are as good as 2 s.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(node_timeout_s / 3)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(node_timeout_s / 12)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1000 * node_timeout_s)))


def has_hung_up(connection: socket.socket) -> bool:
    """Whether the peer, which should be waiting for an answer, has closed the connection."""
    return bool(select.select([connection], [], [], 0.0)[0])


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> Any:
    """Receive one message, and no byte of the next."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 1 << 20:
            raise ValueError("no message")
        line += byte
    return json.loads(line)


def wait_for_others(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{problem} within {RENDEZVOUS_TIMEOUT_S:.0f} s; is the same command running on every node?")
    time.sleep(POLL_S)


class Peers:
    """The other nodes' launchers: node 0 is connected with all of them, and passes on what it hears; they with it.

    The kernel detects a machine that has vanished. A worker may not: NCCL waits for its peers forever.
    """

    def __init__(self, connections: Mapping[int, socket.socket], names: Sequence[str]) -> None:
        self.running = set(connections)  # the nodes that have not said that their part is done
        self._names = names
        self._unread = dict.fromkeys(connections, b"")
        self._selector = selectors.DefaultSelector()
        for node, connection in connections.items():
            connection.settimeout(5.0)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(connection, selectors.EVENT_READ, node)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._selector.get_map().values()):
            self._hang_up(key.fileobj)
        self._selector.close()

    def __bool__(self) -> bool:
        """Whether the job has several nodes."""
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
        message = (
            f"node {node} ({self._names[node]}) is gone: its launcher was killed, or its machine or network failed"
        )
        return [{"failure": Failure(EXIT_FAILED, message, lost_node=node)._asdict()}]

    def _hang_up(self, connection: Any) -> None:
        self._selector.unregister(connection)
        connection.close()
