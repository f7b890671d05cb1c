"""Whatever bytes arrive: they are understood, or refused by an error that says no secret."""

import copy
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shared.errors import PeerError, ShoalError
from shared.secure_sum.client import SumClient
from shared.secure_sum.lifecycle import ClientState, ServerState
from shared.secure_sum.messages import (
    Boxes,
    Roster,
    SignedAnswer,
    Stage,
    Struct,
    Survivors,
    Unmask,
    decode,
    encode,
    sign_answer,
)
from tests.unit.shared.secure_sum.whole_sum import (
    STAGES,
    Said,
    WholeSum,
    ask,
    copy_of,
    identity_of,
    take,
)

US = "device-000"
KINDS: dict[Stage, type[Struct]] = {
    "share": Roster,
    "mask": Boxes,
    "consent": Survivors,
    "reveal": Unmask,
}


class Dice:
    """Draws that can be drawn again."""

    def __init__(self, seed: str) -> None:
        self._rng = np.random.default_rng(zlib.crc32(seed.encode()))

    def below(self, bound: int) -> int:
        return int(self._rng.integers(bound))

    def one_of(self, *choices: int) -> int:
        return choices[self.below(len(choices))]

    def some_bytes(self, length: int) -> bytes:
        return self._rng.bytes(length)


