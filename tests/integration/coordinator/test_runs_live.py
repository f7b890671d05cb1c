"""Whole runs through a real broker and database, with a worker that misbehaves on request."""

import asyncio
import hashlib
import os
import signal
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cloud_coordinator.app import Coordinator
from cloud_coordinator.broker import BrokerPlan, start_broker
from cloud_coordinator.rounds.worker_messages import RoundRecord
from cloud_coordinator.runs.lifecycle import RunEvent
from cloud_coordinator.runs.records import RunRecords
from cloud_coordinator.runs.tables import RunRow
from cloud_coordinator.settings import choose_ports
from shared.listening import free_port
from shared.messages import (
    DismissFromRun,
    Invitation,
    JoinedRun,
    LeftRun,
    Notice,
    Nudge,
    Presence,
    PresenceState,
    utc_now,
)
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import RunPlan
from shared.statistics.questions import Count, StatisticsQuestion
from shared.statistics.vectors import Answer
from tests.integration.coordinator.artifacts import artifact_of
from tests.integration.coordinator.fake_parts import fake_parts, quick_settings
from tests.integration.coordinator.fake_worker import parameters_after
from tests.integration.coordinator.live import live, plan, until


def result_of(coordinator: Coordinator, run: dict) -> bytes:  # type: ignore[type-arg]  # JSON
    return coordinator.blobs.read(run["rounds"][-1]["parameters_sha256"])


async def test_a_run_goes_from_plan_to_a_version_that_devices_serve(tmp_path: Path) -> None:
    async with live(tmp_path) as service, AsyncExitStack() as stack:
        devices = [await service.enrol(name) for name in ("a", "b")]
        for device in devices:
            await stack.enter_async_context(device.online())
        run = await service.ended(await service.start(plan(quorum=2)))

        assert run["state"] == "finished"
        assert [record["round_number"] for record in run["rounds"]] == [0, 1, 2, 3]
        assert result_of(service.coordinator, run) == parameters_after(3)
        took_part = {p["device_id"] for p in run["rounds"][3]["participations"]}
        assert took_part == {"a", "b"}
        assert {i["device_id"]: i["state"] for i in run["invitations"]} == {
            "a": "joined",
            "b": "joined",
        }

        async def everybody_serves_it() -> bool:
            rows = await service.get("/v1/devices")
            return all(
                (row["reported"] or {}).get("serving_version") == run["model_version"]
                for row in rows
            )

        await until("the version to be served", everybody_serves_it)
        [version] = await service.get("/v1/models")
        assert version["state"] == "current"
        assert all(device.bodies(DismissFromRun) for device in devices)


