"""A simulated device's part in secure sums: the real `SumClient`, and lies on request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import PeerError, PolicyError
from shared.membership import Member
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE, SumConfig, decode_config, digest_of
from shared.secure_sum.encoding import encode as encode_vector
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import (
    Boxes,
    Roster,
    SignedAnswer,
    Survivors,
    Unmask,
    decode,
    encode,
)
from shared.secure_sum.questions import SPENT
from shared.signing import SigningKey, VerifyingKey, open_sealed


@dataclass
class _Opened:
    config: SumConfig
    client: SumClient
    vector: NDArray[Any]
    exact: Mapping[str, float]
    asked: dict[str, bytes] = field(default_factory=dict)
    lanes: Lanes | None = None


class SumPart:
    """One device's sessions. Fields may be changed while a run goes on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity = SigningKey.generate()
        self.members: Mapping[str, Member] = {}
        self.trusted: VerifyingKey | None = None
        self.refuses: dict[str, str] = {}  # by stage: why
        self.lies: dict[str, Callable[[SignedAnswer], SignedAnswer]] = {}  # by stage
        self.alters: Callable[[Lanes], None] = lambda _: None  # what was masked, before it is sent
        self.contributes: Callable[[NDArray[Any], dict[str, float]], None] = lambda _v, _e: None
        self.spent: set[tuple[str, str | None, str]] = set()
        self.opened: dict[bytes, _Opened] = {}
        self.contradictions: list[str] = []  # stages that were asked in two ways

    def advertise(
        self, sealed: bytes, vector: NDArray[Any], exact: Mapping[str, float]
    ) -> SignedAnswer:
        assert self.trusted is not None
        payload = open_sealed(
            sealed,
            payload_type=CONFIG_PAYLOAD_TYPE,
            trusted={self.trusted.key_id: self.trusted},
        )
        config = decode_config(payload)
        if config.noise is None and _question_of(config) in self.spent:
            raise PeerError(SPENT)
        if reason := self.refuses.get("open"):
            raise PolicyError(reason)
        client = SumClient(
            config,
            digest_of(payload),
            device_id=self.name,
            identity=self.identity,
            members=self.members,
        )
        chosen = {lane.name: exact[lane.name] for lane in config.exact_lanes}
        if "examples" in chosen:
            (lane,) = (lane for lane in config.exact_lanes if lane.name == "examples")
            chosen["examples"] = min(chosen["examples"], lane.max_steps / lane.steps_per_unit)
            if config.purpose == "train":
                vector = vector * (chosen["examples"] / lane.max_steps)
        self.contributes(vector, chosen)
        self.opened[config.session] = _Opened(config, client, vector, chosen)
        return self._said("advertise", client.advertise())

    def answer(self, session: bytes, stage: str, question: bytes) -> SignedAnswer:
        return self.answer_with_lanes(session, stage, question)[0]

    def answer_with_lanes(
        self, session: bytes, stage: str, question: bytes
    ) -> tuple[SignedAnswer, Lanes | None]:
        opened = self.opened[session]
        if opened.asked.setdefault(stage, question) != question:
            self.contradictions.append(stage)
        client = opened.client
        if reason := self.refuses.get(stage):
            return client.refuse(stage, reason), None  # type: ignore[arg-type]
        try:
            match stage:
                case "share":
                    said = client.share(decode(question, Roster))
                case "mask":
                    said = self._mask(opened, decode(question, Boxes))
                case "consent":
                    said = client.consent(decode(question, Survivors))
                case _:
                    said = client.reveal(decode(question, Unmask))
        except PeerError as error:
            return client.refuse(stage, str(error)), None  # type: ignore[arg-type]
        return self._said(stage, said), opened.lanes if stage == "mask" else None

    def _mask(self, opened: _Opened, boxes: Boxes) -> SignedAnswer:
        if opened.lanes is None:
            vector = np.asarray(opened.vector)
            rng = np.random.default_rng(list(self.name.encode()))  # noise of its own
            opened.lanes = encode_vector(
                opened.config, vector, opened.exact, rng=rng, entropy=rng.bytes
            )
            self.alters(opened.lanes)
        said = opened.client.mask(boxes, opened.lanes)
        self.spent.add(_question_of(opened.config))
        return said

    def _said(self, stage: str, said: SignedAnswer) -> SignedAnswer:
        return self.lies[stage](said) if stage in self.lies else said


def encoded(answer: SignedAnswer) -> bytes:
    return encode(answer)


def _question_of(config: SumConfig) -> tuple[str, str | None, str]:
    return config.run_id, config.base_digest, config.question_digest
