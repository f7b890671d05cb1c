"""The sum that comes out is, bit for bit, the sum of what went in; or none comes out."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, PeerError, QuorumError
from shared.secure_sum.config import ExactLane
from shared.secure_sum.lifecycle import ClientState, ServerState
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import Stage
from tests.unit.shared.secure_sum.whole_sum import (
    STAGES,
    WholeSum,
    config_of,
    device_ids,
    encoding_of,
    is_tolerated,
    same,
)

NEVER = "never"


def check_sum(whole: WholeSum, drops: dict[str, Stage]) -> None:
    """The exact sum where it must come out; else a named end, and no sum."""
    if is_tolerated(whole.config, len(whole.ids), drops):
        result = whole.run(drops)
        gone = {device_id for device_id, at in drops.items() if at in STAGES[:3]}
        assert set(result.survivors) == set(whole.ids) - gone
        assert same(result.lanes, whole.expected(result.survivors))
        assert result.blamed == ()
        assert whole.server.state is ServerState.SUMMED
    else:
        with pytest.raises((QuorumError, ConfigError)) as caught:
            whole.run(drops)
        assert whole.server.state is ServerState.ABORTED
        assert whole.server.cause == str(caught.value)


@st.composite
def cases(draw: st.DrawFn) -> tuple[WholeSum, dict[str, Stage]]:
    count = draw(st.integers(3, 9))
    bits = draw(st.sampled_from([16, 32]))
    config = config_of(
        encoding=encoding_of(
            lane_bits=bits,
            length=draw(st.integers(0, 70)),
            max_steps=draw(st.integers(1, 2 ** (bits - 5) - 1)),
        ),
        exact_lanes=tuple(
            ExactLane(name=f"lane-{number}", max_steps=draw(st.integers(1, 2**58)))
            for number in range(draw(st.integers(0, 3)))
        ),
        mask_algorithm=draw(st.sampled_from(["aes-128-ctr", "chacha20"])),
        drop_fraction=draw(st.sampled_from([0.0, 0.2, 0.3, 0.4])),
    )
    whole = WholeSum(
        count, config=config, seed=draw(st.integers()), threads=draw(st.integers(1, 3))
    )
    few = st.sampled_from(whole.ids)
    drops = draw(st.dictionaries(few, st.sampled_from(STAGES), max_size=draw(st.integers(0, 4))))
    return whole, drops


@settings(max_examples=220, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_the_sum_is_exact_whoever_drops_wherever_or_there_is_none(
    case: tuple[WholeSum, dict[str, Stage]],
) -> None:
    check_sum(*case)


def tolerated(count: int) -> Iterator[dict[str, Stage]]:
    ids = device_ids(count)
    for pattern in itertools.product([*STAGES, NEVER], repeat=count):
        drops = {
            device_id: stage
            for device_id, stage in zip(ids, pattern, strict=True)
            if stage != NEVER
        }
        if is_tolerated(config_of(), count, drops):  # type: ignore[arg-type]
            yield drops  # type: ignore[misc]


@pytest.mark.parametrize(("count", "patterns"), [(3, 1), (4, 4), (5, 31), (6, 171)])
def test_every_tolerated_pattern_of_drops_ends_in_the_exact_sum(count: int, patterns: int) -> None:
    tried = 0
    for drops in tolerated(count):
        check_sum(WholeSum(count), drops)
        tried += 1
    assert tried == patterns


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4, 5])
def test_every_pattern_of_drops_ends_in_the_exact_sum_or_in_a_named_end(count: int) -> None:
    for pattern in itertools.product([*STAGES, NEVER], repeat=count):
        drops = dict(zip(device_ids(count), pattern, strict=True))
        check_sum(WholeSum(count), {who: at for who, at in drops.items() if at != NEVER})  # type: ignore[misc]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_vectors_of_the_largest_roster_just_fit(sign: int) -> None:
    # 2 · 7 · 4681 = 65534 is the last multiple below 2^16.
    steps, weight = 4681, 2**63 // 7 - 1
    config = config_of(
        max_roster=7,
        encoding=encoding_of(max_steps=steps),
        exact_lanes=(ExactLane(name="weight", max_steps=weight),),
    )
    whole = WholeSum(7, config=config)
    largest = Lanes(
        main=np.full(5, sign * steps).astype(np.uint16),
        exact=np.full(1, sign * weight).astype(np.uint64),
    )
    whole.vectors = dict.fromkeys(whole.ids, largest)
    result = whole.run()
    assert result.lanes.main.view(np.int16).tolist() == [sign * 7 * steps] * 5
    assert result.lanes.exact.view(np.int64).tolist() == [sign * 7 * weight]


@pytest.mark.parametrize(("roster", "steps"), [(8, 4681), (7, 4682)])
def test_a_configuration_that_could_overflow_by_one_device_or_step_is_none(
    roster: int, steps: int
) -> None:
    with pytest.raises(ValueError, match="overflow 16 bits"):
        config_of(max_roster=roster, encoding=encoding_of(max_steps=steps))


def test_one_device_more_than_the_largest_roster_is_left_out_by_an_honest_coordinator() -> None:
    whole = WholeSum(8, config=config_of(max_roster=7))
    result = whole.run()
    assert len(result.roster) == 7
    assert "full" in whole.server.left["device-007"]
    assert same(result.lanes, whole.expected(result.survivors))


def test_a_roster_of_one_device_too_many_is_refused_by_every_device() -> None:
    large, small = WholeSum(8, config=config_of(max_roster=8)), config_of(max_roster=7)
    roster = large.advertise()
    for device_id in large.ids:
        client = large.client(device_id, small)
        client.advertise()
        with pytest.raises(PeerError, match="8 devices are above the 7"):
            client.share(roster)
        assert client.state is ClientState.REFUSED


def test_the_sum_of_one_lane_wraps_where_noise_makes_it_wrap() -> None:
    whole = WholeSum(3)
    for number, lanes in enumerate(whole.vectors.values()):
        lanes.main[:] = 2**15 - 1 + number
    result = whole.run()
    assert result.lanes.main.tolist() == [(3 * (2**15 - 1) + 3) % 2**16] * 5


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    config = config_of(encoding=encoding_of(length=70_001, lane_bits=32))
    results = [
        WholeSum(5, config=config, threads=threads).run({"device-003": "mask"})
        for threads in (1, 2, 3)
    ]
    assert len({result.lanes.digest() for result in results}) == 1


def test_the_result_says_what_the_roster_was_and_what_it_could_stand() -> None:
    result = WholeSum(7).run({"device-002": "mask", "device-005": "advertise"})
    assert result.roster == tuple(f"device-00{number}" for number in (0, 1, 2, 3, 4, 6))
    assert result.survivors == tuple(f"device-00{number}" for number in (0, 1, 3, 4, 6))
    assert (result.threshold, result.corrupted) == (4, 1)


@pytest.mark.slow
def test_two_hundred_and_fifty_six_devices_lose_three_tenths_and_still_sum_exactly() -> None:
    config = config_of(max_roster=256, encoding=encoding_of(length=1000, max_steps=127))
    whole = WholeSum(256, config=config)
    gone = whole.ids[::4] + whole.ids[1:49:4]
    drops: dict[str, Stage] = {
        device_id: "mask" if number % 2 else "share" for number, device_id in enumerate(gone)
    }
    result = whole.run(drops)
    assert len(result.survivors) == 256 - len(drops) == 180
    assert same(result.lanes, whole.expected(result.survivors))
    sizes = {len(said.answer.body) for said in whole.said if said.stage == "reveal"}
    assert len(sizes) == 1
