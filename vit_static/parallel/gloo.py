"""Collectives over gloo, with which Paddle 3.3.1 runs its auto-parallel static program on CPU processes.

`install` is called before the process group is started, and only on CPUs with several processes. On GPUs, Paddle's own
NCCL collectives run unchanged.
"""

from __future__ import annotations

import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import pir
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.auto_parallel.static import process_group
from paddle.static import MetaTensor
from paddle.static.python_op import register_op

from vit_static.common.text import say
from vit_static.parallel.gloo_timeout import set_gloo_timeouts
from vit_static.parallel.rank_watch import waiting_for_ranks

STORE_TIMEOUT_S = 900
_GROUP_TIMEOUT_S = 7 * 86_400  # the limit that applies is parallel.collective_timeout_s: see rank_watch.py


@dataclass
class Traffic:
    """Collectives of one kind that this rank has executed, and the bytes that it put into them."""

    num_calls: int = 0
    num_bytes: int = 0


traffic: defaultdict[str, Traffic] = defaultdict(Traffic)  # by kind; what a plan predicts can be compared with it
seconds_spent = 0.0  # in all collectives, including the wait for other ranks

_stores: list[Any] = []  # kept until the process ends, since a store closes its sockets when it is destroyed
_num_stores: Counter[str] = Counter()  # by the ranks of the group
_groups: dict[int, Any] = {}  # by ring
_has_new_groups = False  # whose time limit is still gloo's
_senders: dict[int, ThreadPoolExecutor] = {}  # by ring
_paddle_reshard: Any = None  # set by `install`


def install() -> None:
    """Make process groups, barriers and resharding of Paddle's auto-parallel engine work over gloo."""
    global _paddle_reshard
    if _paddle_reshard is not None:
        return
    _paddle_reshard = core.reshard
    process_group.ProcessGroup.instantiate = _instantiate
    paddle._legacy_C_ops.barrier = _barrier
    core.reshard = _reshard


# Groups


def _instantiate(self: Any) -> None:
    """Create a gloo group. Replaces `ProcessGroup.instantiate`, which fails without a GPU ('No CUDA device found')."""
    global _has_new_groups
    if self._is_instantiate:
        return
    rank = dist.get_rank()
    if self.id != 0 and self.nranks >= 2 and rank in self.ranks:
        store = _group_store(self.ranks, rank)
        _groups[self.id] = core.ProcessGroupGloo.create(store, self.local_rank(rank), self.nranks, self.id)
        _has_new_groups = True
    self._is_instantiate = True


def unlimit_groups() -> None:
    """Let the operations of new groups wait for a late rank longer than gloo's 30 s."""
    global _has_new_groups
    _has_new_groups = False
    if not set_gloo_timeouts(_GROUP_TIMEOUT_S):
        say("note: in this build of Paddle, ranks on CPUs wait only 30 s for another one (parallel/gloo_timeout.py)")


def _group_store(ranks: list[int], rank: int) -> Any:
    """Return a key-value store for one group. Gloo's keys don't name the group, so two groups in one store collide.

    The first rank of the group serves the store on a free port, which it publishes in the global store.
    """
    members = "_".join(map(str, ranks))
    key = f"vit_static/{members}/{_num_stores[members]}"
    _num_stores[members] += 1
    global_store = core.create_or_get_global_tcp_store()
    host = collective._get_global_env().trainer_endpoints[ranks[0]].split(":")[0]
    if rank == ranks[0]:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        # The number of processes is 1, so that this doesn't wait for the others.
        store = core.TCPStore(host, port, True, 1, STORE_TIMEOUT_S)
        global_store.set(key, str(port))
    else:
        port = int(bytes(global_store.get(key)).decode())  # waits for the key
        store = core.TCPStore(host, port, False, 1, STORE_TIMEOUT_S)
    _stores.append(store)
    return store


def _barrier(*_: Any) -> None:
    """Wait for all ranks. Replaces the barrier operator, which has no CPU kernel, by the process group's barrier."""
    dist.communication.group._get_global_group().process_group.barrier(dist.get_rank()).wait()


def _reshard(tensor: Any, attributes: Any) -> Any:
    """Reshard, except for another pipeline stage's parameters: they hold no data here, and Paddle requires a GPU."""
    return _paddle_reshard(tensor, attributes) if tensor._is_initialized() else tensor


# Collectives in the compiled program
#
# Paddle's executor has one communicator per device context, and all rings of a CPU share one context: the last ring
# created silently replaces the others. So every collective is replaced by an operator that names its ring's group.


