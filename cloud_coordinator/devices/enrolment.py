"""Join tokens and enrolment: who may become a device, decided in one transaction each.

Everything here blocks; callers run it in a thread.
"""

import hmac
import secrets
from base64 import b64encode
from collections.abc import Callable
from datetime import datetime, timedelta

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database, change_one
from cloud_coordinator.devices.tables import DeviceRow, JoinTokenRow
from shared.enrolment import EnrolmentRequest, JoinToken, binding
from shared.errors import ConflictError, PeerError, UnauthorizedError
from shared.signing import VerifyingKey

_NO_HASH = "0" * 64  # compared with where the token is unknown, so that both cost the same


class Enrolment:
    """Creates tokens and turns valid requests into devices."""

    def __init__(
        self, database: Database, *, coordinator_key_id: str, clock: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._coordinator_key_id = coordinator_key_id
        self._clock = clock

    def create_token(self, *, uses: int, lifetime: timedelta, owner: str = "") -> JoinToken:
        """Draw a token for ``uses`` devices of ``owner``; of its secret only the hash is stored."""
        token = JoinToken.new(self._coordinator_key_id)
        now = self._clock()
        with self._database.transaction() as session:
            session.add(
                JoinTokenRow(
                    token_id=token.token_id,
                    secret_hash=token.secret_hash,
                    uses_left=uses,
                    owner=owner,
                    created_at=now,
                    expires_at=now + lifetime,
                )
            )
        return token

    def tokens(self) -> list[JoinTokenRow]:
        """Return all tokens, newest first."""
        with self._database.transaction() as session:
            return list(
                session.scalars(select(JoinTokenRow).order_by(JoinTokenRow.created_at.desc()))
            )

    def enrol(self, request: EnrolmentRequest) -> str:
        """Check a request and return the device id that its keys are bound to from now on.

        The same keys with the same token give the same id again, as when a reply was lost.

        Raises:
            UnauthorizedError: unknown, wrong, spent or expired token, or a proof is wrong.
            ConflictError: the wished id, or one of the keys, belongs to another device.
        """
        identity_key = check_proofs(request)
        try:
            with self._database.transaction() as session:
                token = self._check_secret(session, request)
                known = _device_with_keys(session, identity_key, request.node_key_pem)
                if known is not None and known.token_id == token.token_id:
                    return known.device_id
                self._spend(session, token)
                if known is not None:
                    known.token_id = token.token_id
                    return known.device_id
                return self._add_device(session, request, identity_key, owner=token.owner)
        except IntegrityError as error:  # two requests at once; the loser reads the row next time
            raise ConflictError("this device is being enrolled already; try again") from error

    def _check_secret(self, session: Session, request: EnrolmentRequest) -> JoinTokenRow:
        row = session.get(JoinTokenRow, request.token_id)
        offered = JoinToken(request.token_id, request.secret, "").secret_hash
        same = hmac.compare_digest(offered, row.secret_hash if row else _NO_HASH)
        if row is None or not same:
            raise UnauthorizedError(
                "the coordinator does not know this join token; "
                "get a new one from 'shoal token create'"
            )
        return row

    def _spend(self, session: Session, token: JoinTokenRow) -> None:
        if token.expires_at <= self._clock():
            raise UnauthorizedError(
                f"the join token expired at {token.expires_at.isoformat(timespec='seconds')}; "
                "get a new one from 'shoal token create'"
            )
        one_use = (
            update(JoinTokenRow)
            .where(JoinTokenRow.token_id == token.token_id, JoinTokenRow.uses_left > 0)
            .values(uses_left=JoinTokenRow.uses_left - 1)
        )
        try:
            change_one(session, one_use, what="the token")
        except ConflictError as error:
            raise UnauthorizedError(
                "the join token was used up; get a new one from 'shoal token create'"
            ) from error

    def _add_device(
        self,
        session: Session,
        request: EnrolmentRequest,
        identity_key: VerifyingKey,
        *,
        owner: str,
    ) -> str:
        device_id = request.device_id or f"device-{secrets.token_hex(4)}"
        if session.get(DeviceRow, device_id) is not None:
            raise ConflictError(
                f"another device is called {device_id!r} already; choose another name"
            )
        session.add(
            DeviceRow(
                device_id=device_id,
                identity_key=str(identity_key),
                node_key_pem=request.node_key_pem,
                token_id=request.token_id,
                enrolled_at=self._clock(),
                owner=owner,
            )
        )
        return device_id


def check_proofs(request: EnrolmentRequest) -> VerifyingKey:
    """Return the identity key once both proofs of possession hold.

    Raises:
        UnauthorizedError: a proof is not by the key that it claims.
        PeerError: something is no key.
    """
    content = binding(
        token_id=request.token_id,
        identity_key=request.identity_key,
        node_key_pem=request.node_key_pem,
    )
    identity = VerifyingKey.from_text(request.identity_key)
    try:
        identity.verify(request.identity_proof, content)
        _node_key(request.node_key_pem).verify(request.node_proof, content, ec.ECDSA(SHA256()))
    except (PeerError, InvalidSignature) as error:
        raise UnauthorizedError(
            "the request does not prove that the device holds its keys; enrol again"
        ) from error
    return identity


def _node_key(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerError("the node key is not a public key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PeerError("the node key must be on the curve P-256")
    return key


def _device_with_keys(
    session: Session, identity: VerifyingKey, node_key_pem: str
) -> DeviceRow | None:
    """Return the device that has both keys; raise ConflictError where one has just one of them."""
    text = b64encode(identity.raw).decode()
    either = (DeviceRow.identity_key == text) | (DeviceRow.node_key_pem == node_key_pem)
    rows = list(session.scalars(select(DeviceRow).where(either)))
    for row in rows:
        if row.identity_key == text and row.node_key_pem == node_key_pem:
            return row
    if rows:
        raise ConflictError("one of these keys belongs to another device; make new ones")
    return None
