"""What Paddle 3.3.1 lacks to run its auto-parallel static program on CPU processes: collectives over gloo.

`install` is called before the process group is started, on CPUs with more than one process alone; on cards
Paddle's own NCCL path runs untouched.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.auto_parallel.static import process_group

STORE_TIMEOUT_S = 900

_stores: list[Any] = []  # held for the life of the process: a store's end closes its sockets
_num_stores: Counter[str] = Counter()
_groups: dict[int, Any] = {}


def install() -> None:
    """Makes groups, barriers and the auto-parallel engine's communicators work over gloo."""
    process_group.ProcessGroup.instantiate = _instantiate
    paddle._legacy_C_ops.barrier = _barrier
    # `dist.load_state_dict` stages every tensor through `.cuda()`, on builds without CUDA too.
    if not paddle.is_compiled_with_cuda():
        paddle.Tensor.cuda = lambda self, *args, **kwargs: self


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


def _barrier(*_: Any) -> None:
    """The barrier operator has no CPU kernel; the process group has one."""
    dist.communication.group._get_global_group().process_group.barrier(dist.get_rank()).wait()
