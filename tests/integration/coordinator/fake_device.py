"""A device on a real MQTT session: enrols over the real API, says what a test tells it to."""

import asyncio
import contextlib
import hashlib
import random
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any, Self

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shared.enrolment import (
    REPLY_PAYLOAD_TYPE,
    EnrolmentReply,
    EnrolmentRequest,
    JoinToken,
    binding,
)
from shared.messages import (
    Ack,
    AnyBody,
    DeploymentState,
    Desired,
    Envelope,
    Health,
    Hello,
    Invitation,
    InvitationAnswer,
    JoinedRun,
    Nudge,
    Presence,
    PresenceState,
    ReplyWaiting,
    Reported,
    ServedFigures,
    SumAnswer,
    SumQuestion,
    decode,
    delivery_of,
    device_subscriptions,
    encode,
    new_envelope,
    topic_of,
    utc_now,
)
from shared.mqtt import MqttSession, Outgoing
from shared.signing import SigningKey, VerifyingKey, open_sealed
from tests.integration.coordinator.artifacts import artifact_of


class DeviceKeys:
    """The two keys of one device, and the requests that they can make."""

    def __init__(self) -> None:
        self.identity = SigningKey.generate()
        self.node = ec.generate_private_key(ec.SECP256R1())
        pem = self.node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.node_pem = pem.decode()

    def request(self, token: JoinToken, device_id: str | None = None) -> EnrolmentRequest:
        identity_key = b64encode(self.identity.public.raw).decode()
        content = binding(
            token_id=token.token_id, identity_key=identity_key, node_key_pem=self.node_pem
        )
        return EnrolmentRequest(
            token_id=token.token_id,
            secret=token.secret,
            device_id=device_id,
            identity_key=identity_key,
            node_key_pem=self.node_pem,
            identity_proof=self.identity.sign(content),
            node_proof=self.node.sign(content, ec.ECDSA(SHA256())),
        )


