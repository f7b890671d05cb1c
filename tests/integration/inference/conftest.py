"""A real inference server process, and what tests need around it."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edge_agent.inference.supervisor import InferenceServer

RNG = random.Random(0)  # noqa: S311 - spreads restarts, guards nothing


@contextlib.asynccontextmanager
async def running(server: InferenceServer) -> AsyncIterator[InferenceServer]:
    """Run the supervisor's job for the length of a block."""
    job = asyncio.create_task(server.run(), name="inference")
    try:
        yield server
    finally:
        job.cancel()
        await asyncio.wait([job], timeout=20)
        assert job.cancelled()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InferenceServer]:
    """Return a running server that serves nothing yet."""
    async with running(InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG)) as ready:
        yield ready
