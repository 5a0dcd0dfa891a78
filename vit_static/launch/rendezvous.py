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

from vit_static.common.errors import EXIT_FAILED, EXIT_UNANSWERED, EXIT_USER_MISTAKE, os_reason
from vit_static.launch.slurm import SlurmTask
from vit_static.launch.topology import Layout

POLL_S = 0.05
RENDEZVOUS_TIMEOUT_S = 900.0


class RestartState(NamedTuple):
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
    # Merged over all nodes, since the new launcher of a lost node doesn't know them.
    num_restarts: int
    has_saved: bool


class Failure(NamedTuple):
    """The reason why the job failed, for the terminal of any node."""

    code: int  # a worker's exit code, negative for a signal
    message: str
    log: str = ""  # path of the worker's log
    tail: str = ""  # the last lines of the log
    lost_node: int | None = None

    @property
    def is_root_cause(self) -> bool:
        """Return whether no failure of another rank can have caused this one."""
        return self.code in (-signal.SIGKILL, EXIT_UNANSWERED, EXIT_USER_MISTAKE) or self.lost_node is not None


def meet(layout: Layout, master: str, node_timeout_s: float, restart_state: RestartState) -> tuple[Cluster, Peers]:
    """Connect to the launchers of all nodes through the launcher of node 0, which listens at `master`.

    Under Slurm the number of the task is the number of the node. Otherwise every node runs the same command, and none
    knows its number: the node that can listen at the address becomes node 0, and the others are numbered in the order
    in which they connect. Raise ValueError if the address is invalid, and TimeoutError if a node doesn't connect.
    """
    with ExitStack() as open_sockets:
        ports = []
        for _ in range(layout.num_local + 1):  # all stay open until the last is chosen, so that they differ
            probe = open_sockets.enter_context(socket.create_server(("", 0)))
            ports.append(probe.getsockname()[1])
    if layout.num_nodes == 1:
        endpoints = [[f"127.0.0.1:{port}" for port in ports[1:]]]
        name = socket.gethostname()
        store, log = f"127.0.0.1:{ports[0]}", log_name(restart_state)
        return Cluster(0, store, endpoints, [name], log, *restart_state), Peers({}, [])

    master = layout.task.master if layout.task else master
    host, _, digits = master.rpartition(":")
    if not host or not digits.isdecimal() or not 0 < int(digits) < 1 << 16:
        raise ValueError(f"{layout.num_nodes} nodes need PADDLE_MASTER=IP:PORT of one of them, not '{master}'")
    port = int(digits)
    try:
        socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(
            f"PADDLE_MASTER={master}: {os_reason(error)}; set it to an IP address of one of the nodes"
        ) from None
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while True:
        server = listen(layout.task, host, port)
        if server:
            with server:
                return gather(server, layout, ports, deadline, node_timeout_s, restart_state)
        joined = join(host, port, layout, ports, node_timeout_s, restart_state)
        if joined:
            return joined
        wait_for_others(deadline, f"no answer from {'task 0' if layout.task else 'PADDLE_MASTER'} at {master}")


def listen(task: SlurmTask | None, host: str, port: int) -> socket.socket | None:
    """Return the server socket of node 0; None on any other node."""
    if task and task.number > 0:
        return None
    try:
        # Under Slurm, listen on all addresses: a machine may resolve its own name to 127.0.1.1, unreachable to others.
        return socket.create_server(("", port) if task and host != "127.0.0.1" else (host, port))
    except OSError as error:  # not this machine's address, or in use by another node on this machine
        if task:
            raise ValueError(f"port {port}: {os_reason(error)}; set PADDLE_MASTER={host}:PORT") from None
        return None


def gather(
    server: socket.socket,
    layout: Layout,
    ports: list[int],
    deadline: float,
    node_timeout_s: float,
    restart_state: RestartState,
) -> tuple[Cluster, Peers]:
    """Receive the ports of every other node, then send each its number and the endpoints of all (on node 0)."""
    server.settimeout(1.0)
    joined_nodes: dict[int, tuple[socket.socket, str, dict[str, Any]]] = {}
    while len(joined_nodes) < layout.num_nodes - 1:
        try:
            peer, (peer_host, _) = server.accept()
            set_keepalive(peer, node_timeout_s)
            peer.settimeout(10.0)
            hello = receive(peer)
            for node in [node for node, (other, _, _) in joined_nodes.items() if has_disconnected(other)]:
                joined_nodes.pop(node)[0].close()  # it stopped waiting, and the new connection may be its restart
            node = int(hello["node"] or next(node for node in range(1, layout.num_nodes) if node not in joined_nodes))
            is_valid = (
                hello["job"] == job_id(layout) and {"ports", "name", "num_nodes", *RestartState._fields} <= hello.keys()
            )
        except (OSError, ValueError, KeyError, TypeError):  # no connection yet, or not from a launcher of this job
            is_valid = False
        if not is_valid:
            progress = f"{len(joined_nodes) + 1} of {layout.num_nodes} {'tasks' if layout.task else 'nodes'} connected"
            wait_for_others(deadline, progress)
            continue
        if hello["num_nodes"] != layout.num_nodes:
            raise ValueError(f"PADDLE_NNODES is {layout.num_nodes} here and {hello['num_nodes']} on {hello['name']}")
        joined_nodes[node] = peer, peer_host, hello

    # Use the address at which other machines reach node 0; nodes on the same machine may have used the loopback one.
    own_addresses = [peer.getsockname()[0] for peer, _, _ in joined_nodes.values()]
    own_host = next((address for address in own_addresses if not is_loopback(address)), own_addresses[0])
    endpoints = [[f"{own_host}:{port}" for port in ports[1:]]]
    names = [socket.gethostname()]
    for _, (_, peer_host, hello) in sorted(joined_nodes.items()):
        host = own_host if is_loopback(peer_host) else peer_host
        endpoints.append([f"{host}:{port}" for port in hello["ports"]])
        names.append(hello["name"])
    all_states = [
        restart_state,
        *(RestartState(hello["num_restarts"], hello["has_saved"]) for _, _, hello in joined_nodes.values()),
    ]
    merged = RestartState(max(state.num_restarts for state in all_states), any(state.has_saved for state in all_states))
    cluster = Cluster(0, f"{own_host}:{ports[0]}", endpoints, names, log_name(merged), *merged)
    connections = {node: peer for node, (peer, _, _) in joined_nodes.items()}
    for node, peer in connections.items():
        with suppress(OSError):  # disconnected, as `Peers.poll` will report
            send(peer, cluster._replace(node=node)._asdict())
    return cluster, Peers(connections, names)


