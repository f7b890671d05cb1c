"""Micro-batching without a timer: a run takes along whatever has come by the time it begins.

Waiting for company costs its whole delay at low load and gains nothing at high load, where company
is already there. A quick model runs on the event loop's own thread, with all requests that the same
turn of the loop brought: handing them to another thread and back would take longer than it does. A
slow one, and whatever comes while it is busy, runs on a worker thread, so that the loop goes on
answering everything else. Which it is, its own runs tell.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from edge_agent.inference.engine import Array, Engine
from shared.errors import UnfitModelError

logger = logging.getLogger(__name__)

MAX_ROWS = 64  # beyond, a larger batch delays its first request more than it helps the last
QUICK_S = 0.005  # a run that should take no longer may hold up the event loop
_NEWEST = 0.2  # weight of the latest run in what is expected of the next


@dataclass(frozen=True, slots=True)
class _Request:
    feeds: Mapping[str, Array]
    rows: int
    shapes: tuple[tuple[int, ...], ...]  # without the batch; only equal ones go together
    future: "asyncio.Future[list[Array]]"


_Outcome = tuple[_Request, list[Array] | UnfitModelError]


class Batcher:
    """One model behind a queue. Everything here is called on the event loop's thread only."""

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
            engine: the model; only one thread at a time calls it.
            loop: where results are delivered.
            on_run: told the rows of each run, on ``loop``.
            max_rows: most rows that requests are joined to; a larger request runs alone.
        """
        self._engine, self._loop, self._on_run = engine, loop, on_run
        self._max_rows = max_rows if engine.can_batch else 0
        self._fresh: deque[_Request] = deque()  # of this turn of the loop
        self._handed_over = 0  # requests that the worker has not answered
        self._row_s: float | None = None  # expected of one row; None: it never ran
        self._queue: SimpleQueue[_Request | None] = SimpleQueue()
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
        if not self._fresh:
            self._loop.call_soon(self._begin)
        self._fresh.append(_Request(feeds, rows, shapes, future))
        return future

    def end(self) -> threading.Thread:
        """Return the worker, which answers everything that is queued and then ends."""
        self._hand_over()
        self._queue.put(None)
        return self._worker

    async def close(self) -> None:
        """Answer everything that is queued, and end the worker."""
        await asyncio.to_thread(self.end().join)

    def _begin(self) -> None:
        """Run what this turn of the loop brought, here if that is quick."""
        if self._handed_over or not self._is_quick():
            self._hand_over()
            return
        while self._fresh:
            self._deliver(*self._timed(_take(self._fresh, self._max_rows)))

    def _is_quick(self) -> bool:
        rows = sum(request.rows for request in self._fresh)
        return self._row_s is not None and rows * self._row_s <= QUICK_S

    def _hand_over(self) -> None:
        self._handed_over += len(self._fresh)
        while self._fresh:
            self._queue.put(self._fresh.popleft())

    # --- on the worker's thread ------------------------------------------------------------------

    def _work(self) -> None:
        held: deque[_Request] = deque()  # taken from the queue, not yet run
        is_over = False
        while held or not is_over:
            is_over |= not self._fetch(held, wait=not held)
            if held:
                batch = _take(held, self._max_rows)
                self._loop.call_soon_threadsafe(self._delivered, *self._timed(batch))

    def _fetch(self, held: deque[_Request], *, wait: bool) -> bool:
        """Move all that is queued to ``held``; return False once nothing more will come."""
        with contextlib.suppress(Empty):
            while (request := self._queue.get(block=wait)) is not None:
                held.append(request)
                wait = False
            return False
        return True

    def _delivered(self, outcomes: list[_Outcome], seconds: float) -> None:
        self._handed_over -= len(outcomes)
        self._deliver(outcomes, seconds)

    # --- on either -------------------------------------------------------------------------------

    def _timed(self, batch: list[_Request]) -> tuple[list[_Outcome], float]:
        began = time.perf_counter()
        return self._run_all(batch), time.perf_counter() - began

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

    def _deliver(self, outcomes: list[_Outcome], seconds: float) -> None:
        rows = sum(request.rows for request, _ in outcomes)
        self._on_run(rows)
        row_s = seconds / max(1, rows)
        before = row_s if self._row_s is None else self._row_s
        self._row_s = (1 - _NEWEST) * before + _NEWEST * row_s
        for request, outcome in outcomes:
            if request.future.done():  # its client went away
                continue
            if isinstance(outcome, UnfitModelError):
                request.future.set_exception(outcome)
            else:
                request.future.set_result(outcome)


def _take(requests: deque[_Request], max_rows: int) -> list[_Request]:
    """Remove and return the first request, and those after it that may go along."""
    first = requests.popleft()
    batch, rows = [first], first.rows
    while requests and rows + requests[0].rows <= max_rows and requests[0].shapes == first.shapes:
        rows += requests[0].rows
        batch.append(requests.popleft())
    return batch
