"""What Paddle 3.3.1 lacks to run its auto-parallel static program on CPU processes: collectives over gloo.

`install` is called before the process group is started, on CPUs with more than one process alone; on cards
Paddle's own NCCL path runs untouched.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import pir
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.auto_parallel.static import process_group
from paddle.static import MetaTensor
from paddle.static.python_op import register_op

STORE_TIMEOUT_S = 900

_stores: list[Any] = []  # held for the life of the process: a store's end closes its sockets
_num_stores: Counter[str] = Counter()
_groups: dict[int, Any] = {}  # by ring
_senders: dict[int, ThreadPoolExecutor] = {}
_members_of_new_group: list[list[int]] = []
_paddles: dict[str, Any] = {}  # what `install` has replaced
moved_bytes: Counter[tuple[str, int]] = Counter()  # by kind and ring: what this rank has put into collectives
num_calls: Counter[tuple[str, int]] = Counter()
seconds_spent = 0.0  # in all of them, waiting for the others included


def install() -> None:
    """Makes groups, barriers and the auto-parallel engine's communicators work over gloo."""
    if _paddles:
        return
    _paddles["reshard"] = core.reshard
    _paddles["new_group"] = collective.new_group
    _paddles["_new_process_group_impl"] = collective._new_process_group_impl
    process_group.ProcessGroup.instantiate = _instantiate
    paddle._legacy_C_ops.barrier = _barrier
    core.reshard = _reshard  # type: ignore[assignment]
    collective._new_process_group_impl = _new_process_group
    collective.new_group = dist.new_group = _new_group
    # `dist.load_state_dict` stages every tensor through `.cuda()`, on builds without CUDA too.
    if not paddle.is_compiled_with_cuda():
        paddle.Tensor.cuda = lambda self, *args, **kwargs: self


# -- groups ----------------------------------------------------------------------------------------------------------


def _instantiate(self: Any) -> None:
    """`ProcessGroup.instantiate` knows only accelerators ('No CUDA device found'): a gloo group instead."""
    if self._is_instantiate:
        return
    rank = dist.get_rank()
    if self.id != 0 and self.nranks >= 2 and rank in self.ranks:
        store = _group_store(self.ranks, rank)
        _groups[self.id] = core.ProcessGroupGloo.create(store, self.local_rank(rank), self.nranks, self.id)
    self._is_instantiate = True


def _group_store(ranks: list[int], rank: int) -> Any:
    """A key-value store of the group's own: gloo's keys carry no group, so two groups in one store collide.

    The group's first rank serves it on a free port, which it publishes in the global store.
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
        # For one process, that is: without waiting here for the others.
        store = core.TCPStore(host, port, True, 1, STORE_TIMEOUT_S)
        global_store.set(key, str(port))
    else:
        port = int(bytes(global_store.get(key)).decode())  # waits for the key
        store = core.TCPStore(host, port, False, 1, STORE_TIMEOUT_S)
    _stores.append(store)
    return store


def _new_group(ranks: list[int] | None = None, *arguments: Any, **options: Any) -> Any:
    """`dist.new_group`, which checkpoints use, with a store of the group's own."""
    members = sorted(ranks) if ranks is not None else list(range(dist.get_world_size()))
    _members_of_new_group.append(members)
    try:
        return _paddles["new_group"](ranks, *arguments, **options)
    finally:
        _members_of_new_group.pop()


def _new_process_group(backend: str, store: Any, rank: int, *arguments: Any, group_id: int = 0, **options: Any) -> Any:
    if backend == "gloo" and group_id != 0:
        members = _members_of_new_group[-1]
        store = _group_store(members, members[rank])
    return _paddles["_new_process_group_impl"](backend, store, rank, *arguments, group_id=group_id, **options)


def _barrier(*_: Any) -> None:
    """The barrier operator has no CPU kernel; the process group has one."""
    dist.communication.group._get_global_group().process_group.barrier(dist.get_rank()).wait()


def _reshard(tensor: Any, attributes: Any) -> Any:
    """Parameters of another pipeline stage hold nothing here; Paddle's would ask for a GPU to put nothing on."""
    return _paddles["reshard"](tensor, attributes) if tensor._is_initialized() else tensor


# -- collectives in the compiled program -----------------------------------------------------------------------------
#
# The executor keeps one communicator in the one CPU device context, and the last ring built wins, without an error: so
# every collective is replaced by an operator of ours that names its ring's group.


