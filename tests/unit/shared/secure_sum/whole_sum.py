"""A whole secure sum in memory: every device, the coordinator, and a carrier that may misbehave.

Tests say which devices drop at which stage, or put a function between the parties that alters what
is said. All identities and secrets come from seeds, so that a failure can be run again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import PeerError
from shared.membership import Member
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import (
    Encoding,
    ExactLane,
    SumConfig,
    check_roster_size,
    digest_of,
    encode_config,
    survivors_needed,
)
from shared.secure_sum.lane_shape import MAIN_TYPES
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import (
    Boxes,
    Question,
    Roster,
    SignedAnswer,
    Stage,
    Survivors,
    Unmask,
)
from shared.secure_sum.server import SumResult, SumServer
from shared.signing import SigningKey

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
EXPIRY = datetime(2026, 1, 2, tzinfo=UTC)
SERVER_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
STAGES: tuple[Stage, ...] = ("advertise", "share", "mask", "consent", "reveal")


class Entropy:
    """Bytes that look random and come from a seed."""

    def __init__(self, *seed: object) -> None:
        self._seed, self._calls = repr(seed).encode(), 0

    def __call__(self, length: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(self._seed + self._calls.to_bytes(8, "big")).digest(length)


def config_of(**changes: Any) -> SumConfig:
    """A configuration with small floors, so that few devices are enough."""
    fields: dict[str, Any] = {
        "session": b"s" * 32,
        "fleet": "fleet",
        "run_id": "run-1",
        "round_number": 3,
        "purpose": "train",
        "task_digest": "1" * 64,
        "question_digest": "2" * 64,
        "base_digest": "3" * 64,
        "min_survivors": 2,
        "max_roster": 12,
        "at_least": 1,
        "encoding": encoding_of(),
        "exact_lanes": (ExactLane(name="examples", max_steps=10_000),),
        "server_key": SERVER_KEY.public_key().public_bytes_raw(),
        "membership_version": 1,
        "expires_at": EXPIRY,
    }
    return SumConfig(**{**fields, **changes})


def encoding_of(**changes: Any) -> Encoding:
    fields: dict[str, Any] = {
        "lane_bits": 16,
        "length": 5,
        "clip_norm": 1.0,
        "steps_per_unit": 1000.0,
        "max_steps": 1000,
    }
    return Encoding(**{**fields, **changes})


@lru_cache(maxsize=512)
def identity_of(device_id: str) -> SigningKey:
    seed = hashlib.sha256(b"identity of " + device_id.encode()).digest()
    return SigningKey(Ed25519PrivateKey.from_private_bytes(seed))


def member_of(device_id: str) -> Member:
    return Member(device_id, identity_of(device_id).public, known_since=EPOCH)


def device_ids(count: int) -> list[str]:
    return [f"device-{number:03d}" for number in range(count)]


def random_lanes(config: SumConfig, rng: np.random.Generator) -> Lanes:
    """Any vector that an honest device might encode to: lanes within the bounds, centred."""
    steps = config.encoding.max_steps
    main = rng.integers(-steps, steps + 1, size=config.encoding.length)
    exact = [rng.integers(0, lane.max_steps + 1) for lane in config.exact_lanes]
    width: Any = MAIN_TYPES[config.encoding.lane_bits]
    return Lanes(main=main.astype(width), exact=np.array(exact, dtype=np.uint64))


def copy_of(lanes: Lanes) -> Lanes:
    return Lanes(main=lanes.main.copy(), exact=lanes.exact.copy())


def sum_of(vectors: Iterable[Lanes]) -> Lanes:
    first, *others = [copy_of(lanes) for lanes in vectors]
    for lanes in others:
        first.main[:] += lanes.main
        first.exact[:] += lanes.exact
    return first


def same(one: Lanes, other: Lanes) -> bool:
    return one.digest() == other.digest()


@dataclass(frozen=True)
class Said:
    """What went over the wire once."""

    stage: Stage
    device_id: str
    question: Question | None
    answer: SignedAnswer
    lanes: Lanes | None = None


Alter = Callable[[Said], Said | None]  # None: it is lost on the way


class WholeSum:
    """One session, stage by stage. After each stage only those that answered are asked again.

    Attributes:
        vectors: by device: what it sums, before it is masked.
        said: everything that was answered, in order.
        alter: stands between devices and coordinator.
        rejected: what the coordinator did not take, if ``tolerant``.
    """

    def __init__(
        self,
        count: int,
        *,
        config: SumConfig | None = None,
        seed: object = 0,
        threads: int = 1,
        alter: Alter = lambda said: said,
        configs: Mapping[str, SumConfig] | None = None,
        tolerant: bool = False,
    ) -> None:
        self.config = config or config_of()
        self.ids = device_ids(count)
        self.members = {device_id: member_of(device_id) for device_id in self.ids}
        self.clients = {
            device_id: self.client(device_id, (configs or {}).get(device_id), seed=seed)
            for device_id in self.ids
        }
        self.server = SumServer(
            self.config,
            self.digest,
            members=self.members,
            server_key=SERVER_KEY,
            threads=threads,
        )
        rng = np.random.default_rng(abs(hash(repr(seed))) % 2**32)
        self.vectors = {device_id: random_lanes(self.config, rng) for device_id in self.ids}
        self.alter, self.said = alter, list[Said]()
        self._tolerant, self.rejected = tolerant, list[str]()

    @property
    def digest(self) -> bytes:
        return digest_of(encode_config(self.config))

    def client(
        self, device_id: str, config: SumConfig | None = None, *, seed: object = 0, **options: Any
    ) -> SumClient:
        """Build a device's machine, possibly with another configuration than the others got."""
        config = config or self.config
        return SumClient(
            config,
            digest_of(encode_config(config)),
            device_id=device_id,
            identity=identity_of(device_id),
            members=self.members,
            entropy=Entropy(seed, device_id),
            **options,
        )

    # --- stages; each returns the question of the next ------------------------------------------

    def advertise(self, drops: Iterable[str] = ()) -> Roster:
        for device_id in self._answering(drops):
            self._deliver("advertise", device_id, None, self.clients[device_id].advertise())
        return self.server.close_advertising()

    def share(self, roster: Roster, drops: Iterable[str] = ()) -> dict[str, Boxes]:
        for device_id in self._answering(drops):
            self._deliver("share", device_id, roster, self.clients[device_id].share(roster))
        return self.server.close_sharing()

    def mask(self, boxes: Mapping[str, Boxes], drops: Iterable[str] = ()) -> Survivors:
        for device_id in self._answering(drops):
            lanes, question = copy_of(self.vectors[device_id]), boxes[device_id]
            answer = self.clients[device_id].mask(question, lanes)
            self._deliver("mask", device_id, question, answer, lanes)
        return self.server.close_masking()

    def consent(self, survivors: Survivors, drops: Iterable[str] = ()) -> Unmask:
        for device_id in self._answering(drops):
            answer = self.clients[device_id].consent(survivors)
            self._deliver("consent", device_id, survivors, answer)
        return self.server.close_consent()

    def reveal(self, unmask: Unmask, drops: Iterable[str] = ()) -> SumResult:
        for device_id in self._answering(drops):
            self._deliver("reveal", device_id, unmask, self.clients[device_id].reveal(unmask))
        return self.server.finish()

    def run(self, drops: Mapping[str, Stage] | None = None) -> SumResult:
        """Run all stages; ``drops`` says at which stage a device says nothing any more."""
        at: dict[Stage, list[str]] = {stage: [] for stage in STAGES}
        for device_id, stage in (drops or {}).items():
            at[stage].append(device_id)
        roster = self.advertise(at["advertise"])
        boxes = self.share(roster, at["share"])
        survivors = self.mask(boxes, at["mask"])
        unmask = self.consent(survivors, at["consent"])
        return self.reveal(unmask, at["reveal"])

    def run_until(self, stage: Stage) -> Any:
        """Run all stages before this one without a drop; return the question of this one."""
        question: Any = None
        for earlier in STAGES[: STAGES.index(stage)]:
            question = (
                self.advertise() if earlier == "advertise" else self._stage(earlier, question)
            )
        return question

    def expected(self, survivors: Sequence[str]) -> Lanes:
        """The plaintext sum of these devices' vectors."""
        return sum_of(self.vectors[device_id] for device_id in survivors)

    def _stage(self, stage: Stage, question: Any) -> Any:
        return getattr(self, stage)(question)

    def _answering(self, drops: Iterable[str]) -> list[str]:
        for device_id in drops:
            self.server.drop(device_id, "dropped by the test")
        return sorted(self.server.waiting_for)

    def _deliver(
        self,
        stage: Stage,
        device_id: str,
        question: Question | None,
        answer: SignedAnswer,
        lanes: Lanes | None = None,
    ) -> None:
        said = self.alter(Said(stage, device_id, question, answer, lanes))
        if said is not None:
            self.said.append(said)
            try:
                take(self.server, said)
            except PeerError as error:
                if not self._tolerant:
                    raise
                self.rejected.append(str(error))


