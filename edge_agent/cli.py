"""``shoal-agent``: enrol this device, run its daemon, see how it is, name its data."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from pydantic import ValidationError

from edge_agent import data_commands
from edge_agent.agent import run_agent
from edge_agent.enrolment import enroll as join
from edge_agent.enrolment import load_enrolment
from edge_agent.privacy import ledger_commands, policy_commands
from edge_agent.settings import AgentSettings
from edge_agent.state import AgentState, only_agent_of
from edge_agent.status import STATE_FILE, describe, read_status
from shared.errors import ConfigError, ShoalError, innermost
from shared.logs import configure_logging
from shared.messages import utc_now

app = typer.Typer(
    help="The agent of one edge device: it trains on data that stay here, and serves the result.",
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, and those may be secrets
    no_args_is_help=True,
)
app.add_typer(data_commands.app, name="data")
app.add_typer(policy_commands.app, name="policy")
app.add_typer(ledger_commands.app, name="privacy")

Home = Annotated[Path, typer.Option(help="The agent's state folder.", envvar="SHOAL_AGENT_HOME")]


@app.command()
def enroll(
    home: Home,
    *,
    coordinator: Annotated[str, typer.Option(help="The coordinator's API, http://host:port.")],
    token: Annotated[
        str,
        typer.Option(help="What 'shoal token create' printed.", envvar="SHOAL_AGENT_TOKEN"),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name wished for: small letters, digits, hyphens (default: given)."),
    ] = None,
    fleet_key: Annotated[
        str | None,
        typer.Option(
            help="Fingerprint that the fleet key must have, learned from somebody else than the "
            "coordinator (default: believe the coordinator)."
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            help="Fingerprint that the TUF root must have, as 'shoal trust status' prints it "
            "(default: believe the coordinator)."
        ),
    ] = None,
) -> None:
    """Join a coordinator: make this device's keys, prove them, pin the coordinator's."""
    enrolment = join(home, coordinator, token, name, fleet_key_id=fleet_key, root_fingerprint=root)
    typer.echo(
        f"enrolled as {enrolment.device_id}; name its data with 'shoal-agent data add --home "
        f"{home} …', then start it with 'shoal-agent run --home {home}'"
    )


@app.command()
def run(
    home: Home,
    inference_port: Annotated[
        int | None,
        typer.Option(help="Port of the inference server; 0 takes a free one (default 8480)."),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Serve gRPC on this port, too; 0 takes a free one (default: no gRPC)."),
    ] = None,
    telemetry_interval_s: Annotated[
        float | None, typer.Option(help="Seconds between telemetry messages (default 60).")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error (default info).")
    ] = None,
) -> None:
    """Run the daemon until it is told to stop (SIGTERM or Ctrl-C)."""
    settings = _read_settings(
        home=home,
        inference_port=inference_port,
        grpc_port=grpc_port,
        telemetry_interval_s=telemetry_interval_s,
        log_level=log_level,
    )
    configure_logging(settings.log_level)
    enrolment = load_enrolment(home)
    with only_agent_of(home), AgentState(home / STATE_FILE) as state:
        try:
            asyncio.run(run_agent(settings, enrolment, state))
        except* ShoalError as group:
            raise innermost(group) from group


@app.command()
def status(
    home: Home,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show who this device is, what it trains and what it serves."""
    current = read_status(home, now=utc_now())
    typer.echo(msgspec.json.encode(current).decode() if as_json else describe(current))


def _read_settings(**given: Any) -> AgentSettings:
    """Combine options with the environment; raise ConfigError that names what does not fit."""
    try:
        return AgentSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}; change it and try again") from error