def replace_collectives(program: Any) -> None:
    """Puts our operators in the place of Paddle's collectives, in a program as one rank executes it."""
    replacing = {
        "pd_op.all_reduce": all_reduce,
        "pd_op.all_reduce_": all_reduce,
        "pd_op.all_gather": all_gather,
        "pd_op.reduce_scatter": reduce_scatter,
        "pd_op.send_v2": send,
        "pd_op.recv_v2": receive,
    }
    with paddle.static.program_guard(program):
        for operation in list(program.global_block().ops):
            function = replacing.get(operation.name())
            if function is not None:
                _replace(operation, function)


def _replace(operation: Any, function: Callable[..., Any]) -> None:
    attributes = operation.attrs()
    is_send, is_receive = function is send, function is receive
    pir.set_insertion_point(operation)
    result = None if is_send else operation.result(0)
    if is_receive:
        given = paddle.full([1], 0, "float32")
        given.get_defining_op().op_role = operation.op_role
    else:
        given = operation.operand_source(0)
    shape, dtype = ([1], given.dtype) if result is None else (result.shape, result.dtype)
    option = attributes["peer"] if is_send or is_receive else attributes.get("reduce_type", dist.ReduceOp.SUM)
    made = function(given, tuple(shape), dtype, attributes["ring_id"], int(option))
    made.get_defining_op().op_role = operation.op_role
    if result is not None:
        made.stop_gradient = result.stop_gradient
        result.replace_all_uses_with(made)
    operation.erase()


def _meta(x: Any, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> MetaTensor:
    return MetaTensor(shape=list(shape), dtype=dtype)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    # Its parameters by name: Paddle binds the constant ones.
    def timed(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
        global seconds_spent
        started = time.perf_counter()
        result: paddle.Tensor = function(x, shape, dtype, ring, option)
        seconds_spent += time.perf_counter() - started
        return result

    name = f"vit_static_{function.__name__}"
    register = register_op(name=name, infer_meta=_meta, input_names=["x"], output_names=["out"])
    return register(timed)


def _count(kind: str, ring: int, x: paddle.Tensor) -> None:
    moved_bytes[kind, ring] += x.size * x.element_size()
    num_calls[kind, ring] += 1


@_operator
def all_reduce(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    _count("all_reduce", ring, x)
    group, total = _groups[ring], _summable(x)
    kinds = {
        dist.ReduceOp.SUM: core.ReduceOp.SUM,
        dist.ReduceOp.MAX: core.ReduceOp.MAX,
        dist.ReduceOp.MIN: core.ReduceOp.MIN,
        dist.ReduceOp.PROD: core.ReduceOp.PRODUCT,
        dist.ReduceOp.AVG: core.ReduceOp.SUM,
    }
    group.all_reduce(total, kinds[option], True).wait()
    return (total / group.size() if option == dist.ReduceOp.AVG else total).astype(x.dtype)


def _summable(x: paddle.Tensor) -> paddle.Tensor:
    """A copy that gloo adds up rightly: of float16 and bfloat16 it makes infinities and wrong sums, silently."""
    return x.astype("float32") if x.dtype in (paddle.float16, paddle.bfloat16) else x.clone()


@_operator
def all_gather(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    _count("all_gather", ring, x)
    gathered = paddle.empty([x.shape[0] * _groups[ring].size(), *x.shape[1:]], x.dtype)
    _groups[ring].all_gather_into_tensor(gathered, x.contiguous(), True).wait()
    return gathered


@_operator
def reduce_scatter(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    """By an all-reduce of which the own part is kept: gloo has no reduce-scatter in Paddle."""
    _count("reduce_scatter", ring, x)
    group, total = _groups[ring], _summable(x)
    group.all_reduce(total, core.ReduceOp.SUM, True).wait()
    size = x.shape[0] // group.size()
    part = total[group.rank() * size : (group.rank() + 1) * size]
    return (part / group.size() if option == dist.ReduceOp.AVG else part.clone()).astype(x.dtype)


@_operator
def send(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    """On a thread of the ring's own, which keeps the order: a send that waits for its receiver would stop 1F1B."""
    _count("send", ring, x)
    thread = _senders.setdefault(ring, ThreadPoolExecutor(1))
    copy = x.clone()
    thread.submit(lambda: _groups[ring].send(copy, option, True).wait())
    return paddle.zeros([1], x.dtype)


@_operator
def receive(x: paddle.Tensor, shape: tuple[int, ...], dtype: Any, ring: int, option: int) -> paddle.Tensor:
    received = paddle.empty(list(shape), dtype)
    _groups[ring].recv(received, option, True).wait()
    _count("receive", ring, received)
    return received
