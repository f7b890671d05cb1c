"""Micro-batching without a timer: a run takes along whatever queued while the one before was busy.

Waiting for company costs its whole delay at low load and gains nothing at high load, where company
is already there. So there is one worker thread per model; a lone request goes through at once.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from edge_agent.inference.engine import Array, Engine
from shared.errors import UnfitModelError

logger = logging.getLogger(__name__)

MAX_ROWS = 64  # beyond, a larger batch delays its first request more than it helps the last


@dataclass(frozen=True, slots=True)
class _Request:
    feeds: Mapping[str, Array]
    rows: int
    shapes: tuple[tuple[int, ...], ...]  # without the batch; only equal ones go together
    future: "asyncio.Future[list[Array]]"


_Outcome = tuple[_Request, list[Array] | UnfitModelError]


class Batcher:
    """One model behind a queue. `submit` from the event loop's thread only."""

    def __init__(
        self,
        engine: Engine,
        *,
        loop: asyncio.AbstractEventLoop,
        on_run: Callable[[int], None],
        max_rows: int = MAX_ROWS,
    ) -> None:
        """Start the worker.

        Args:
            engine: the model; only the worker calls it from now on.
            loop: where results are delivered.
            on_run: told the rows of each run, on ``loop``.
            max_rows: most rows that requests are joined to; a larger request runs alone.
        """
        self._engine, self._loop, self._on_run = engine, loop, on_run
        self._max_rows = max_rows if engine.can_batch else 0
        self._queue: SimpleQueue[_Request | None] = SimpleQueue()
        self._held: deque[_Request | None] = deque()  # taken from the queue, not yet run
        self._worker = threading.Thread(target=self._work, name="inference", daemon=True)
        self._worker.start()

    def submit(self, feeds: Mapping[str, Array]) -> "asyncio.Future[list[Array]]":
        """Queue one request, its arrays shaped as the model's signature demands.

        Returns:
            All outputs in the signature's order, with as many rows as were sent; or
            UnfitModelError, if the model fails on them.
        """
        future: asyncio.Future[list[Array]] = self._loop.create_future()
        first = next(iter(feeds.values()))
        shapes = tuple(array.shape[1:] for array in feeds.values())
        rows = first.shape[0] if first.ndim else 1
        self._queue.put(_Request(feeds, rows, shapes, future))
        return future

    def end(self) -> threading.Thread:
        """Return the worker, which answers everything that is queued and then ends."""
        self._queue.put(None)
        return self._worker

    def close(self) -> None:
        """End the worker; blocks until it has answered everything that is queued."""
        self.end().join()

    def _work(self) -> None:
        while batch := self._next_batch():
            outcomes = self._run_all(batch)
            self._loop.call_soon_threadsafe(self._deliver, outcomes)

    def _next_batch(self) -> list[_Request]:
        """Wait for a request and take along what fits beside it; empty at the end."""
        first = self._held.popleft() if self._held else self._queue.get()
        if first is None:
            return []
        batch, rows = [first], first.rows
        while rows < self._max_rows:
            try:
                request = self._queue.get_nowait()
            except Empty:
                break
            if (
                request is None
                or request.shapes != first.shapes
                or rows + request.rows > self._max_rows
            ):
                self._held.append(request)
                break
            batch.append(request)
            rows += request.rows
        return batch

    def _run_all(self, batch: list[_Request]) -> list[_Outcome]:
        """Run a batch as one; if that fails, each alone, so that only the guilty one fails."""
        try:
            return self._run(batch)
        except UnfitModelError as error:
            cause = error
        except Exception as error:  # were the worker to end, every later request would hang
            logger.exception("a run failed in a way that no model should")
            cause = UnfitModelError(f"the model failed with {type(error).__name__}")
        if len(batch) == 1:
            return [(batch[0], cause)]
        return [outcome for request in batch for outcome in self._run_all([request])]

    def _run(self, batch: list[_Request]) -> list[_Outcome]:
        if len(batch) == 1:
            return [(batch[0], self._engine.run(batch[0].feeds))]
        joined = {
            name: np.concatenate([request.feeds[name] for request in batch])
            for name in batch[0].feeds
        }
        outputs = self._engine.run(joined)
        ends = np.cumsum([request.rows for request in batch])
        return [
            (request, [output[end - request.rows : end] for output in outputs])
            for request, end in zip(batch, ends, strict=True)
        ]

    def _deliver(self, outcomes: list[_Outcome]) -> None:
        self._on_run(sum(request.rows for request, _ in outcomes))
        for request, outcome in outcomes:
            if request.future.done():  # its client went away
                continue
            if isinstance(outcome, UnfitModelError):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)
