"""Nothing of the owner's data leaves a device in a whole run of secure sums, by any road.

Every byte that seven agents and their trainers send is on record, as it was before TLS; so are
the numbers that they kept to themselves: updates, losses, counts, lanes before they were masked.
"""

import base64
import json
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import numpy as np
import pytest

from shared.privacy_plan import PrivacyPlan
from shared.signing import SigningKey
from tests.integration.security import canaries
from tests.integration.security.canaries import Heard, Needles
from tests.integration.security.live_sums import DEVICES, LABELS, LiveSums, committed, plan

NOTHING: Mapping[str, int] = MappingProxyType({})


@pytest.fixture(scope="module")
def traffic(live: LiveSums) -> Heard:
    """All that devices sent by the end of a run of secure sums."""
    live.watch(plan(evaluate=True), lambda run: len(committed(run)) >= 3)
    return Heard(live.sent())


def rows_and_words(live: LiveSums) -> Needles:
    """Return what stands in the owners' files, and how often."""
    needles: dict[str, tuple[bytes, ...]] = {}
    for name, hidden in live.canaries.items():
        for value in hidden.values:
            needles[f"a value of {name}: {value}"] = canaries.number(value)
        needles[f"a row of {name}"] = canaries.singles(hidden.values)
        needles[f"the end of a row of {name}"] = canaries.singles(hidden.values[1:])
        for word in hidden.words:
            needles[f"a word of {name}: {word}"] = (word.encode(),)
        part = live.data[name]
        digest = bytes.fromhex(part.digest)
        needles[f"the digest of all rows of {name}"] = (digest, part.digest.encode())
        for what, targets in (("train", part.train.targets), ("held out", part.held_out.targets)):
            for index, count in enumerate(np.bincount(targets, minlength=len(LABELS))):
                needles[f"{what} rows of {name} with {LABELS[index]}"] = canaries.count(count)
            needles[f"{what} rows of {name}"] = canaries.count(len(targets))
        for label, count in zip(LABELS, hidden.rows, strict=True):
            needles[f"all rows of {name} with {label}"] = canaries.count(count)
        needles[f"all rows of {name}"] = canaries.count(sum(hidden.rows))
    return needles


def what_devices_computed(live: LiveSums, *, after: Mapping[str, int] = NOTHING) -> Needles:
    """Return what devices derived from their rows, as their own processes saw it.

    Args:
        live: the fleet.
        after: leaves out what `LiveSums.noted` counted at an earlier time.
    """
    needles: dict[str, tuple[bytes, ...]] = {}
    for index, made in enumerate(live.hidden("sums", after=after)):
        for name, value in made["sums"].items():
            ways = canaries.count if value == int(value) else canaries.number
            if value > 1000:  # others are anywhere
                needles[f"{name} {index}: {value}"] = ways(value)
    for kind in ("parameters", "vector"):
        for index, made in enumerate(live.hidden(kind, after=after)):
            values = np.frombuffer(base64.b64decode(made["values"]), np.float32)
            if values.size:
                needles[f"{kind} {index}"] = canaries.vector(values)
    return needles


def lanes_before_they_were_masked(live: LiveSums) -> Needles:
    """Return what the wiretap saw of them."""
    needles: dict[str, tuple[bytes, ...]] = {}
    for index, made in enumerate(live.hidden("lanes")):
        main = np.frombuffer(base64.b64decode(made["main"]), f"u{made['bits'] // 8}")
        if main.size:
            needles[f"lanes {index}"] = canaries.vector(main)
        for place, lane in enumerate(np.frombuffer(base64.b64decode(made["exact"]), np.uint64)):
            if lane > 1000:
                needles[f"exact lane {place} of {index}"] = canaries.count(int(lane))
    return needles


def test_all_bytes_that_leave_are_on_record(live: LiveSums, traffic: Heard) -> None:
    masked = live.hidden("left")
    assert {one["device"] for one in masked} == set(DEVICES)
    for one in masked:
        parts = {part: (base64.b64decode(one[part]),) for part in ("answer", "main", "exact")}
        assert traffic.found(parts) == parts.keys()
    kinds = {message.kind for message in live.tap.published}
    assert {"sum.answer share", "sum.answer consent", "sum.answer reveal", "hello"} <= kinds


def test_neither_rows_nor_counts_nor_words_of_the_data_leave(
    live: LiveSums, traffic: Heard
) -> None:
    assert traffic.found(rows_and_words(live)) == set()


def test_nothing_that_a_device_computed_from_its_data_leaves_by_itself(
    live: LiveSums, traffic: Heard
) -> None:
    needles = {**what_devices_computed(live), **lanes_before_they_were_masked(live)}
    assert len(needles) > 100
    assert traffic.found(needles) == set()


def test_the_same_search_finds_them_where_the_owners_let_single_updates_leave(
    live: LiveSums, traffic: Heard
) -> None:
    assert len(traffic)  # of before
    marks, noted = live.marks(), live.noted()
    plain = plan(evaluate=True, privacy=PrivacyPlan(mode="plain"))
    live.watch(plain, lambda run: len(committed(run)) >= 2)

    heard = Heard(live.sent(after=marks))
    computed = what_devices_computed(live, after=noted)
    assert len(computed) >= 3 * len(DEVICES)
    # What a device had just computed when the run was stopped did not leave it any more.
    found = Counter(name.split()[0] for name in heard.found(computed))
    for kind in {name.split()[0] for name in computed}:
        assert found[kind] >= len(DEVICES), kind
    counted = {f"{part} rows of {name}" for name in DEVICES for part in ("train", "held out")}
    assert heard.found(rows_and_words(live)) >= counted


def test_no_wrapping_hides_a_canary_from_the_search() -> None:
    needles = {
        "value": canaries.number(31.415926535),
        "count": canaries.count(10_457),
        "word": (b"never-heard-of",),
        "row": canaries.singles((31.5, 27.25, 20.125)),
    }
    message = {
        "answer": base64.b64encode(msgspec.msgpack.encode([b"x", 31.415926535, 7])).decode(),
        "reason": "10457 examples of 'never-heard-of' are too few",
        "lanes": np.array([1, 31.5, 27.25, 20.125], np.float32).tobytes().hex(),
    }
    sealed = json.dumps({"payload": base64.b64encode(json.dumps(message).encode()).decode()})

    assert Heard([b"PUBLISH\0" + sealed.encode()]).found(needles) == needles.keys()
    assert Heard([b"10457.5 and 310457 and abc10457", bytes(1000)]).found(needles) == set()


def test_no_secret_stands_in_a_log_or_travels(live: LiveSums, traffic: Heard) -> None:
    secrets = [base64.b64decode(one["value"]) for one in live.hidden("secret")]
    for name in DEVICES:
        identity = SigningKey.load_or_create(live.fleet.agent_home(name) / "identity.pem")
        secrets.append(identity._key.private_bytes_raw())
    needles = {f"secret {index}": canaries.secret(one) for index, one in enumerate(secrets)}
    logs = [path.read_bytes() for path in live.home.rglob("*.log")]
    assert len(needles) > 3 * len(DEVICES)
    assert sum(map(len, logs)) > 1000
    assert Heard(logs).found(needles) == set()
    assert traffic.found(needles) == set()


def test_no_log_of_the_coordinator_tells_of_one_device_s_data(live: LiveSums) -> None:
    logs = [p.read_bytes() for p in live.home.rglob("*.log") if "agents" not in p.parts]
    assert len(logs) >= 2
    needles = {**rows_and_words(live), **what_devices_computed(live)}
    assert Heard(logs).found(needles) == set()
