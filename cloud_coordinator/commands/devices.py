"""``shoal token`` and ``shoal device``."""

from typing import Annotated, Any

import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table

tokens = typer.Typer(help="Join tokens, with which devices enrol.", no_args_is_help=True)
devices = typer.Typer(help="Enrolled devices.", no_args_is_help=True)


@tokens.command("create")
def create_token(
    home: Home = DEFAULT_HOME,
    *,
    uses: Annotated[int, typer.Option(help="Devices that may join with it.", min=1)] = 1,
    ttl: Annotated[float, typer.Option(help="Seconds until it expires.", min=1)] = 3600,
    owner: Annotated[
        str, typer.Option(help="Whose the devices are; the membership list says so to all devices.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print a new join token. It is shown this once; the coordinator keeps only a hash."""
    answer = ApiClient(home).post("/v1/tokens", {"uses": uses, "ttl_s": ttl, "owner": owner})
    if as_json:
        print_json(answer)
    else:
        typer.echo(answer["token"])


@tokens.command("list")
def list_tokens(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List join tokens, without their secrets."""
    answer = ApiClient(home).get("/v1/tokens")
    if as_json:
        print_json(answer)
        return
    rows = [
        (t["token_id"], str(t["uses_left"]), moment(t["expires_at"]), t["owner"] or "-")
        for t in answer
    ]
    columns = ("token", "uses left", "expires (UTC)", "owner")
    print_table(columns, rows, empty="no join tokens yet")


@devices.command("list")
def list_devices(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List devices: who is online, which tasks they have data for, what they serve."""
    answer = ApiClient(home).get("/v1/devices")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            device["device_id"],
            _presence(device),
            moment(device["last_seen_at"]),
            ", ".join(device["tasks"]) or "-",
            digest((device["reported"] or {}).get("serving_version")),
            _membership(device),
        )
        for device in answer
    ]
    columns = ("device", "presence", "last seen (UTC)", "tasks", "serves", "in sums")
    print_table(columns, rows, empty="no devices yet; 'shoal token create' begins")


@devices.command("show")
def show_device(device_id: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show all that is known of one device."""
    device = ApiClient(home).get(f"/v1/devices/{device_id}")
    if as_json:
        print_json(device)
        return
    reported, desired = device["reported"] or {}, device["desired"] or {}
    hello = device["hello"] or {}
    print_facts(
        {
            "device": device["device_id"],
            "presence": _presence(device),
            "last seen": moment(device["last_seen_at"]),
            "enrolled": moment(device["enrolled_at"]),
            "owner": device["owner"] or "-",
            "in sums": _membership(device),
            "tasks": ", ".join(device["tasks"]) or "-",
            "machine": _machine(hello.get("cpu_count"), hello.get("memory_bytes")),
            "agent": hello.get("agent_version", "-"),
            "should serve": digest(desired.get("model_version")),
            "serves": digest(reported.get("serving_version")),
            "deployment": reported.get("deployment", "-"),
            "cause": reported.get("cause") or "-",
        }
    )


def _presence(device: dict[str, Any]) -> str:
    if device["last_seen_at"] is None:
        return "never seen"  # enrolled, not started yet; not a device that was lost
    return "online" if device["online"] else str(device["presence"])


def _membership(device: dict[str, Any]) -> str:
    if device["revoked_at"] is not None:
        return f"never again; revoked {moment(device['revoked_at'])}"
    return "yes" if device["listed"] else "waits for the membership list"


def _machine(cpu_count: int | None, memory_bytes: int | None) -> str:
    if cpu_count is None or memory_bytes is None:
        return "-"
    return f"{cpu_count} cores, {memory_bytes / 2**30:.1f} GiB"
