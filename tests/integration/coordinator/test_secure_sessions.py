"""What a session does for secure sums: a real broker, and a worker that only asks and keeps."""

from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from cloud_coordinator.keys import FLEET_PUBLIC_FILE
from shared.messages import Invitation, SumQuestion
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE
from shared.signing import SigningKey, open_sealed
from tests.integration.coordinator.live import live, secure_plan

NAMES = ("a", "b", "c", "d", "e")


async def test_questions_reach_each_device_signed_and_answers_come_back(tmp_path: Path) -> None:
    async with live(tmp_path) as service, AsyncExitStack() as stack:
        service.ask("sum")
        devices = [await service.enrol(name) for name in NAMES]
        for device in devices:
            await stack.enter_async_context(device.online())
        run = await service.ended(await service.start(secure_plan()))

        assert run["state"] == "finished"
        key = service.coordinator.keys.command.public
        sealed = (service.requests / "signed").read_bytes()
        payload = open_sealed(sealed, payload_type=CONFIG_PAYLOAD_TYPE, trusted={key.key_id: key})
        assert payload == b"what it is about"
        content = (service.requests / "answers").read_bytes()
        answers = msgspec.json.decode(content, type=dict[str, bytes])
        assert answers == {name: f"{name} heard who takes part".encode() for name in NAMES}
        for device in devices:
            [invitation] = device.bodies(Invitation)
            assert isinstance(invitation, Invitation)
            assert (invitation.mode, invitation.min_survivors) == ("secure", 5)
            [asked] = [e for e in device.heard if isinstance(e.body, SumQuestion)]
            assert (asked.expires_at - asked.sent_at).total_seconds() <= 60
        scratch = service.coordinator.settings.home / "scratch" / run["run_id"]
        assert not scratch.exists()  # the run has ended


async def test_only_members_are_invited_and_the_others_are_told_apart_with_the_reason(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    elsewhere = SigningKey.generate()
    (home / FLEET_PUBLIC_FILE).write_text(f"{elsewhere.public}\n")
    async with live(tmp_path, fleet_key="offline") as service:
        stranger = await service.enrol("stranger")
        async with stranger.online():
            run_id = await service.start(secure_plan())
            run = await service.run_until(
                run_id, "the reason", lambda run: run["invitations"] and run["invitations"][0]
            )
            [invitation] = run["invitations"]
            assert invitation["state"] == "declined"
            assert "nobody has signed a membership list yet" in invitation["reason"]
            assert stranger.bodies(Invitation) == []