def is_loopback(address: str) -> bool:
    """Return whether an IP address is only reachable from the same machine."""
    return ip_address(address).is_loopback


def join(
    host: str, port: int, layout: Layout, ports: list[int], node_timeout_s: float, restart_state: RestartState
) -> tuple[Cluster, Peers] | None:
    """Join the rendezvous at node 0; return None if it doesn't listen (yet)."""
    with ExitStack() as on_failure:
        try:
            connection = on_failure.enter_context(socket.create_connection((host, port), timeout=5.0))
            set_keepalive(connection, node_timeout_s)
            connection.settimeout(RENDEZVOUS_TIMEOUT_S)
            number = layout.task.number if layout.task else None
            hello = {"job": job_id(layout), "node": number, "num_nodes": layout.num_nodes, "ports": ports[1:]}
            send(connection, hello | {"name": socket.gethostname()} | restart_state._asdict())
            cluster = Cluster(**receive(connection))
        except (OSError, ValueError, TypeError):
            return None
        on_failure.pop_all()
        return cluster, Peers({0: connection}, cluster.names)


def job_id(layout: Layout) -> str | None:
    """Return the Slurm step, which distinguishes jobs that happen to use the same port."""
    return layout.task.step if layout.task else None


def log_name(restart_state: RestartState) -> str:
    """Return the name of the folder below log/ for this attempt."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return f"{name}-restart{restart_state.num_restarts}" if restart_state.num_restarts else name


def set_keepalive(connection: socket.socket, node_timeout_s: float) -> None:
    """Let the kernel end the connection if the other machine doesn't respond for `node_timeout_s` (tcp(7)).

    The first probe is sent after a third of that time. Probe times are whole seconds, so timeouts below 2 s act as 2 s.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(node_timeout_s / 3)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(node_timeout_s / 12)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1000 * node_timeout_s)))


def has_disconnected(connection: socket.socket) -> bool:
    """Return whether a peer that should be waiting for an answer has closed the connection."""
    return bool(select.select([connection], [], [], 0.0)[0])


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message as one line of JSON."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> Any:
    """Receive one message without reading into the next one."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 1 << 20:
            raise ValueError("no message")
        line += byte
    return json.loads(line)


def wait_for_others(deadline: float, problem: str) -> None:
    """Wait a moment before the next try; raise TimeoutError with the problem after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError(f"{problem} within {RENDEZVOUS_TIMEOUT_S:.0f} s; is the same command running on every node?")
    time.sleep(POLL_S)


class Peers:
    """Connections to the launchers of the other nodes. All connect to node 0, which forwards their messages.

    These connections detect a lost machine through TCP keepalive. A worker may not: NCCL waits for its peers forever.
    """

    def __init__(self, connections: Mapping[int, socket.socket], names: Sequence[str]) -> None:
        self.running = set(connections)  # the nodes that have not reported that they are done
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
            self._disconnect(key.fileobj)
        self._selector.close()

    def __bool__(self) -> bool:
        """Return whether the job has several nodes."""
        return bool(self._names)

    def broadcast(self, message: dict[str, Any], exclude: int | None = None) -> None:
        """Send a message to all connected nodes except `exclude`."""
        for key in list(self._selector.get_map().values()):
            if key.data != exclude:
                with suppress(OSError):  # disconnected, as `poll` will report
                    send(key.fileobj, message)  # type: ignore[arg-type]

    def poll(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return the signals and failures that other nodes report; wait up to `timeout_s` if there are none."""
        messages = []
        for key, _ in self._selector.select(timeout_s):
            for message in self._read(key.fileobj, key.data):
                if message == {"done": True}:
                    self.running.discard(key.data)
                else:
                    messages.append(message)
                    self.broadcast(message, exclude=key.data)
        return messages

    def _read(self, connection: Any, node: int) -> list[dict[str, Any]]:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if data:
            *lines, self._unread[node] = (self._unread[node] + data).split(b"\n")
            return [json.loads(line) for line in lines]
        self._disconnect(connection)
        if node not in self.running:
            return []
        self.running.discard(node)
        message = (
            f"node {node} ({self._names[node]}) was lost: its launcher was killed, or its machine or network failed"
        )
        return [{"failure": Failure(EXIT_FAILED, message, lost_node=node)._asdict()}]

    def _disconnect(self, connection: Any) -> None:
        self._selector.unregister(connection)
        connection.close()
