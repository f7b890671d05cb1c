"""One secure sum in one process, without any transport: what its benchmark times."""

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from shared.membership import Member
from shared.secure_sum.choice import choose_encoding
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import LaneBits, SumConfig, digest_of, encode_config
from shared.secure_sum.encoding import encode as encode_vector
from shared.secure_sum.lane_shape import empty_lanes
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import Boxes, SignedAnswer
from shared.secure_sum.server import SumResult, SumServer
from shared.signing import SigningKey

_NAMELESS = "0" * 64  # digest of what plays no part here
CLIP_NORM = 8.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What is summed by whom."""

    devices: int  # invited; some may be lost in training
    length: int  # d
    lane_bits: LaneBits
    drop_fraction: float = 0.3


class Session:
    """A coordinator and its devices; every step is called by hand."""

    def __init__(self, setting: Setting, *, lost_in_training: int = 0, threads: int = 1) -> None:
        """Let everybody but the lost advertise, and fix the roster."""
        names = [f"device-{place:04}" for place in range(setting.devices)]
        identities = {name: SigningKey.generate() for name in names}
        joined = datetime(2026, 1, 1, tzinfo=UTC)
        members = {name: Member(name, key.public, joined) for name, key in identities.items()}
        server_key = X25519PrivateKey.generate()
        self.config = _config(setting, server_key.public_key().public_bytes_raw())
        digest = digest_of(encode_config(self.config))
        self.server = SumServer(
            self.config, digest, members=members, server_key=server_key, threads=threads
        )
        self.clients = {
            name: SumClient(
                self.config,
                digest,
                device_id=name,
                identity=identities[name],
                members=members,
                threads=threads,
            )
            for name in names[: setting.devices - lost_in_training]
        }
        for client in self.clients.values():
            self.server.take_advertised(client.advertise())
        self.roster = self.server.close_advertising()
        self._boxes: dict[str, Boxes] = {}

    @property
    def names(self) -> Sequence[str]:
        """The devices of the roster."""
        return list(self.clients)

    def share(self, name: str) -> tuple[float, SignedAnswer]:
        """Let one device deal its shares; return its seconds and its answer."""
        begun = time.perf_counter()
        answer = self.clients[name].share(self.roster)
        seconds = time.perf_counter() - begun
        self.server.take_shared(answer)
        return seconds, answer

    def share_all(self, names: Collection[str] | None = None) -> None:
        """Let the devices deal that have not, and hand out the boxes."""
        for name in self.names if names is None else names:
            self.share(name)
        self._boxes = dict(self.server.close_sharing())

    def mask(self, name: str, vector: NDArray[np.float32]) -> tuple[float, SignedAnswer, Lanes]:
        """Let one device encode and mask; return its seconds and what it uploads."""
        rng = np.random.default_rng()
        begun = time.perf_counter()
        lanes = encode_vector(self.config, vector, {}, rng=rng, entropy=os.urandom)
        answer = self.clients[name].mask(self._boxes[name], lanes)
        return time.perf_counter() - begun, answer, lanes

    def mask_lanes(self, name: str, lanes: Lanes) -> SignedAnswer:
        """Let one device mask lanes that are encoded already; they have not been added yet."""
        return self.clients[name].mask(self._boxes[name], lanes)

    def reveal(self, names: Collection[str]) -> list[SignedAnswer]:
        """Let the survivors agree and reveal; what they say has not reached the server yet."""
        survivors = self.server.close_masking()
        for name in names:
            self.server.take_consent(self.clients[name].consent(survivors))
        unmask = self.server.close_consent()
        return [self.clients[name].reveal(unmask) for name in names]

    def unmask(self, revealed: Sequence[SignedAnswer]) -> tuple[float, SumResult]:
        """Let the server remove the masks; return its seconds and the sum.

        As in a round, it reads no more answers than it needs.
        """
        begun = time.perf_counter()
        for answer in revealed:
            self.server.take_revealed(answer)
            if self.server.enough_revealed:
                break
        result = self.server.finish()
        return time.perf_counter() - begun, result


def random_lanes(config: SumConfig, rng: np.random.Generator) -> Lanes:
    """Draw one device's encoding: whole numbers within the bound."""
    bound = config.encoding.max_steps
    steps = rng.integers(-bound, bound + 1, config.encoding.length)
    lanes = empty_lanes(config)
    np.copyto(lanes.main, steps, casting="unsafe")
    return lanes


def _config(setting: Setting, server_key: bytes) -> SumConfig:
    return SumConfig(
        session=os.urandom(32),
        fleet="bench",
        run_id="bench",
        round_number=1,
        purpose="train",
        task_digest=_NAMELESS,
        question_digest=_NAMELESS,
        base_digest=_NAMELESS,
        min_survivors=2,
        max_roster=setting.devices,
        at_least=1,
        drop_fraction=setting.drop_fraction,
        encoding=choose_encoding(
            length=setting.length,
            lane_bits=setting.lane_bits,
            clip_norm=CLIP_NORM,
            max_roster=setting.devices,
            rotate=False,  # as Flower does not either
            noise=None,
            rotation_seed=bytes(16),
        ),
        server_key=server_key,
        membership_version=1,
        expires_at=datetime.max.replace(tzinfo=UTC),
    )
