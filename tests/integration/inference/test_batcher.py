import asyncio
import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest

from edge_agent.inference.batcher import QUICK_S, Batcher
from edge_agent.inference.engine import Array, Engine
from shared.errors import UnfitModelError
from tests.integration.inference.tiny_models import FEATURES, linear


class GatedEngine(Engine):
    """The real engine, which waits in front of each run until it is let through."""

    def __init__(self) -> None:
        version = linear()
        manifest = version.signed.manifest
        super().__init__(
            version.content, inputs=manifest.inputs, outputs=manifest.outputs, session_config={}
        )
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        self.entered.release()
        assert self.gate.acquire(timeout=10)
        if (feeds["x"] == 13).any():
            raise UnfitModelError("thirteen")
        if (feeds["x"] == 14).any():
            raise KeyError("a mistake of ours")
        return super().run(feeds)


class WatchedEngine(GatedEngine):
    """Takes as long as it is told, and remembers on which thread it ran."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.threads = seconds, list[threading.Thread]()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        self.threads.append(threading.current_thread())
        began = time.perf_counter()
        while time.perf_counter() - began < self.seconds:
            pass
        self.gate.release()
        return super().run(feeds)


def rows(first: int, count: int = 1) -> dict[str, Array]:
    values = np.arange(first, first + count, dtype=np.float32)
    return {"x": np.repeat(values[:, None], FEATURES, axis=1)}


async def entered(engine: GatedEngine) -> None:
    assert await asyncio.to_thread(engine.entered.acquire, timeout=10)


async def test_what_queues_while_the_model_is_busy_goes_through_in_one_run() -> None:
    engine, runs = GatedEngine(), list[int]()
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=runs.append)
    first = batcher.submit(rows(1))
    await entered(engine)  # a lone request does not wait for company
    others = [batcher.submit(rows(number, number)) for number in (2, 3, 4)]
    engine.gate.release(2)
    await asyncio.wait_for(asyncio.gather(first, *others), 10)
    assert runs == [1, 9]
    for number, future in zip((2, 3, 4), others, strict=True):
        wanted = rows(number, number)["x"] @ linear().weights
        np.testing.assert_allclose(future.result()[0], wanted, rtol=1e-5)
    await batcher.close()


async def test_a_run_joins_no_more_rows_than_allowed() -> None:
    engine, runs = GatedEngine(), list[int]()
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=runs.append, max_rows=4)
    futures = [batcher.submit(rows(0))]
    await entered(engine)
    futures += [batcher.submit(rows(0, count)) for count in (3, 2, 9, 1)]
    engine.gate.release(5)
    await asyncio.wait_for(asyncio.gather(*futures), 10)
    assert runs == [1, 3, 2, 9, 1]
    assert [len(future.result()[0]) for future in futures] == [1, 3, 2, 9, 1]
    await batcher.close()


async def test_only_the_request_that_makes_the_model_fail_fails() -> None:
    engine = GatedEngine()
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=lambda _: None)
    first = batcher.submit(rows(1))
    await entered(engine)
    good, bad = batcher.submit(rows(2)), batcher.submit(rows(13))
    engine.gate.release(4)
    results = await asyncio.wait_for(asyncio.gather(first, good, return_exceptions=False), 10)
    assert [len(result[0]) for result in results] == [1, 1]
    with pytest.raises(UnfitModelError, match="thirteen"):
        await asyncio.wait_for(bad, 10)
    await batcher.close()


async def test_a_mistake_of_ours_fails_its_request_and_not_all_that_follow() -> None:
    engine = GatedEngine()
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=lambda _: None)
    engine.gate.release(2)
    with pytest.raises(UnfitModelError, match="failed with KeyError"):
        await asyncio.wait_for(batcher.submit(rows(14)), 10)
    assert len((await asyncio.wait_for(batcher.submit(rows(1)), 10))[0]) == 1
    await batcher.close()


async def test_closing_answers_everything_that_was_accepted() -> None:
    engine = GatedEngine()
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=lambda _: None, max_rows=1)
    futures = [batcher.submit(rows(number)) for number in range(20, 40)]
    futures[3].cancel()  # its client hung up
    closing = asyncio.create_task(batcher.close())
    engine.gate.release(20)
    await asyncio.wait_for(closing, 10)
    answered = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 10)
    assert [isinstance(answer, list) for answer in answered].count(False) == 1


async def test_a_quick_model_runs_where_requests_come_in_with_all_that_came_together() -> None:
    engine, runs = WatchedEngine(seconds=0.0), list[int]()
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=runs.append)
    for _ in range(20):  # until it is known to be quick, however busy this machine is
        await asyncio.wait_for(batcher.submit(rows(1)), 10)
    futures = [batcher.submit(rows(number, number)) for number in (2, 3, 4)]
    await asyncio.wait_for(asyncio.gather(*futures), 10)
    assert engine.threads[0] is not threading.current_thread()
    assert engine.threads[-1] is threading.current_thread()
    assert runs[-1] == 9
    wanted = rows(3, 3)["x"] @ linear().weights
    np.testing.assert_allclose(futures[1].result()[0], wanted, rtol=1e-5)
    await batcher.close()


async def test_a_slow_model_never_holds_up_the_event_loop() -> None:
    engine = WatchedEngine(seconds=2 * QUICK_S)
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=lambda _: None)
    for _ in range(3):
        await asyncio.wait_for(batcher.submit(rows(1)), 10)
    assert threading.current_thread() not in engine.threads
    await batcher.close()


async def test_requests_of_the_turn_in_which_it_is_closed_are_answered() -> None:
    engine = WatchedEngine(seconds=0.0)
    batcher = Batcher(engine, loop=asyncio.get_running_loop(), on_run=lambda _: None)
    futures = [batcher.submit(rows(number)) for number in range(3)]
    await asyncio.wait_for(batcher.close(), 10)
    assert all(len(future.result()[0]) == 1 for future in futures)
