"""Is this the sum that our coordinator proposes, and that we were asked about? Pure checks.

Whatever a device is asked arrives twice: in the signed configuration, and as the message that it
received and hashed itself. Both must say the same, so that one device cannot be shown another model
or question than its peers (R2).
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from edge_agent.enrolment import Enrolment
from edge_agent.privacy.sources import DataUse
from shared.errors import PeerError
from shared.membership import Member
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE, SumConfig, decode_config, digest_of
from shared.signing import open_sealed

_LONGEST_SESSION = timedelta(days=8)  # a round of a week, and its stages


def open_config(sealed: bytes, enrolment: Enrolment) -> tuple[SumConfig, bytes]:
    """Return the configuration that our coordinator signed, and H(config).

    Raises:
        PeerError: not signed by a pinned command key, not a configuration, or of another fleet.
    """
    payload = open_sealed(sealed, payload_type=CONFIG_PAYLOAD_TYPE, trusted=enrolment.command_keys)
    config = decode_config(payload)
    if config.fleet != enrolment.fleet:
        raise PeerError(f"the sum is of fleet {config.fleet!r}, not {enrolment.fleet!r}")
    return config, digest_of(payload)


def check_time(config: SumConfig, now: datetime) -> None:
    """Raise PeerError where the session is over, or would keep secrets for too long."""
    if config.expires_at <= now:
        raise PeerError(f"the session expired at {config.expires_at:%Y-%m-%d %H:%M:%S}Z")
    if config.expires_at > now + _LONGEST_SESSION:
        raise PeerError(f"a session may last {_LONGEST_SESSION.days} days, and this one is longer")


def check_received(
    config: SumConfig,
    data: DataUse,
    *,
    task_digest: str,
    question_digest: str,
    base_digest: str | None,
) -> None:
    """Raise PeerError unless the configuration is about what this device received itself."""
    for what, signed, received in (
        ("task", config.task_digest, task_digest),
        ("question", config.question_digest, question_digest),
        ("parameters", config.base_digest, base_digest),
    ):
        if signed != received:
            raise PeerError(f"the {what} that came with this sum is not the one it was signed for")
    if config.purpose == "train" and data.part != "train":
        raise PeerError("a device trains on its training rows only")


def check_membership(members: Mapping[str, Member], enrolment: Enrolment) -> None:
    """Raise PeerError unless the list knows this device by the key that it signs with."""
    own = members.get(enrolment.device_id)
    if own is None:
        raise PeerError(
            f"the membership list does not name {enrolment.device_id} yet; "
            "it can take part once the fleet key has signed a list that does"
        )
    if own.key.key_id != enrolment.key.public.key_id:
        raise PeerError(f"the membership list has another key for {enrolment.device_id}")
