"""`shoal serve` as a real process: killed, stopped and started again; and what a person reads."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_coordinator.blobs import BlobStore
from shared.listening import free_port
from tests.integration.coordinator.fake_device import FakeDevice
from tests.integration.coordinator.fake_worker import parameters_after
from tests.integration.coordinator.live import until
from tests.integration.coordinator.served import TIME_LIMIT_S, Served, shoal

EVERYWHERE = "0.0.0.0"  # noqa: S104  # to be refused
SERVE = (sys.executable, "-m", "cloud_coordinator", "serve")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    service = Served(tmp_path)
    await service.start()
    yield service
    if service.process.returncode is None:
        await service.end(signal.SIGTERM)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def all_gone(pids: set[int]) -> None:
    async def probe() -> bool:
        return not any(map(is_alive, pids))

    await until(f"the end of {pids}", probe)


async def test_a_run_survives_kill_9_of_the_coordinator_and_ends_by_itself(served: Served) -> None:
    (served.requests / "hold-2").touch()
    device = await FakeDevice.enrol(served.url, served.token, "a")
    async with device.online():
        run_id = await served.start_run()
        await served.in_round_2(run_id)
        children = served.children()
        assert len(children) == 3  # broker, SuperLink, worker
        await served.end(signal.SIGKILL)
        await all_gone(children)

        (served.requests / "hold-2").unlink()
        await served.start()
        run = await served.ended(run_id)
    assert run["state"] == "finished"
    assert [record["round_number"] for record in run["rounds"]] == [0, 1, 2, 3]
    last = BlobStore(served.home / "blobs").read(run["rounds"][3]["parameters_sha256"])
    assert last == parameters_after(3)
    lives = (served.requests / "starts").read_text().splitlines()
    assert [life.split()[1] for life in lives] == ["1", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_every_child_and_the_next_start_goes_on(
    served: Served, number: signal.Signals
) -> None:
    (served.requests / "hold-2").touch()
    device = await FakeDevice.enrol(served.url, served.token, "a")
    async with device.online():
        run_id = await served.start_run()
        await served.in_round_2(run_id)
        children = served.children()
        assert await served.end(number) == 0
        assert not any(map(is_alive, children))
        assert "Traceback" not in served.log.read_text()

        (served.requests / "hold-2").unlink()
        await served.start()
        assert (await served.ended(run_id))["state"] == "finished"


async def test_a_killed_worker_process_is_replaced(served: Served) -> None:
    (served.requests / "hold-2").touch()
    device = await FakeDevice.enrol(served.url, served.token, "a")
    async with device.online():
        before = served.children()
        run_id = await served.start_run()
        await served.in_round_2(run_id)
        [worker] = served.children() - before
        os.kill(worker, signal.SIGKILL)
        (served.requests / "hold-2").unlink()
        run = await served.ended(run_id)
    assert run["state"] == "finished"
    assert [record["round_number"] for record in run["rounds"]] == [0, 1, 2, 3]


async def serve(*options: str | Path) -> tuple[int, str]:
    """Run ``shoal serve`` as a process of its own to its end; return status and error output."""
    process = await asyncio.create_subprocess_exec(*SERVE, *options, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(TIME_LIMIT_S):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def test_an_operator_starts_and_watches_a_run(served: Served, tmp_path: Path) -> None:
    home = ("--home", served.home)
    device = await FakeDevice.enrol(served.url, served.token, "camera-1")
    file = tmp_path / "plan.toml"
    file.write_text(
        'name = "nightly"\nrounds = 2\ndeploy = false\n[task]\nname = "digits"\nuses = "u"\n'
        '[privacy]\nmode = "plain"\n'
    )
    async with device.online():
        status, out, err = await shoal("run", "start", file, "--watch", "--json", *home)
    run = json.loads(out)
    assert (status, run["state"]) == (0, "finished"), err
    assert "committed" in err

    for command, expected in {
        ("token", "list"): "uses left",
        ("device", "list"): "camera-1",
        ("device", "show", "camera-1"): "should serve",
        ("run", "list"): run["run_id"],
        ("run", "show", run["run_id"]): "loss=",
        ("model", "list"): run["model_version"][:12],
        ("model", "note", run["model_version"][:8], "for | the spring"): "noted about",
        ("model", "show", run["model_version"][:8]): "2 rounds",
        ("model", "list", "--text", "SPRING"): run["model_version"][:12],
        ("model", "list", "--state", "rejected"): "no model version fits",
        ("model", "card", run["model_version"][:8]): "for \\| the spring",
        ("model", "compare", run["model_version"][:8], run["model_version"][:9]): "rounds",
        ("rollout", "start", run["model_version"][:8]): "completed, wave 1 of 1",
        ("rollout", "list"): "completed",
    }.items():
        status, out, err = await shoal(*command, *home)
        assert (status, err) == (0, "")
        assert expected in out
    status, out, _ = await shoal("device", "list", "--json", *home)
    assert json.loads(out)[0]["device_id"] == "camera-1"


async def test_commands_say_what_is_wrong_in_one_sentence(served: Served, tmp_path: Path) -> None:
    bad_plan = tmp_path / "bad.toml"
    bad_plan.write_text('name = "x"\nruonds = 3\n[task]\nname = "t"\nuses = "u"\n')
    home = ("--home", served.home)
    sentences: dict[tuple[str | Path, ...], str] = {
        ("run", "start", bad_plan, *home): "unknown key 'ruonds' at the top; did you mean 'rounds'",
        ("run", "start", tmp_path / "none.toml", *home): "cannot read",
        ("run", "show", "nothing", *home): "there is no run 'nothing'",
        ("run", "stop", "nothing", *home): "there is no run 'nothing'",
        ("device", "show", "nobody", *home): "there is no device 'nobody'",
        ("model", "show", "abc", *home): "no model version begins with 'abc'",
        ("model", "list", "--state", "x", *home): "there is no state 'x'; choose one of: candidate",
        ("run", "list", "--home", tmp_path / "x"): "no coordinator was started in",
    }
    for argv, sentence in sentences.items():
        status, out, err = await shoal(*argv)
        assert (status, out) == (1, ""), argv
        assert sentence in err
        assert err.count("\n") == 1
    await served.end(signal.SIGTERM)
    status, _, err = await shoal("run", "list", *home)
    assert status == 1
    assert "no coordinator answers at" in err
    assert "start it with 'shoal serve --home" in err


async def test_serve_does_not_share_its_home_or_its_port(served: Served, tmp_path: Path) -> None:
    status, err = await serve("--home", served.home)
    assert status == 1
    assert f"shoal: another coordinator (process {served.process.pid}) serves" in err
    port = served.url.rpartition(":")[2]
    status, err = await serve("--home", tmp_path / "other", "--port", port)
    assert status == 1
    assert err.endswith(
        f"shoal: port {port} on 127.0.0.1 is in use, so the API cannot start; "
        "stop the other program or choose another port with --port\n"
    )


async def test_serve_refuses_bad_settings_in_one_sentence(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("prot = 1\n")
    home = ("--home", tmp_path / "home")
    away = f"postgresql://shoal@127.0.0.1:{free_port()}/shoal"
    sentences: dict[tuple[str | Path, ...], str] = {
        ("--config", settings): "unknown key 'prot'",
        ("--host", EVERYWHERE): "the coordinator cannot listen on '0.0.0.0'",
        ("--broker", "rabbit"): "broker 'rabbit' is not known",
        ("--database", "elsewhere"): "no database URL",
        ("--database", away): "start it or mend --database",
        ("--log-level", "LOUD"): "log_level in the settings",
    }
    for options, sentence in sentences.items():
        status, _, err = await shoal("serve", *home, *options, "--port", "0", "--mqtt-port", "0")
        assert status == 1
        assert sentence in err
        assert "Traceback" not in err
        assert err.startswith("shoal: ")


async def test_serve_names_the_port_of_the_broker_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = ("--port", "0", "--fleet-port", "0", "--mqtt-port", str(port))
        status, err = await serve("--home", tmp_path, *options)
    assert status == 1
    assert err.splitlines()[-1] == (
        f"shoal: port {port} on 127.0.0.1 is in use, so the embedded broker cannot start; "
        "stop the other program or choose another port with --mqtt-port"
    )
    assert "Traceback" not in err


async def test_broker_config_is_written_where_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said, err = await shoal("broker", "config", "--out", out, "--port", "1999", "--json")
    assert (status, err) == (0, "")
    assert json.loads(said) == {"path": str(out / "mosquitto.conf")}
    assert "listener 1999 127.0.0.1" in (out / "mosquitto.conf").read_text()
    status, _, err = await shoal("broker", "config", "--out", out, "--host", EVERYWHERE)
    assert status == 1
    assert "no certificates yet" in err