def mutated(content: bytes, dice: Dice) -> bytes:
    """Flip, cut, insert, repeat or replace a little of it; small numbers are often lengths."""
    changed = bytearray(content)
    for _ in range(dice.one_of(1, 1, 1, 2, 5)):
        at = dice.below(len(changed) + 1)
        match dice.below(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << dice.below(8)
            case 1:
                del changed[at : at + dice.one_of(1, 2, 40)]
            case 2:
                changed[at:at] = dice.some_bytes(dice.one_of(1, 3, 33))
            case 3:
                changed[at:at] = changed[at : at + 80]
            case 4 if at < len(changed):
                changed[at] = dice.one_of(0, 1, 0x7F, 0x80, 0x90, 0xC0, 0xC4, 0xD9, 0xDC, 0xFF)
            case _:
                changed = changed[: max(1, at)]
    return bytes(changed)


def secrets_in(client: SumClient) -> list[bytes]:
    found = [share for shares in client._received.values() for share in shares]
    if client._secrets:
        found += [bytes(client._secrets.mask_seed), bytes(client._secrets.key_seed)]
    return found + list(client._box_secrets.values())


def tells(error: BaseException | None, secrets: list[bytes]) -> bool:
    """Say whether a chain of errors holds a secret in its text."""
    while error is not None:
        text = f"{error!s} {error!r}"
        if any(secret.hex() in text or repr(secret)[2:-1] in text for secret in secrets):
            return True
        error = error.__cause__ or error.__context__
    return False


def fuzz_questions(stage: Stage, rounds: int) -> Iterator[ClientState]:
    """Ask a device mutated questions; each time a fresh copy of the device."""
    whole, dice = WholeSum(5), Dice(f"questions {stage}")
    question = whole.run_until(stage)
    if stage == "mask":
        question = question[US]
    content, kind = encode(question), KINDS[stage]
    for _ in range(rounds):
        client = copy.copy(whole.clients[US])
        client._secrets = copy.deepcopy(client._secrets)
        client._received, client._box_secrets = dict(client._received), dict(client._box_secrets)
        client._answered = dict(client._answered)
        secrets = secrets_in(client)
        assert secrets
        error: PeerError | None = None
        try:
            asked: Any = decode(mutated(content, dice), kind)
            ask(client, stage, asked, copy_of(whole.vectors[US]))
        except PeerError as caught:
            error = caught
        assert not tells(error, secrets)
        yield client.state


@pytest.mark.parametrize("stage", STAGES[1:])
def test_mutated_questions_end_in_typed_errors_or_in_an_answer(stage: Stage) -> None:
    states = set(fuzz_questions(stage, 400))
    # Some are no message. Some are, and are refused; or answered, where merely a box is bad.
    assert len(states) > 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_twenty_thousand_mutated_questions_end_in_typed_errors(stage: Stage) -> None:
    assert len(list(fuzz_questions(stage, 20_000))) == 20_000


def answers_at(stage: Stage) -> tuple[WholeSum, Said]:
    whole = WholeSum(5)
    question = whole.run_until(stage)
    ours = question[US] if stage == "mask" else question
    lanes = copy_of(whole.vectors[US])
    return whole, Said(stage, US, ours, ask(whole.clients[US], stage, ours, lanes), lanes)


def fuzz_answers(stage: Stage, rounds: int) -> None:
    """Nothing that was altered on the way counts, and the coordinator's memory stays as it was."""
    whole, said = answers_at(stage)
    dice, content = Dice(f"answers {stage}"), encode(said.answer)
    for _ in range(rounds):
        changed = mutated(content, dice)
        if changed == content:
            continue
        with pytest.raises(PeerError):
            take(whole.server, Said(stage, US, None, decode(changed, SignedAnswer), said.lanes))
    assert US in whole.server.waiting_for
    assert whole.server.blamed == ()
    assert take(whole.server, said)


@pytest.mark.parametrize("stage", STAGES)
def test_mutated_answers_end_in_typed_errors_and_change_nothing(stage: Stage) -> None:
    fuzz_answers(stage, 400)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_thousand_mutated_answers_end_in_typed_errors(stage: Stage) -> None:
    fuzz_answers(stage, 20_000)


def fuzz_signed_bodies(stage: Stage, rounds: int) -> int:
    """A corrupted device signs whatever it likes. Return how often that was blamed on it."""
    whole, said = answers_at(stage)
    dice, blamed = Dice(f"bodies {stage}"), 0
    roster = whole.server._intake.roster
    snapshot = copy.deepcopy(whole.server._memory)
    advertised = dict(whole.server._advertised)
    for _ in range(rounds):
        body = mutated(said.answer.body, dice)
        answer = sign_answer(
            identity_of(US),
            session=said.answer.session,
            stage=stage,
            config_digest=whole.digest,
            roster_digest=roster.digest if roster else b"",
            device_id=US,
            body=body,
        )
        try:
            take(whole.server, Said(stage, US, None, answer, said.lanes))
        except PeerError:
            blamed += [blame.device_id for blame in whole.server.blamed] == [US]
        memory = copy.deepcopy(snapshot)
        whole.server._memory = whole.server._intake.memory = memory
        whole.server._advertised = dict(advertised)
    return blamed


@pytest.mark.parametrize("stage", STAGES)
def test_nonsense_that_a_device_signed_is_blamed_on_it(stage: Stage) -> None:
    assert fuzz_signed_bodies(stage, 300) > 100


def test_shares_of_nonsense_end_in_a_sum_or_in_a_named_end() -> None:
    """Bodies that fit but say something else: every byte of a device's dealings may be wrong."""
    dice, ends = Dice("dealings"), set[ServerState]()
    for _ in range(60):
        whole = WholeSum(6)

        def alter(said: Said) -> Said:
            if (said.stage, said.device_id) != ("share", US):
                return said
            body = bytearray(said.answer.body)
            for _ in range(dice.one_of(1, 3, 60)):
                body[dice.below(len(body))] ^= 1 << dice.below(8)
            roster = whole.server._intake.roster  # noqa: B023 - called within this turn
            assert roster is not None
            answer = sign_answer(
                identity_of(US),
                session=said.answer.session,
                stage="share",
                config_digest=whole.digest,  # noqa: B023
                roster_digest=roster.digest,
                device_id=US,
                body=bytes(body),
            )
            return Said("share", US, said.question, answer)

        whole.alter = alter
        try:
            result = whole.run()
        except ShoalError:
            assert {blame.device_id for blame in whole.server.blamed} <= {US}
        else:
            assert result.lanes.digest() == whole.expected(result.survivors).digest()
        ends.add(whole.server.state)
    assert ServerState.SUMMED in ends


@pytest.mark.parametrize(
    "content", [b"", b"\xc0", b"\x90", b"\xdd\xff\xff\xff\xff", b"\x91" * 5000]
)
@pytest.mark.parametrize("kind", [Roster, Boxes, Survivors, Unmask, SignedAnswer])
def test_bytes_that_are_no_message_are_said_to_be_none(content: bytes, kind: type[Struct]) -> None:
    with pytest.raises(PeerError, match=f"not a {kind.__name__}"):
        decode(content, kind)