def take(server: SumServer, said: Said) -> bool:
    """Give the server one answer at the stage that it was said at."""
    match said.stage:
        case "advertise":
            return server.take_advertised(said.answer)
        case "share":
            return server.take_shared(said.answer)
        case "mask":
            assert said.lanes is not None
            return server.take_masked(said.answer, said.lanes)
        case "consent":
            return server.take_consent(said.answer)
        case "reveal":
            return server.take_revealed(said.answer)


def ask(client: SumClient, stage: Stage, question: Any, lanes: Lanes | None = None) -> SignedAnswer:
    """Give one device one question."""
    match stage:
        case "advertise":
            return client.advertise()
        case "share":
            return client.share(question)
        case "mask":
            assert lanes is not None
            return client.mask(question, lanes)
        case "consent":
            return client.consent(question)
        case "reveal":
            return client.reveal(question)


def is_tolerated(config: SumConfig, count: int, drops: Mapping[str, Stage]) -> bool:
    """Say, by arithmetic alone, whether a sum with these drops must come out."""
    dropped = {stage: sum(1 for at in drops.values() if at == stage) for stage in STAGES}
    roster = count - dropped["advertise"]
    if roster < 2:
        return False
    try:
        check_roster_size(config, roster)
    except PeerError:
        return False
    survivors = roster - dropped["share"] - dropped["mask"]
    corrupted = max(1, config.corrupt_devices, -int(-config.corrupt_fraction * roster // 1))
    threshold = (roster - 1 + corrupted) // 2 + 1
    consents = survivors - dropped["consent"]
    # A secret of one who reveals needs t others; of one who does not, any t.
    return (
        survivors >= survivors_needed(config, roster)
        and consents >= max((roster + corrupted) // 2 + 1, threshold + 1)
        and consents - dropped["reveal"] >= threshold + 1
    )