class _Impatient(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return a + min(0.1, b - a)


class FakeDevice:
    """One enrolled device. It takes part in every run unless ``refuses`` gives a reason."""

    def __init__(self, keys: DeviceKeys, reply: EnrolmentReply) -> None:
        self.keys, self.reply = keys, reply
        self.device_id = reply.device_id
        self.boot = uuid.uuid4().hex
        self.tasks: tuple[str, ...] = ("digits",)
        self.refuses = ""
        self.trains = True  # answers each nudge with a reply
        self.serves: str | None = None  # a version
        self.deaf = False  # to what should be served
        self.spurns: set[str | None] = set()  # versions that it takes for unfit
        self.heard: list[Envelope] = []
        command = VerifyingKey.from_text(reply.command_key)
        self._trusted = {command.key_id: command}
        self._session = MqttSession(
            reply.mqtt_url,
            client_id=self.device_id,
            subscriptions=device_subscriptions(fleet=reply.fleet, device=self.device_id),
            will=self.outgoing(Presence(state=PresenceState.LOST, boot=self.boot)),
            on_message=self._take,
            on_connect=self._greet,
            rng=_Impatient(),
        )

    @classmethod
    async def enrol(cls, api_url: str, admin_token: str, device_id: str) -> Self:
        async with httpx.AsyncClient(base_url=api_url, timeout=30) as client:
            headers = {"Authorization": f"Bearer {admin_token}"}
            answer = await client.post("/v1/tokens", json={"uses": 1}, headers=headers)
            token = JoinToken.parse(answer.json()["token"])
            keys = DeviceKeys()
            content = msgspec.json.encode(keys.request(token, device_id))
            answer = await client.post("/v1/enroll", content=content)
            answer.raise_for_status()
        return cls(keys, open_reply(answer.content))

    @contextlib.asynccontextmanager
    async def online(self) -> AsyncIterator[Self]:
        task = asyncio.create_task(self.stay())
        try:
            async with asyncio.timeout(30):
                await self._session.connected.wait()
            yield self
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def stay(self) -> None:
        """Be there, over restarts of the broker, until cancelled."""
        await self._session.run()

    async def say(self, body: AnyBody) -> Envelope:
        envelope = new_envelope(body, device=self.device_id, now=utc_now())
        await self.publish(envelope)
        return envelope

    async def publish(self, envelope: Envelope) -> None:
        await self._session.publish(self._sealed(envelope))

    async def publish_raw(self, message: Outgoing) -> None:
        await self._session.publish(message)

    def outgoing(self, body: AnyBody) -> Outgoing:
        return self._sealed(new_envelope(body, device=self.device_id, now=utc_now()))

    def bodies(self, kind: type[AnyBody]) -> list[AnyBody]:
        return [envelope.body for envelope in self.heard if isinstance(envelope.body, kind)]

    def acknowledged(self) -> set[str]:
        return {i for body in self.bodies(Ack) if isinstance(body, Ack) for i in body.ids}

    def _sealed(self, envelope: Envelope) -> Outgoing:
        delivery = delivery_of(envelope.body)
        return Outgoing(
            topic_of(envelope.body, fleet=self.reply.fleet, device=self.device_id),
            encode(envelope, self.keys.identity),
            qos=delivery.qos,
            retain=delivery.retain,
        )

    async def _greet(self) -> None:
        await self.say(Presence(state=PresenceState.READY, boot=self.boot))
        await self.say_hello()

    async def say_hello(self) -> None:
        await self.say(
            Hello(
                boot=self.boot,
                agent_version="0",
                protocol_min=1,
                protocol_max=1,
                cpu_count=1,
                memory_bytes=1,
                tasks=self.tasks,
            )
        )

    async def _take(self, topic: str, payload: bytes) -> None:
        del topic
        envelope = decode(payload, device=self.device_id, trusted=self._trusted, now=utc_now())
        self.heard.append(envelope)
        match envelope.body:
            case Invitation():
                await self._answer(envelope.body)
            case Nudge(run_id=run_id, session_id=session_id) if self.trains:
                await self.say(
                    ReplyWaiting(run_id=run_id, session_id=session_id, message_id=uuid.uuid4().hex)
                )
            case SumQuestion(question=question) as asked:
                await self.say(
                    SumAnswer(
                        run_id=asked.run_id,
                        session_id=asked.session_id,
                        stage=asked.stage,
                        answer=f"{self.device_id} heard ".encode() + question,
                    )
                )
            case Desired() if not self.deaf:
                await self._obey(envelope.body)
            case _:
                pass

    async def _obey(self, desired: Desired) -> None:
        """Serve what is desired, unless it is among what this device ``spurns``."""
        version, spurned = desired.model_version, desired.model_version in self.spurns
        if not spurned:
            self.serves = version
            await self.say_serving(desired.version)
            return
        await self.say(
            Reported(
                boot=self.boot,
                desired_version=desired.version,
                deployment=DeploymentState.FAILED,
                serving_version=self.serves,
                serving_artifact=self.artifact,
                cause="the model did not survive its self-test",
                failure="unfit",
            )
        )

    async def say_serving(self, desired_version: int) -> None:
        """Report what it serves, in answer to a desired state."""
        await self.say(
            Reported(
                boot=self.boot,
                desired_version=desired_version,
                deployment=DeploymentState.SERVING,
                serving_version=self.serves,
                serving_artifact=self.artifact,
            )
        )

    @property
    def artifact(self) -> str | None:
        """Digest of the file that it says it serves."""
        if self.serves is None:
            return None
        return hashlib.sha256(artifact_of(self.serves)).hexdigest()

    async def say_health(self, before: str | None = None, **figures: Any) -> None:
        """Say how what is served does, beside the version ``before``."""
        assert self.serves is not None
        assert self.artifact is not None
        served = ServedFigures(version=self.serves, artifact=self.artifact, **figures)
        old = None if before is None else ServedFigures(version=before, artifact="0" * 64)
        await self.say(Health(boot=self.boot, served=served, before=old))

    async def _answer(self, invitation: Invitation) -> None:
        run_id, session_id = invitation.run_id, invitation.session_id
        await self.say(
            InvitationAnswer(
                run_id=run_id,
                session_id=session_id,
                accepted=not self.refuses,
                reason=self.refuses,
            )
        )
        if not self.refuses:
            await self.say(JoinedRun(run_id=run_id, session_id=session_id))


def open_reply(sealed: bytes) -> EnrolmentReply:
    """Trust the reply's own key: the real check is the agent's."""
    document = msgspec.json.decode(sealed)
    payload = msgspec.json.decode(f'"{document["payload"]}"'.encode(), type=bytes)
    reply = msgspec.json.decode(payload, type=EnrolmentReply)
    key = VerifyingKey.from_text(reply.command_key)
    open_sealed(sealed, payload_type=REPLY_PAYLOAD_TYPE, trusted={key.key_id: key})
    return reply
