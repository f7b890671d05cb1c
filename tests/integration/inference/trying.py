"""One slot at a time through the self-test, which takes several."""

from pathlib import Path
from typing import Any

from edge_agent.inference.messages import SelfTestAnswer, SelfTestResult
from edge_agent.inference.self_test import self_test
from edge_agent.inference.trial import run_self_test


async def tried(slot: Path, **given: Any) -> SelfTestResult:
    """Return what a throwaway process measured; raise what it refused the model with."""
    [verdict] = await run_self_test([slot], **given)
    if isinstance(verdict, Exception):
        raise verdict
    return verdict


def answer_of(slot: Path) -> SelfTestAnswer:
    """Return the answer of a self-test in this process: quicker than in one of its own."""
    [answer] = self_test([slot])
    return answer
