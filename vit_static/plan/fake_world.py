"""A process group that exists only by name, for compiling the programs of ranks that aren't running."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.distributed import collective
from paddle.distributed.auto_parallel.static import engine, helper, process_group


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Build programs as this rank of a world of `world_size` within the context.

    Nothing is connected, and nothing can be run.
    """
    endpoints = [f"127.0.0.1:{6170 + other}" for other in range(world_size)]
    fake_environ = {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(world_size),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
    }
    previous = {name: os.environ.get(name) for name in fake_environ}
    instantiate, initialize = process_group.ProcessGroup.instantiate, engine.Engine._initialize
    init_parameters = helper.ProgramHelper.init_pir
    try:
        os.environ.update(fake_environ)
        collective._global_env, dist.parallel._global_parallel_env = None, None
        process_group.ProcessGroup.instantiate = lambda self: None
        engine.Engine._initialize = _without_parameters
        helper.ProgramHelper.init_pir = lambda *_: None
        yield
    finally:
        process_group.ProcessGroup.instantiate = instantiate
        engine.Engine._initialize = initialize
        helper.ProgramHelper.init_pir = init_parameters
        process_group.clear_all_process_groups()
        collective._global_env, dist.parallel._global_parallel_env = None, None
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _without_parameters(self: Any, mode: str, init_parameters: bool = True) -> None:
    self._place = paddle.CPUPlace()
