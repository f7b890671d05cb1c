"""A broker that forges, alters, replays and mixes the stages of secure sums changes no sum.

What it publishes arrives before the genuine message that it is about.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from shared.messages import Envelope, SumAnswer, SumQuestion, encode
from shared.secure_sum.messages import SignedAnswer
from shared.secure_sum.messages import decode as decode_stage
from shared.secure_sum.messages import encode as encode_stage
from shared.signing import SigningKey
from tests.integration.security.live_sums import DEVICES, LiveSums, committed, plan
from tests.integration.security.mqtt_tap import Published
from tests.integration.security.test_kills import nobody_answered_twice

MALLORY = SigningKey.generate()
Forge = Callable[[Published, Sequence[Published]], list[bytes]]


def envelope_of(message: Published) -> Envelope:
    return msgspec.convert(message.envelope, Envelope)


def with_another_key(message: Published, _: Sequence[Published]) -> list[bytes]:
    """Whoever has no key of ours signs with another one: the same words, and other ones."""
    envelope = envelope_of(message)
    other = msgspec.structs.replace(envelope, id="f" * 32, body=changed(envelope.body))
    return [encode(envelope, MALLORY), encode(other, MALLORY)]


def altered(message: Published, _: Sequence[Published]) -> list[bytes]:
    """Other words under the genuine signature."""
    sealed: dict[str, Any] = msgspec.json.decode(message.payload)
    envelope = envelope_of(message)
    other = msgspec.structs.replace(envelope, body=changed(envelope.body))
    payload = base64.b64decode(msgspec.json.decode(encode(other, MALLORY))["payload"])
    found = [{**sealed, "payload": base64.b64encode(payload).decode()}]
    (signature,) = sealed["signatures"]
    found.append({**sealed, "signatures": [{**signature, "keyid": MALLORY.public.key_id}]})
    found.append({**sealed, "signatures": []})
    return [msgspec.json.encode(one) for one in found]


def replayed(_: Published, earlier: Sequence[Published]) -> list[bytes]:
    """All that travelled before: of other devices, stages, rounds and runs."""
    return [message.payload for message in earlier]


def changed(body: Any) -> SumAnswer | SumQuestion:
    """Return an answer that refuses, or a question with a bit of it turned round."""
    match body:
        case SumAnswer(answer=content):
            answer = decode_stage(content, SignedAnswer)
            refusal = msgspec.structs.replace(answer, body=b"", refusal="it has had enough")
            return msgspec.structs.replace(body, answer=encode_stage(refusal))
        case SumQuestion(question=question):
            turned = bytes([*question[:-1], question[-1] ^ 1])
            return msgspec.structs.replace(body, question=turned)
    raise AssertionError(body)


class Mallory:
    """The broker's owner."""

    def __init__(self, forge: Forge, seen: Sequence[Published]) -> None:
        self.forged = 0
        self._forge, self._seen = forge, [m for m in seen if m.kind.startswith("sum.")]

    def hook(self, message: Published) -> Iterator[Published]:
        """Publish, on each topic of a stage, what is forged, before what is true."""
        if not message.kind.startswith("sum."):
            return
        for payload in self._forge(message, self._seen[-60:]):
            self.forged += 1
            yield Published(message.topic, payload)
        self._seen.append(message)


def all_kinds(message: Published, earlier: Sequence[Published]) -> list[bytes]:
    kinds = (with_another_key, altered, replayed)
    return [payload for kind in kinds for payload in kind(message, earlier)]


def test_what_a_broker_forges_is_ignored_and_each_sum_is_exact(live: LiveSums) -> None:
    mallory = Mallory(all_kinds, live.tap.published)
    asked = plan()
    live.tap.hook = mallory.hook
    try:
        run = live.watch(asked, lambda run: len(committed(run)) > 2)
    finally:
        live.tap.hook = lambda _: ()

    assert mallory.forged > 1000
    for record in run["rounds"][1:]:
        assert record["state"] == "committed", record["cause"]
        assert {(p["outcome"], p["cause"]) for p in record["participations"]} == {("replied", "")}
        assert len(record["participations"]) == len(DEVICES)
    np.testing.assert_allclose(
        live.committed(run), live.averaged_by_hand(asked, run), rtol=1e-4, atol=1e-5
    )
    nobody_answered_twice(live)


def test_the_same_words_signed_with_a_stolen_key_cost_that_device_its_part_and_nobody_else(
    live: LiveSums,
) -> None:
    thief = SigningKey.load_or_create(live.fleet.agent_home(DEVICES[3]) / "identity.pem")

    def steal(message: Published, _: Sequence[Published]) -> list[bytes]:
        envelope = envelope_of(message)
        if message.kind != "sum.answer share" or envelope.device != DEVICES[3]:
            return []
        return [encode(msgspec.structs.replace(envelope, body=changed(envelope.body)), thief)]

    asked = plan()
    live.tap.hook = Mallory(steal, []).hook
    try:
        run = live.watch(asked, lambda run: len(committed(run)) > 1)
    finally:
        live.tap.hook = lambda _: ()

    parts = {part["device_id"]: part for part in committed(run)[1]["participations"]}
    assert [name for name, part in parts.items() if part["outcome"] != "replied"] == [DEVICES[3]]
    np.testing.assert_allclose(
        live.committed(run), live.averaged_by_hand(asked, run), rtol=1e-4, atol=1e-5
    )
