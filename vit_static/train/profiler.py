"""Traces of some steps of a run, for Chrome's and Perfetto's viewers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import paddle

from vit_static.common.errors import describe_error
from vit_static.parallel.mesh import Mesh


class StepTrace:
    """Runs Paddle's profiler over `steps` = (first, last), both included and counted from 1; None: never.

    The trace holds the program's operators, on GPUs its kernels (CUPTI; not run), and the loop's own spans. It ends
    when the step after the last begins, so it includes an evaluation or a save that lies between them.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, mesh: Mesh, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._mesh, self._say = steps, folder, mesh, say
        self._profiler: Any = None
        self._first = self._last = 0

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Mark a step, and start or end the trace."""
        if self._steps is not None:
            first, last = self._steps
            if number > last:
                self.close()
            elif number >= first and self._profiler is None:
                self._start(number)
        with self.span(f"step {number}"):
            yield
        self._last = number

    def span(self, name: str) -> AbstractContextManager[Any]:
        """Mark a part of the loop by its name."""
        return nullcontext() if self._profiler is None else paddle.profiler.RecordEvent(name)

    def close(self) -> None:
        """End the trace, if one was started, write it and print its path."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if self._mesh.device == "gpu":
            paddle.device.synchronize()
        profiler.stop()
        rank_suffix = f"_rank_{self._mesh.rank}" if self._mesh.world_size > 1 else ""
        path = self._folder / f"trace_steps_{self._first}_{self._last}{rank_suffix}.json"
        try:
            profiler.export(str(path), "json")
        except Exception as error:  # Paddle's own errors too; a trace must not end the run
            self._say(f"{path} could not be written: {describe_error(error)}")
            return
        self._say(f"wrote {path}: a trace of those steps; open it with chrome://tracing or ui.perfetto.dev")

    def _start(self, number: int) -> None:
        targets = [paddle.profiler.ProfilerTarget.CPU]
        if self._mesh.device == "gpu":
            targets.append(paddle.profiler.ProfilerTarget.GPU)
        self._first = number
        # The default handler of a finished trace would write it into a folder of its own.
        self._profiler = paddle.profiler.Profiler(targets=targets, on_trace_ready=lambda finished: None)
        self._profiler.start()
