"""The coordinator's end of the model pipeline: starts the child, listens, and never waits for ever.

The child loads torch and onnx; this module does not.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from cloud_coordinator.models.pipeline_messages import (
    BuildProgress,
    FromPipeline,
    Result,
    ToPipeline,
)
from shared.child import Child
from shared.errors import UnavailableError

logger = logging.getLogger(__name__)

BUILD_DEADLINE = timedelta(minutes=20)
_PIPELINE = (sys.executable, "-m", "cloud_coordinator.models.pipeline")


async def run_pipeline(
    order: ToPipeline,
    *,
    log_path: Path,
    say: Callable[[str], None],
    deadline: timedelta = BUILD_DEADLINE,
) -> Result:
    """Have a child do what ``order`` says; it is gone when this returns or is cancelled.

    Args:
        order: what to do.
        log_path: where the child's chatter goes.
        say: told what happens now, for people.
        deadline: the longest that it may take.

    Raises:
        UnavailableError: it died or took too long.
    """
    child = await Child.start(_PIPELINE, name="model pipeline", log_path=log_path)
    try:
        async with asyncio.timeout(deadline.total_seconds()):
            await child.send(order)
            async for message in child.messages(FromPipeline):
                if not isinstance(message, BuildProgress):
                    result: Result = message
                    return result
                logger.info("model pipeline: %s", message.doing)
                say(message.doing)
            status = await child.wait()
    except TimeoutError as error:
        raise UnavailableError(
            f"the model pipeline was not done after {deadline}; {log_path} shows how far it came"
        ) from error
    finally:
        await child.stop()
    raise UnavailableError(f"the model pipeline ended with status {status}; {log_path} says why")