def replace_collectives(program: Any) -> None:
    """Replace Paddle's collectives, in the program that one rank executes, by the operators below."""
    replacements = {
        "pd_op.all_reduce": all_reduce,
        "pd_op.all_reduce_": all_reduce,
        "pd_op.all_gather": all_gather,
        "pd_op.reduce_scatter": reduce_scatter,
        "pd_op.send_v2": send,
        "pd_op.recv_v2": receive,
    }
    with paddle.static.program_guard(program):
        for operation in list(program.global_block().ops):
            function = replacements.get(operation.name())
            if function is not None:
                _replace(operation, function)


def _replace(operation: Any, function: Callable[..., Any]) -> None:
    attributes = operation.attrs()
    is_send, is_receive = function is send, function is receive
    pir.set_insertion_point(operation)
    result = None if is_send else operation.result(0)
    if is_receive:
        operand = paddle.full([1], 0, "float32")
        operand.get_defining_op().op_role = operation.op_role
    else:
        operand = operation.operand_source(0)
    shape, dtype = ([1], operand.dtype) if result is None else (result.shape, result.dtype)
    option = attributes["peer"] if is_send or is_receive else attributes.get("reduce_type", dist.ReduceOp.SUM)
    new_result = function(operand, tuple(shape), dtype, attributes["ring_id"], int(option))
    new_result.get_defining_op().op_role = operation.op_role
    if result is not None:
        new_result.stop_gradient = result.stop_gradient
        result.replace_all_uses_with(new_result)
    operation.erase()


def _meta(x: Any, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> MetaTensor:
    return MetaTensor(shape=list(shape), dtype=dtype)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as an operator `vit_static_NAME`, and time its execution."""

    # Spelled out instead of *args: Paddle binds constant arguments by their names.
    def timed(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
        global seconds_spent
        if _has_new_groups:
            unlimit_groups()
        started = time.perf_counter()
        with waiting_for_ranks(function.__name__):
            result: paddle.Tensor = function(x, shape, dtype, ring, option)
        seconds_spent += time.perf_counter() - started
        return result

    name = f"vit_static_{function.__name__}"
    register = register_op(name=name, infer_meta=_meta, input_names=["x"], output_names=["out"])
    return register(timed)


def _count(kind: str, x: paddle.Tensor) -> None:
    traffic[kind].num_calls += 1
    traffic[kind].num_bytes += x.size * x.element_size()


@_operator
def all_reduce(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    _count("all_reduce", x)
    group, total = _groups[ring], _to_summable(x)
    kinds = {
        dist.ReduceOp.SUM: core.ReduceOp.SUM,
        dist.ReduceOp.MAX: core.ReduceOp.MAX,
        dist.ReduceOp.MIN: core.ReduceOp.MIN,
        dist.ReduceOp.PROD: core.ReduceOp.PRODUCT,
        dist.ReduceOp.AVG: core.ReduceOp.SUM,
    }
    group.all_reduce(total, kinds[option], True).wait()
    return (total / group.size() if option == dist.ReduceOp.AVG else total).astype(x.dtype)


def _to_summable(x: paddle.Tensor) -> paddle.Tensor:
    """Copy to a dtype that gloo sums correctly: its sums of float16 and bfloat16 are wrong, without an error."""
    return x.astype("float32") if x.dtype in (paddle.float16, paddle.bfloat16) else x.clone()


@_operator
def all_gather(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    _count("all_gather", x)
    gathered = paddle.empty([x.shape[0] * _groups[ring].size(), *x.shape[1:]], x.dtype)
    _groups[ring].all_gather_into_tensor(gathered, x.contiguous(), True).wait()
    return gathered


@_operator
def reduce_scatter(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    """All-reduce, and return this rank's part: Paddle has no reduce-scatter over gloo."""
    _count("reduce_scatter", x)
    group, total = _groups[ring], _to_summable(x)
    group.all_reduce(total, core.ReduceOp.SUM, True).wait()
    size = x.shape[0] // group.size()
    part = total[group.rank() * size : (group.rank() + 1) * size]
    return (part / group.size() if option == dist.ReduceOp.AVG else part.clone()).astype(x.dtype)


@_operator
def send(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    """Send in the background, in order: waiting here for the receiver would block the 1F1B schedule."""
    _count("send", x)
    thread = _senders.setdefault(ring, ThreadPoolExecutor(1))
    copy = x.clone()
    thread.submit(lambda: _groups[ring].send(copy, option, True).wait())
    return paddle.zeros([1], x.dtype)


@_operator
def receive(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    received = paddle.empty(list(shape), dtype)
    _groups[ring].recv(received, option, True).wait()
    _count("receive", received)
    return received