async def test_a_run_that_lacks_devices_says_for_how_many_it_waits(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        only = await service.enrol("only")
        async with only.online():
            run_id = await service.start(plan(quorum=2, rounds=1))
            run = await service.run_until(
                run_id, "one to have joined", lambda run: "1 of 2 joined" in run["waiting"]
            )
            assert run["waiting"].startswith("waiting for 1 more device (1 of 2 joined), since ")
            assert ", until " in run["waiting"]
            assert run["state"] == "recruiting"

            late = await service.enrol("late")
            async with late.online():  # invited because it comes while it is wanted
                run = await service.ended(run_id)
    assert run["state"] == "finished"
    assert {p["device_id"] for p in run["rounds"][1]["participations"]} == {"only", "late"}


async def test_a_no_is_kept_with_its_reason_and_others_go_on(tmp_path: Path) -> None:
    async with live(tmp_path) as service, AsyncExitStack() as stack:
        willing, unwilling = await service.enrol("willing"), await service.enrol("unwilling")
        unwilling.refuses = "its owner allows training at night only"
        for device in (willing, unwilling):
            await stack.enter_async_context(device.online())
        run_id = await service.start(plan(rounds=1))
        await service.run_until(
            run_id, "the no", lambda run: any(i["state"] == "declined" for i in run["invitations"])
        )
        run = await service.ended(run_id)
    reasons = {i["device_id"]: i["reason"] for i in run["invitations"]}
    assert reasons["unwilling"] == "its owner allows training at night only"
    assert run["state"] == "finished"


async def test_a_device_without_the_task_is_not_asked(tmp_path: Path) -> None:
    async with live(tmp_path) as service, AsyncExitStack() as stack:
        fit, other = await service.enrol("fit"), await service.enrol("other")
        other.tasks = ("weather",)
        for device in (fit, other):
            await stack.enter_async_context(device.online())
        run = await service.ended(await service.start(plan(rounds=1)))
        assert [i["device_id"] for i in run["invitations"]] == ["fit"]
        assert other.bodies(Invitation) == []


async def test_a_killed_worker_goes_on_from_the_last_commit(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("crash-2")
        device = await service.enrol("a")
        async with device.online():
            run = await service.ended(await service.start(plan()))
        first, second = service.starts
        assert first.endswith(" 1")
        assert second.endswith(" 2")
        assert first.split()[0] != second.split()[0]  # a session of its own
        assert [record["round_number"] for record in run["rounds"]] == [0, 1, 2, 3]
        assert result_of(service.coordinator, run) == parameters_after(3)
        sessions = {i.session_id for i in device.bodies(Invitation)}  # type: ignore[union-attr]
        assert len(sessions) == 2


async def test_a_worker_that_breaks_the_protocol_is_replaced(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("babble")
        device = await service.enrol("a")
        async with device.online():
            run = await service.ended(await service.start(plan(rounds=1)))
        assert run["state"] == "finished"
        assert len(service.starts) == 2


async def test_a_worker_that_crashes_again_and_again_ends_the_run_with_the_cause(
    tmp_path: Path,
) -> None:
    async with live(tmp_path) as service:
        service.ask("crash-always")
        run = await service.ended(await service.start(plan()))
        assert run["state"] == "failed"
        assert "gave up after 3 crashes in a row" in run["cause"]
        assert "status 3" in run["cause"]
        assert len(service.starts) == 3


async def test_a_run_that_is_started_while_active_ones_are_read_is_driven_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, read_active = threading.Event(), RunRecords.active

    def read_late(records: RunRecords) -> list[RunRow]:
        assert started.wait(30)
        return list(read_active(records))

    monkeypatch.setattr(RunRecords, "active", read_late)
    async with live(tmp_path) as service:
        service.ask("crash-always")
        run_id = await service.start(plan())
        started.set()
        await service.ended(run_id)
        assert len(service.starts) == 3


async def test_a_worker_that_gives_up_ends_the_run_at_once(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("fail")
        run = await service.ended(await service.start(plan()))
        assert (run["state"], run["cause"]) == ("failed", "the plan asks for the impossible")
        assert len(service.starts) == 1


async def test_a_model_that_cannot_be_shipped_fails_the_run_with_the_reason(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        device = await service.enrol("a")
        async with device.online():
            run = await service.ended(await service.start(plan("unfit", rounds=1)))
    assert run["state"] == "failed"
    assert run["cause"] == "the exported model computes something else"


async def test_a_dead_superlink_is_replaced_and_everybody_is_invited_again(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("hold-2")
        device = await service.enrol("a")
        async with device.online():
            run_id = await service.start(plan())
            await service.in_round(run_id, 2)
            os.kill(service.coordinator.superlink.current().pid, signal.SIGKILL)

            async def second_life() -> bool:
                return len(service.starts) == 2

            await until("a new session", second_life)
            service.unask("hold-2")
            run = await service.ended(run_id)
            health = await service.get("/v1/health")
        assert run["state"] == "finished"
        assert result_of(service.coordinator, run) == parameters_after(3)
        assert health["children"]["superlink"]["restarts"] == 1
        assert health["children"]["superlink"]["last_cause"] == "ended with status -9"


async def test_a_lost_device_leaves_the_round_and_is_invited_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with live(tmp_path) as service, AsyncExitStack() as stack:
        stays, goes = await service.enrol("stays"), await service.enrol("goes")
        goes.trains = False  # the round would wait for it
        await stack.enter_async_context(stays.online())
        async with goes.online():
            run_id = await service.start(plan(quorum=2, rounds=2))
            await service.in_round(run_id, 1)
            await goes.say(Presence(state=PresenceState.STOPPED, boot=goes.boot))
            run = await service.run_until(
                run_id, "round 1 without it", lambda run: len(run["rounds"]) == 2
            )
            absent = [p for p in run["rounds"][1]["participations"] if p["outcome"] == "dropped"]
            assert [p["device_id"] for p in absent] == ["goes"]

            goes.trains = True
            await goes.say(Presence(state=PresenceState.READY, boot=goes.boot))
            run = await service.ended(run_id)
    assert run["state"] == "finished"
    assert {p["device_id"] for p in run["rounds"][2]["participations"]} == {"stays", "goes"}


async def test_a_trainer_that_ends_is_asked_again(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("hold-1")
        device = await service.enrol("a")
        async with device.online():
            run_id = await service.start(plan(rounds=1))
            await service.in_round(run_id, 1)
            [invitation] = device.bodies(Invitation)
            assert isinstance(invitation, Invitation)
            await device.say(LeftRun(invitation.run_id, invitation.session_id, "out of memory"))

            async def asked_again() -> bool:
                return len(device.bodies(Invitation)) == 2

            await until("a second invitation", asked_again)
            service.unask("hold-1")
            run = await service.ended(run_id)
    assert run["state"] == "finished"


async def test_a_stopped_run_ends_its_worker_and_dismisses_its_devices(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("hold-2")
        device = await service.enrol("a")
        async with device.online():
            run_id = await service.start(plan())
            await service.in_round(run_id, 2)
            answer = await service.client.post(f"/v1/runs/{run_id}/stop")
            assert answer.status_code == 200
            run = await service.ended(run_id)

            async def dismissed() -> bool:
                return bool(device.bodies(DismissFromRun))

            await until("the dismissal", dismissed)
        assert (run["state"], run["cause"]) == ("stopped", "stopped by the operator")
        assert [record["round_number"] for record in run["rounds"]] == [0, 1]
        again = await service.client.post(f"/v1/runs/{run_id}/stop")
        assert again.status_code == 409
        assert again.json()["error"] == f"run {run_id} cannot be stopped: it is stopped"


async def test_a_durable_message_is_stored_once_and_acknowledged_each_time(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        device = await service.enrol("a")
        async with device.online():
            sent = await device.say(JoinedRun("no-such-run", "s"))

            async def acknowledged() -> bool:
                return sent.id in device.acknowledged()

            await until("the first ack", acknowledged)
            device.heard.clear()
            await device.publish(sent)
            await until("the second ack", acknowledged)
        assert service.coordinator.link.received["JoinedRun"] == 2


async def test_messages_that_cannot_be_trusted_are_counted_and_change_nothing(
    tmp_path: Path,
) -> None:
    async with live(tmp_path) as service:
        victim, thief = await service.enrol("victim"), await service.enrol("thief")
        async with thief.online():
            forged = thief.outgoing(Presence(state=PresenceState.READY, boot="x"))
            topic = forged.topic.replace("/thief/", "/victim/")
            for other in (topic, topic.replace("/victim/", "/nobody/")):
                await thief.publish_raw(type(forged)(other, forged.payload))
            await thief.publish_raw(type(forged)(forged.topic.replace("presence", "hello"), b"{"))

            async def counted() -> bool:
                return service.coordinator.link.refused.total() == 3

            await until("three refusals", counted)
            assert (await service.get("/v1/devices/victim"))["presence"] == "lost"
        assert dict(service.coordinator.link.refused) == {"bad-message": 2, "unknown-device": 1}
        assert victim.heard == []


async def test_idle_trainers_hear_from_us_before_their_lease_ends(tmp_path: Path) -> None:
    async with live(tmp_path, lease_s=1.0) as service:
        service.ask("hold-1")
        device = await service.enrol("a")
        async with device.online():
            run_id = await service.start(plan(rounds=1))

            async def nudged_often() -> bool:
                return len(device.bodies(Nudge)) >= 3

            await until("the third nudge", nudged_often)
            service.unask("hold-1")
            await service.ended(run_id)


async def test_a_coordinator_that_is_stopped_and_started_goes_on_with_its_runs(
    tmp_path: Path,
) -> None:
    async with live(tmp_path) as service:
        service.ask("hold-2")
        device = await service.enrol("a")
        task = asyncio.create_task(device.stay())
        run_id = await service.start(plan())
        await service.in_round(run_id, 2)
    assert [n.kind for n in device.bodies(Notice)] == ["restarting"]  # type: ignore[union-attr]
    async with live(tmp_path) as service:
        assert (await service.get(f"/v1/runs/{run_id}"))["state"] in {"running", "recruiting"}
        service.unask("hold-2")
        run = await service.ended(run_id)  # the device came back by itself
        assert run["state"] == "finished"
        assert result_of(service.coordinator, run) == parameters_after(3)
        assert len(service.starts) == 2
    task.cancel()
    await asyncio.wait({task})


async def test_a_returning_device_is_told_what_to_serve(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        trainer, absent = await service.enrol("trainer"), await service.enrol("absent")
        async with trainer.online():
            run = await service.ended(await service.start(plan(rounds=1)))
        async with absent.online():

            async def serves_it() -> bool:
                row = await service.get("/v1/devices/absent")
                return bool((row["reported"] or {}).get("serving_version") == run["model_version"])

            await until("the late device to serve it", serves_it)
            await absent.say_hello()
            await asyncio.gather(*(service.get("/v1/devices") for _ in range(3)))
            row = await service.get("/v1/devices/absent")
            assert row["desired"]["version"] == 1  # nothing new, so the version stays


async def test_a_run_ends_on_every_database(tmp_path: Path, database_url: str) -> None:
    async with live(tmp_path, database=database_url) as service:
        service.ask("crash-2")
        device = await service.enrol("a")
        async with device.online():
            run = await service.ended(await service.start(plan()))
        assert run["state"] == "finished"
        assert result_of(service.coordinator, run) == parameters_after(3)


async def test_a_dead_broker_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        service.ask("hold-2")
        device = await service.enrol("a")
        async with device.online():
            run_id = await service.start(plan())
            await service.in_round(run_id, 2)
            os.kill(service.coordinator.broker.current().pid, signal.SIGKILL)

            async def is_back() -> bool:
                health = await service.get("/v1/health")
                return bool(
                    health["children"]["broker"]["restarts"] == 1 and health["status"] == "ok"
                )

            await until("the broker to be back", is_back)
            service.unask("hold-2")
            run = await service.ended(run_id)
        assert run["state"] == "finished"
        assert len(service.starts) == 1  # the same session all the time


async def test_a_broker_that_is_away_is_waited_for(tmp_path: Path) -> None:
    plan_of_broker = BrokerPlan("embedded", "127.0.0.1", free_port())
    (tmp_path / "requests").mkdir()
    settings = choose_ports(quick_settings(tmp_path / "home", broker=plan_of_broker.url))
    coordinator = Coordinator(settings, fake_parts(tmp_path / "requests"))
    async with coordinator.running():
        assert [supervisor.name for supervisor in coordinator.supervisors] == ["superlink"]
        assert not coordinator.link.connected
        broker = await start_broker(plan_of_broker, home=tmp_path)
        try:
            async with asyncio.timeout(60):
                await coordinator.link.wait_connected()
        finally:
            await broker.stop()


async def test_blobs_that_nothing_needs_are_removed_between_runs(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        device = await service.enrol("a")
        async with device.online():
            run = await service.ended(await service.start(plan(rounds=5)))
        digests = [record["parameters_sha256"] for record in run["rounds"]]
        artifact = hashlib.sha256(artifact_of(run["model_version"])).hexdigest()

        async def only_the_last_are_left() -> bool:
            folder = tmp_path / "home" / "blobs"
            return {path.name for path in folder.glob("??/*")} == {*digests[-2:], artifact}

        await until("the others to be removed", only_the_last_are_left)


async def test_a_run_whose_answers_were_saved_before_a_crash_is_not_asked_again(
    tmp_path: Path,
) -> None:
    asks = RunPlan(
        name="ages",
        task=plan().task,
        statistics=StatisticsQuestion(of=(Count(),)),
        privacy=PrivacyPlan(noise="distributed"),
    )
    now = utc_now()
    answer = Answer(kind="count", feature="", values={"count": 7.0}, standard_error={})
    answered = RoundRecord(
        round_number=1,
        state="committed",
        started_at=now,
        closed_at=now,
        participations=(),
        metrics={},
        answers=(answer,),
    )
    async with live(tmp_path) as service:
        records = service.coordinator.records
        run_id = (await asyncio.to_thread(records.create, asks)).run_id
        await asyncio.to_thread(records.move, run_id, RunEvent.DEVICES_LACKING)
        await asyncio.to_thread(records.save_round, run_id, answered)

    async with live(tmp_path) as service:
        run = await service.ended(run_id)
        assert service.starts == []

    assert (run["state"], run["purpose"], run["model_version"]) == ("finished", "statistics", None)
    assert run["rounds"][0]["answers"][0]["values"] == {"count": 7.0}
