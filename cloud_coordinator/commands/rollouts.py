"""``shoal rollout``."""

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.models import full_version
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table
from cloud_coordinator.rollouts.lifecycle import UNFINISHED
from shared.errors import ShoalError
from shared.rollout_plan import read_rollout_plan

_LOOK_EVERY_S = 0.5

rollouts = typer.Typer(
    help="Versions on their way to the devices, wave by wave.", no_args_is_help=True
)
Watch = Annotated[bool, typer.Option("--watch", help="Say what happens until it ends or halts.")]


@rollouts.command("start")
def start_rollout(
    version: str,
    home: Home = DEFAULT_HOME,
    *,
    plan: Annotated[
        Path | None, typer.Option(help="TOML file with waves and gates; default: all at once.")
    ] = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Let all devices with data for the version's task serve it, now and later."""
    given = None if plan is None else msgspec.to_builtins(read_rollout_plan(plan))
    client = ApiClient(home)
    asked = {"version": full_version(client, version), "plan": given}
    answer = client.post("/v1/rollouts", asked)
    if watch:
        answer = _watch(client, answer)
    _print(answer, as_json=as_json)


@rollouts.command("list")
def list_rollouts(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List rollouts, the newest first."""
    answer = ApiClient(home).get("/v1/rollouts")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            rollout["rollout_id"],
            rollout["task"],
            digest(rollout["version"]),
            rollout["state"],
            f"{rollout['wave']} of {rollout['waves']}",
            _because(rollout),
            moment(rollout["created_at"]),
        )
        for rollout in answer
    ]
    columns = ("rollout", "task", "version", "state", "wave", "", "planned (UTC)")
    print_table(columns, rows, empty="no rollouts yet; 'shoal rollout start VERSION' makes one")


@rollouts.command("show")
def show_rollout(
    rollout: str, home: Home = DEFAULT_HOME, *, watch: Watch = False, as_json: AsJson = False
) -> None:
    """Show how far a rollout is, and where each of its devices stands."""
    client = ApiClient(home)
    answer = client.get(f"/v1/rollouts/{rollout}")
    if watch:
        answer = _watch(client, answer)
    _print(answer, as_json=as_json)


@rollouts.command("pause")
def pause_rollout(rollout: str, home: Home = DEFAULT_HOME) -> None:
    """Open no further wave; what is served stays, and is still watched."""
    _move(home, rollout, "pause")


@rollouts.command("resume")
def resume_rollout(rollout: str, home: Home = DEFAULT_HOME) -> None:
    """Go on with a paused rollout where it stopped."""
    _move(home, rollout, "resume")


@rollouts.command("abort")
def abort_rollout(rollout: str, home: Home = DEFAULT_HOME) -> None:
    """Drop a planned rollout; turn one back that has begun."""
    _move(home, rollout, "abort")


def _move(home: Path, rollout: str, verb: str) -> None:
    answer = ApiClient(home).post(f"/v1/rollouts/{rollout}/{verb}")
    typer.echo(f"rollout {rollout} is {answer['state']}{_colon(_because(answer))}")


def _watch(client: ApiClient, rollout: dict[str, Any]) -> dict[str, Any]:
    """Say each change until the rollout has ended or waits for a person.

    Raises:
        ShoalError: it was turned back or dropped; says why.
    """
    said = ""
    while True:
        what = f"{rollout['state']}{_colon(_because(rollout))}"
        if what != said:
            said = what
            typer.echo(f"rollout {rollout['rollout_id']} is {what}", err=True)
        state = rollout["state"]
        if state in {"rolled_back", "dropped", "paused"}:
            raise ShoalError(f"rollout {rollout['rollout_id']} is {what}")
        if state not in UNFINISHED:
            return rollout
        time.sleep(_LOOK_EVERY_S)
        rollout = client.get(f"/v1/rollouts/{rollout['rollout_id']}")


def _print(rollout: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(rollout)
        return
    print_facts(
        {
            "rollout": rollout["rollout_id"],
            "task": rollout["task"],
            "version": digest(rollout["version"]),
            "before": digest(rollout["previous_version"]),
            "state": f"{rollout['state']}, wave {rollout['wave']} of {rollout['waves']}",
            "": _because(rollout),
        }
    )
    rows = [
        (
            member["device_id"],
            str(member["wave"]),
            member["standing"],
            moment(member["serving_since"]),
            _health(member["served"]),
            member["cause"],
        )
        for member in rollout["devices"]
    ]
    columns = ("device", "wave", "standing", "serves it since (UTC)", "how", "")
    print_table(columns, rows, empty="no devices yet")


def _because(rollout: dict[str, Any]) -> str:
    """Say why it is as it is: the gate that was broken, or what it waits for."""
    gate = f"{rollout['gate']}: " if rollout["gate"] else ""
    if rollout["cause"]:
        return gate + str(rollout["cause"])
    until = f", until {moment(rollout['until'])}" if rollout["until"] else ""
    return str(rollout["waiting"]) + until


def _health(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    latency = "" if figures["p95_ms"] is None else f", p95 {figures['p95_ms']:.2f} ms"
    return f"{figures['requests']} requests, {figures['errors']} errors{latency}"


def _colon(text: str) -> str:
    return f": {text}" if text else ""
