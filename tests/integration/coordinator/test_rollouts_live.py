"""Rollouts on a real coordinator and broker, with devices that do well or badly on request."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.messages import Desired, Presence, PresenceState
from tests.integration.coordinator.artifacts import artifact_of
from tests.integration.coordinator.fake_device import FakeDevice
from tests.integration.coordinator.live import Live, live, plan, until

QUICK: dict[str, Any] = {
    "waves": [{"devices": 1, "bake_s": 0.2}, {"percent": 100, "bake_s": 0.2}],
    "watch_s": 1,
}
BAKES = {**QUICK, "waves": [{"devices": 1, "bake_s": 3600}, {"percent": 100, "bake_s": 0}]}
ENDED = {"completed", "rolled_back", "dropped"}


class Fleet:
    """A coordinator, three devices, and two versions of which the first is current."""

    def __init__(self, service: Live, devices: dict[str, FakeDevice], old: str, new: str) -> None:
        self.service, self.devices, self.old, self.new = service, devices, old, new

    async def start(self, version: str, how: dict[str, Any]) -> dict[str, Any]:
        answer = await self.service.client.post(
            "/v1/rollouts", json={"version": version, "plan": how}
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def until_state(self, rollout: dict[str, Any], *states: str) -> dict[str, Any]:
        async def probe() -> dict[str, Any] | None:
            found = await self.service.get(f"/v1/rollouts/{rollout['rollout_id']}")
            return found if found["state"] in states else None

        return await until(f"the rollout to be {states}", probe)

    async def until_serving(self, rollout: dict[str, Any], count: int) -> dict[str, Any]:
        async def probe() -> dict[str, Any] | None:
            found = await self.service.get(f"/v1/rollouts/{rollout['rollout_id']}")
            serving = [d for d in found["devices"] if d["standing"] == "serving"]
            return found if len(serving) == count else None

        return await until(f"{count} devices to serve", probe)

    def serving(self) -> dict[str, str | None]:
        return {name: device.serves for name, device in self.devices.items()}

    async def state_of(self, version: str) -> str:
        return str((await self.service.get(f"/v1/models/{version}"))["state"])

    async def move(self, rollout: dict[str, Any], verb: str) -> dict[str, Any]:
        answer = await self.service.client.post(f"/v1/rollouts/{rollout['rollout_id']}/{verb}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


async def a_version(service: Live, *, deploy: bool) -> str:
    document = msgspec.structs.replace(plan(rounds=1), deploy=deploy)
    run = await service.ended(await service.start(document))
    assert run["state"] == "finished", run["cause"]
    return str(run["model_version"])


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with live(tmp_path) as service, AsyncExitStack() as stack:
        devices = {name: await service.enrol(name) for name in ("a", "b", "c")}
        for device in devices.values():
            await stack.enter_async_context(device.online())
        old = await a_version(service, deploy=True)
        new = await a_version(service, deploy=False)
        yield Fleet(service, devices, old, new)


async def test_a_good_version_goes_to_a_canary_and_then_to_all(fleet: Fleet) -> None:
    rollout = await fleet.start(fleet.new, QUICK)
    assert rollout["state"] == "rolling"
    assert [device["wave"] for device in rollout["devices"]] == [1]
    assert await fleet.state_of(fleet.new) == "canary"
    done = await fleet.until_state(rollout, *ENDED)
    assert (done["state"], done["previous_version"]) == ("completed", fleet.old)
    assert sorted(device["wave"] for device in done["devices"]) == [1, 2, 2]
    assert set(fleet.serving().values()) == {fleet.new}
    assert await fleet.state_of(fleet.new) == "current"
    assert await fleet.state_of(fleet.old) == "superseded"
    for device in fleet.devices.values():
        last = device.bodies(Desired)[-1]
        assert isinstance(last, Desired)

    async def nobody_is_watched() -> bool:
        said = [device.bodies(Desired)[-1] for device in fleet.devices.values()]
        return all(isinstance(body, Desired) and body.watch_s == 0 for body in said)

    await until("the watch to end", nobody_is_watched)


async def test_a_canary_that_refuses_the_version_turns_it_back_by_itself(fleet: Fleet) -> None:
    for device in fleet.devices.values():
        device.spurns.add(fleet.new)
    rollout = await fleet.start(fleet.new, QUICK)
    back = await fleet.until_state(rollout, *ENDED)
    canary = back["devices"][0]["device_id"]
    assert (back["state"], back["gate"], back["wave"]) == ("rolled_back", "deployment", 1)
    assert f"{canary}: the model did not survive its self-test" in back["cause"]
    assert {device["standing"] for device in back["devices"]} == {"returned"}
    assert await fleet.state_of(fleet.new) == "rolled_back"
    assert await fleet.state_of(fleet.old) == "current"
    assert set(fleet.serving().values()) == {fleet.old}


@pytest.mark.parametrize(
    ("figures", "gate"),
    [
        ({"requests": 40, "errors": 40}, "errors"),
        ({"crashes": 1}, "crashes"),
    ],
)
async def test_a_version_that_does_badly_in_service_is_turned_back(
    fleet: Fleet, figures: dict[str, Any], gate: str
) -> None:
    rollout = await fleet.until_serving(await fleet.start(fleet.new, BAKES), 1)
    canary = fleet.devices[rollout["devices"][0]["device_id"]]
    await canary.say_health(before=fleet.old, requests=3)
    await canary.say_health(before=fleet.old, **figures)
    back = await fleet.until_state(rollout, *ENDED)
    assert (back["state"], back["gate"]) == ("rolled_back", gate)

    async def everybody_is_back() -> bool:
        return set(fleet.serving().values()) == {fleet.old}

    await until("the canary to be back", everybody_is_back)


async def test_a_device_that_serves_an_unknown_file_is_named(fleet: Fleet) -> None:
    rollout = await fleet.until_serving(await fleet.start(fleet.new, BAKES), 1)
    canary = fleet.devices[rollout["devices"][0]["device_id"]]
    canary.serves = "f" * 64
    [*_, desired] = canary.bodies(Desired)
    assert isinstance(desired, Desired)
    await canary.say_serving(desired.version)
    back = await fleet.until_state(rollout, *ENDED)
    assert (back["state"], back["gate"]) == ("rolled_back", "digest")
    assert back["cause"].startswith(f"{canary.device_id} serves a digest that no version here has")


async def test_a_rollout_is_paused_resumed_and_aborted_by_hand(fleet: Fleet) -> None:
    rollout = await fleet.start(fleet.new, BAKES)

    async def bakes() -> bool:
        found = await fleet.service.get(f"/v1/rollouts/{rollout['rollout_id']}")
        return found["waiting"] == "wave 1 bakes" and found["until"] is not None

    await until("the wave to bake", bakes)
    paused = await fleet.move(rollout, "pause")
    assert (paused["state"], paused["cause"]) == ("paused", "paused by the operator")
    assert (await fleet.move(rollout, "resume"))["state"] == "rolling"
    answer = await fleet.service.client.post(f"/v1/rollouts/{rollout['rollout_id']}/resume")
    assert answer.status_code == 409
    await fleet.move(rollout, "abort")
    back = await fleet.until_state(rollout, *ENDED)
    assert (back["state"], back["cause"]) == ("rolled_back", "aborted by the operator")


async def test_a_second_rollout_waits_for_the_first_and_a_newer_plan_replaces_it(
    fleet: Fleet,
) -> None:
    first = await fleet.start(fleet.new, BAKES)
    third = await a_version(fleet.service, deploy=False)
    second = await fleet.start(third, QUICK)
    assert second["state"] == "planned"
    assert second["waiting"] == f"rollout {first['rollout_id']} is rolling"
    replacement = await fleet.start(third, QUICK)
    dropped = await fleet.until_state(second, *ENDED)
    assert (dropped["state"], dropped["cause"]) == ("dropped", "a newer one was planned")
    await fleet.move(first, "abort")
    done = await fleet.until_state(replacement, *ENDED)
    assert done["state"] == "completed"
    assert set(fleet.serving().values()) == {third}


async def test_a_late_device_joins_the_wave_that_is_open_to_all(fleet: Fleet) -> None:
    waves = [{"devices": 1, "bake_s": 0}, {"percent": 100, "bake_s": 3600}]
    rollout = await fleet.until_serving(await fleet.start(fleet.new, {**QUICK, "waves": waves}), 3)
    late = await fleet.service.enrol("late")
    async with late.online():
        joined = await fleet.until_serving(rollout, 4)
        assert {d["device_id"]: d["wave"] for d in joined["devices"]}["late"] == 2


async def test_a_device_that_was_away_during_a_rollback_goes_back_when_it_returns(
    fleet: Fleet,
) -> None:
    rollout = await fleet.until_serving(await fleet.start(fleet.new, BAKES), 1)
    canary = fleet.devices[rollout["devices"][0]["device_id"]]
    await canary.say(Presence(state=PresenceState.STOPPED, boot=canary.boot))
    canary.deaf = True
    await fleet.move(rollout, "abort")
    await fleet.until_state(rollout, "rolled_back")
    assert canary.serves == fleet.new
    canary.deaf = False
    await canary.say(Presence(state=PresenceState.READY, boot=canary.boot))
    await canary.say_hello()

    async def is_back() -> bool:
        return canary.serves == fleet.old

    await until("the device to be back", is_back)


@pytest.mark.parametrize(
    ("version", "how", "status", "sentence"),
    [
        (
            "new",
            {"waves": [{"devices": 1, "where": {"owner": "clinic-*"}}, {"percent": 100}]},
            400,
            "wave 1: owner = 'clinic-*' matches none of the 3 devices with data for 'digits' (a, b",
        ),
        ("old", QUICK, 409, "is what devices with data for 'digits' should serve already"),
        ("new", {"waves": []}, 400, "a rollout needs a wave"),
    ],
)
async def test_what_cannot_be_rolled_out_is_refused_and_changes_nothing(
    fleet: Fleet, version: str, how: dict[str, Any], status: int, sentence: str
) -> None:
    wanted = {"new": fleet.new, "old": fleet.old}[version]
    answer = await fleet.service.client.post("/v1/rollouts", json={"version": wanted, "plan": how})
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    states = [r["state"] for r in await fleet.service.get("/v1/rollouts")]
    assert states == ["completed"]
    assert set(fleet.serving().values()) == {fleet.old}


async def test_a_run_rolls_its_result_out_as_its_plan_says(fleet: Fleet) -> None:
    document = msgspec.to_builtins(plan(rounds=1))
    document["rollout"] = QUICK
    answer = await fleet.service.client.post("/v1/runs", json=document)
    run = await fleet.service.ended(answer.json()["run_id"])
    [newest, *_] = await fleet.service.get("/v1/rollouts")
    assert newest["version"] == run["model_version"]
    done = await fleet.until_state(newest, *ENDED)
    assert (done["state"], done["waves"]) == ("completed", 2)


async def test_a_coordinator_that_is_started_again_goes_on_with_its_rollouts(
    tmp_path: Path,
) -> None:
    waves = [{"devices": 1, "bake_s": 1}, {"percent": 100, "bake_s": 0}]
    async with AsyncExitStack() as stack:
        async with live(tmp_path) as service:
            device = await service.enrol("a")
            await stack.enter_async_context(device.online())
            old, new = await a_version(service, deploy=True), await a_version(service, deploy=False)
            fleet = Fleet(service, {"a": device}, old, new)
            rollout = await fleet.until_serving(
                await fleet.start(new, {**QUICK, "waves": waves}), 1
            )
        fleet.service = await stack.enter_async_context(live(tmp_path))
        done = await fleet.until_state(rollout, *ENDED)
    assert (done["state"], done["wave"]) == ("completed", 2)


async def test_a_planned_version_whose_files_are_gone_waits_with_its_cause_and_may_be_dropped(
    fleet: Fleet, tmp_path: Path
) -> None:
    first = await fleet.start(fleet.new, BAKES)
    third = await a_version(fleet.service, deploy=False)
    planned = await fleet.start(third, QUICK)
    artifact = hashlib.sha256(artifact_of(third)).hexdigest()
    (tmp_path / "home" / "blobs" / artifact[:2] / artifact).unlink()
    await fleet.move(first, "abort")

    async def says_why() -> dict[str, Any] | None:
        found = await fleet.service.get(f"/v1/rollouts/{planned['rollout_id']}")
        return found if artifact[:12] in found["waiting"] else None

    assert (await until("the cause", says_why))["state"] == "planned"
    dropped = await fleet.move(planned, "abort")
    assert (dropped["state"], dropped["cause"]) == ("dropped", "aborted by the operator")
