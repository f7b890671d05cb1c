import asyncio
from itertools import product

import pytest

from edge_agent.deployment import TRANSITIONS, DeploymentEvent, _finish, next_state
from shared.errors import IllegalTransitionError
from shared.messages import DeploymentState

S, E = DeploymentState, DeploymentEvent
LEGAL = {
    (S.IDLE, E.WANTED): S.DOWNLOADING,
    (S.IDLE, E.FOUND): S.ACTIVATING,
    (S.IDLE, E.SERVED_ALREADY): S.SERVING,
    (S.DOWNLOADING, E.FETCHED): S.TESTING,
    (S.DOWNLOADING, E.FAILED): S.FAILED,
    (S.DOWNLOADING, E.ABANDONED): S.IDLE,
    (S.TESTING, E.PASSED): S.ACTIVATING,
    (S.TESTING, E.FAILED): S.FAILED,
    (S.TESTING, E.ABANDONED): S.IDLE,
    (S.ACTIVATING, E.ACTIVATED): S.SERVING,
    (S.ACTIVATING, E.FAILED): S.FAILED,
    (S.ACTIVATING, E.ABANDONED): S.IDLE,
    (S.SERVING, E.WANTED): S.DOWNLOADING,
    (S.SERVING, E.SERVED_ALREADY): S.SERVING,
    (S.FAILED, E.WANTED): S.DOWNLOADING,
    (S.FAILED, E.SERVED_ALREADY): S.SERVING,
}


@pytest.mark.parametrize(("state", "event"), list(product(S, E)))
def test_every_pair_of_state_and_event_is_decided(
    state: DeploymentState, event: DeploymentEvent
) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) == LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event} cannot happen while {state}"):
            next_state(state, event)


def test_every_state_is_in_the_table_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(S)
    assert all(TRANSITIONS.values())


async def test_a_step_that_is_cancelled_is_taken_to_its_end_and_then_cancelled() -> None:
    begun, let_go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def step() -> None:
        begun.set()
        await let_go.wait()
        ended.set()

    work = asyncio.create_task(_finish(step()))
    await begun.wait()
    work.cancel()
    await asyncio.wait([work], timeout=0.05)
    assert not work.done()
    let_go.set()
    await asyncio.wait([work], timeout=10)
    assert work.cancelled()
    assert ended.is_set()
