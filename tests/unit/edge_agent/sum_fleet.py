"""A small fleet with real homes and one coordinator, which does what a test tells it to."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from edge_agent.enrolment import load_enrolment
from edge_agent.privacy.sources import DataUse
from edge_agent.secure_sums import OpenSum, SecureSums
from shared.enrolment import REPLY_PAYLOAD_TYPE, EnrolmentReply
from shared.files import make_folder, write_private
from shared.membership import Member
from shared.secure_sum.config import (
    CONFIG_PAYLOAD_TYPE,
    Encoding,
    ExactLane,
    Noise,
    SumConfig,
    digest_of,
    encode_config,
)
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import SignedAnswer, decode, encode
from shared.secure_sum.server import SumResult, SumServer
from shared.signing import SigningKey, seal

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
TASK, QUESTION, BASE = "1" * 64, "2" * 64, "3" * 64
SMALL_POLICY = "min_cohort = 3\nexact_sums = true\nmax_exact_sums = 50\n"
SERVER_KEY = X25519PrivateKey.generate()
ENCODING = Encoding(lane_bits=16, length=4, clip_norm=1.0, steps_per_unit=500.0, max_steps=500)
EXAMPLES = ExactLane(name="examples", max_steps=1000)
NOISE = Noise(multiplier=2.0, survivors=2)


def config_of(**changes: Any) -> SumConfig:
    """A configuration that `SMALL_POLICY` allows: exact, of three devices at least."""
    fields: dict[str, Any] = {
        "session": secrets.token_bytes(32),
        "fleet": "main",
        "run_id": "run-1",
        "round_number": 1,
        "purpose": "train",
        "task_digest": TASK,
        "question_digest": QUESTION,
        "base_digest": BASE,
        "min_survivors": 3,
        "max_roster": 8,
        "at_least": 2,
        "encoding": ENCODING,
        "exact_lanes": (EXAMPLES,),
        "server_key": SERVER_KEY.public_key().public_bytes_raw(),
        "membership_version": 1,
        "expires_at": NOW + timedelta(hours=1),
    }
    return SumConfig(**{**fields, **changes})


def noised_config_of(**changes: Any) -> SumConfig:
    return config_of(**{"exact_lanes": (), "noise": NOISE, **changes})


class Fleet:
    """Enrolled devices, each with a home, and the keys of their coordinator."""

    def __init__(self, folder: Path, *names: str, policy: str = SMALL_POLICY) -> None:
        self.now = NOW
        self.command_key = SigningKey.generate()
        self.homes = {name: folder / name for name in names}
        for name, home in self.homes.items():
            self._enrol(name, home)
            write_private(home / "policy.toml", policy.encode())
        self.members = {
            name: Member(name, load_enrolment(home).key.public, NOW - timedelta(days=30))
            for name, home in self.homes.items()
        }

    def sums(self, name: str) -> SecureSums:
        """Start the device's trainer, so to say."""
        return SecureSums(
            self.homes[name], now=lambda: self.now, members=lambda _version: self.members
        )

    def seal(self, config: SumConfig) -> bytes:
        return seal(encode_config(config), payload_type=CONFIG_PAYLOAD_TYPE, key=self.command_key)

    def server(self, config: SumConfig) -> SumServer:
        digest = digest_of(encode_config(config))
        return SumServer(config, digest, members=self.members, server_key=SERVER_KEY)

    def _enrol(self, name: str, home: Path) -> None:
        make_folder(home)
        SigningKey.load_or_create(home / "identity.pem")
        key = self.command_key
        reply = EnrolmentReply(
            device_id=name,
            fleet="main",
            command_key=str(key.public),
            model_key=str(key.public),
            api_url="http://127.0.0.1:1",
            mqtt_url="mqtt://127.0.0.1:1",
            superlink_ca_pem="",
        )
        sealed = seal(msgspec.json.encode(reply), payload_type=REPLY_PAYLOAD_TYPE, key=key)
        write_private(home / "enrolment.json", sealed)
        write_private(home / "command-key-id", key.public.key_id.encode())


def data_of(sums: SecureSums, *, digest: str = "d" * 64, path: str = "/data/pumps.csv") -> DataUse:
    return sums.data_use(name="pumps", path=path, digest=digest, part="train")


def open_at(sums: SecureSums, fleet: Fleet, config: SumConfig, **received: Any) -> OpenSum:
    """Open a session for a device that received just what was signed."""
    known: dict[str, Any] = {
        "task_digest": config.task_digest,
        "question_digest": config.question_digest,
        "base_digest": config.base_digest,
    }
    known = {**known, "data": received.pop("data", None) or data_of(sums), **received}
    return sums.open(fleet.seal(config), **known)


def vector_of(number: int, config: SumConfig) -> NDArray[np.float32]:
    return np.full(config.encoding.length, 0.1 * (number + 1), np.float32)


def signed(answer: bytes) -> SignedAnswer:
    return decode(answer, SignedAnswer)


def refusal(answer: bytes) -> str:
    """Return why a device refused; fails where it did not."""
    message = signed(answer)
    assert message.refusal
    assert message.body == b""
    return message.refusal


class Session:
    """One session of several devices, stage by stage, so that tests can get in between."""

    def __init__(self, fleet: Fleet, config: SumConfig, sums: Mapping[str, SecureSums]) -> None:
        self.fleet, self.config, self.sums = fleet, config, dict(sums)
        self.server = fleet.server(config)
        self.questions: dict[tuple[str, str], bytes] = {}
        self.lanes: dict[str, Lanes] = {}

    def advertise(self) -> None:
        for number, sums in enumerate(self.sums.values()):
            opened = open_at(sums, self.fleet, self.config)
            exact = {lane.name: 10.0 * (number + 1) for lane in self.config.exact_lanes}
            answer = sums.advertise(opened, vector_of(number, self.config), exact)
            self.server.take_advertised(signed(answer))

    def share(self) -> None:
        question = encode(self.server.close_advertising())
        for name in self.sums:
            self.server.take_shared(signed(self.ask(name, "share", question)))
        for name, boxes in self.server.close_sharing().items():
            self.questions[name, "mask"] = encode(boxes)

    def mask(self, *, without: Sequence[str] = ()) -> None:
        for name in self.sums:
            if name not in without:
                answer, lanes = self.sums[name].mask(
                    self.config.session, self.questions[name, "mask"]
                )
                assert lanes is not None, refusal(answer)
                self.lanes[name] = lanes
                self.server.take_masked(signed(answer), lanes)

    def consent(self) -> None:
        question = encode(self.server.close_masking())
        for name in self.server.waiting_for:
            self.server.take_consent(signed(self.ask(name, "consent", question)))

    def reveal(self) -> SumResult:
        question = encode(self.server.close_consent())
        for name in self.server.waiting_for:
            self.server.take_revealed(signed(self.ask(name, "reveal", question)))
        return self.server.finish()

    def ask(self, name: str, stage: Any, question: bytes) -> bytes:
        self.questions[name, stage] = question
        return self.sums[name].answer(self.config.session, stage, question)

    def run(self, until: str = "reveal") -> SumResult | None:
        steps: dict[str, Callable[[], Any]] = {
            "advertise": self.advertise,
            "share": self.share,
            "mask": self.mask,
            "consent": self.consent,
            "reveal": self.reveal,
        }
        for stage, step in steps.items():
            result = step()
            if stage == until:
                return result  # type: ignore[no-any-return]
        raise AssertionError(f"there is no stage {until!r}")
