"""Formation of batches from single inputs, in a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np


class Batcher:
    """Thread that runs a function on batches of submitted inputs.

    A batch runs when it has `batch_size` inputs, or when its first input has waited for `max_wait_s`. Cancelled inputs
    are left out.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], batch_size: int, max_wait_s: float) -> None:
        self._run, self._batch_size, self._max_wait_s = run, batch_size, max_wait_s
        self._queue: queue.SimpleQueue[tuple[float, np.ndarray, Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, row: np.ndarray) -> Future[np.ndarray]:
        """Queue an input [1, ...]; the future gives its row of the function's result."""
        future: Future[np.ndarray] = Future()
        self._queue.put((time.monotonic(), row, future))
        return future

    def is_alive(self) -> bool:
        """Return whether the thread is running."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Run all queued inputs and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, is_last = [first], False
            while len(batch) < self._batch_size and not is_last:
                try:
                    remaining_s = first[0] + self._max_wait_s - time.monotonic()
                    following = self._queue.get(timeout=remaining_s) if remaining_s > 0.0 else self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    is_last = True
                else:
                    batch.append(following)
            self._run_batch([(row, future) for _, row, future in batch if future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _run_batch(self, batch: list[tuple[np.ndarray, Future[np.ndarray]]]) -> None:
        if not batch:
            return
        try:
            results = self._run(np.concatenate([row for row, _ in batch]))
        except Exception as error:  # raised in the callers, because the next batch may succeed
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
