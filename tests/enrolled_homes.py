"""Homes of devices that are enrolled and know each other, without a coordinator that did it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edge_agent.membership import LIST_FILE
from edge_agent.privacy.policy import POLICY_FILE
from shared.enrolment import REPLY_PAYLOAD_TYPE, EnrolmentReply
from shared.files import make_folder, write_private
from shared.membership import Member, MemberEntry, MembershipList, members_of, sign_list
from shared.signing import SigningKey, seal

FLEET = "local"
ALL_MAY_LEAVE = "individual_updates = true\n"  # a policy for plain rounds
SINCE = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class EnrolledHomes:
    """What a coordinator of these devices needs."""

    command_key: SigningKey
    members: Mapping[str, Member]


def enrol_homes(
    homes: Mapping[str, Path], *, policy: str = "", command_key: SigningKey | None = None
) -> EnrolledHomes:
    """Write what enrolment, the owner and the first membership list leave behind.

    Args:
        homes: by device id.
        policy: the text of each owner's policy; with none the strict defaults hold.
        command_key: of the coordinator; a new one by default.
    """
    command_key = command_key or SigningKey.generate()
    fleet_key = SigningKey.generate()
    entries = []
    for device_id, home in sorted(homes.items()):
        make_folder(home)
        identity = SigningKey.load_or_create(home / "identity.pem")
        entry = MemberEntry(device_id=device_id, identity_key=str(identity.public), since=SINCE)
        entries.append(entry)
        write_private(home / "enrolment.json", _reply(device_id, command_key, fleet_key))
        write_private(home / "command-key-id", command_key.public.key_id.encode())
        if policy:
            write_private(home / POLICY_FILE, policy.encode())
    members = MembershipList(fleet=FLEET, version=1, issued_at=SINCE, members=tuple(entries))
    for home in homes.values():
        write_private(home / LIST_FILE, sign_list(members, fleet_key))
    return EnrolledHomes(command_key, members_of(members))


def _reply(device_id: str, command_key: SigningKey, fleet_key: SigningKey) -> bytes:
    reply = EnrolmentReply(
        device_id=device_id,
        fleet=FLEET,
        command_key=str(command_key.public),
        model_key=str(command_key.public),
        api_url="http://127.0.0.1:1",
        mqtt_url="mqtt://127.0.0.1:1",
        superlink_ca_pem="",
        fleet_key=str(fleet_key.public),
    )
    return seal(msgspec.json.encode(reply), payload_type=REPLY_PAYLOAD_TYPE, key=command_key)
