"""The command ``shoal``: the service, and the operator's client of its REST API."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from cloud_coordinator.broker import write_mosquitto_config
from cloud_coordinator.commands.client import AsJson
from cloud_coordinator.commands.compressions import compressions
from cloud_coordinator.commands.devices import devices, tokens
from cloud_coordinator.commands.membership import memberships
from cloud_coordinator.commands.models import models
from cloud_coordinator.commands.output import print_json
from cloud_coordinator.commands.rollouts import rollouts
from cloud_coordinator.commands.runs import runs
from cloud_coordinator.commands.statistics import statistics
from cloud_coordinator.commands.trust import trust
from cloud_coordinator.settings import load_settings
from shared.files import make_folder
from shared.listening import require_loopback
from shared.logs import configure_logging

_CHATTY = ("alembic", "uvicorn")  # their INFO is not our story

app = typer.Typer(
    help="Shoal's coordinator: trains models on a fleet and ships them back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
brokers = typer.Typer(help="The MQTT broker.", no_args_is_help=True)
app.add_typer(tokens, name="token")
app.add_typer(devices, name="device")
app.add_typer(memberships, name="membership")
app.add_typer(runs, name="run")
app.add_typer(statistics, name="stats")
app.add_typer(models, name="model")
app.add_typer(compressions, name="compression")
app.add_typer(rollouts, name="rollout")
app.add_typer(trust, name="trust")
app.add_typer(brokers, name="broker")


@app.command()
def serve(
    *,
    home: Annotated[
        Path | None, typer.Option(help="Folder for keys, database, blobs and logs (.shoal).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of every listener.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the REST API (8470); 0: any.")] = None,
    mqtt_port: Annotated[
        int | None, typer.Option(help="Port of our broker (8471); 0: any.")
    ] = None,
    fleet_port: Annotated[
        int | None, typer.Option(help="Port of Flower's Fleet API (8472); 0: any.")
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(help="embedded (default), mosquitto or mqtt://host:port (mqtts:// for TLS)."),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="Database URL; default: SQLite in the home.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = None,
) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C; started again, it goes on where it was."""
    settings = load_settings(
        config,
        home=home,
        host=host,
        port=port,
        mqtt_port=mqtt_port,
        fleet_port=fleet_port,
        broker=broker,
        database=database,
        log_level=log_level,
    )
    configure_logging(settings.log_level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # The service brings in FastAPI, SQLAlchemy and Alembic; the client's commands do without.
    from cloud_coordinator.serve import run_service  # noqa: PLC0415

    run_service(settings)


@brokers.command("config")
def broker_config(
    *,
    out: Annotated[Path, typer.Option(help="Folder to write mosquitto.conf into.")],
    host: Annotated[str, typer.Option(help="Address to listen on; loopback only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8471,
    as_json: AsJson = False,
) -> None:
    """Write a mosquitto configuration for 'shoal serve --broker mqtt://host:port'."""
    require_loopback(host, purpose="mosquitto")
    make_folder(out)
    path = write_mosquitto_config(out, host=host, port=port)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(f"wrote {path}; start it with: cd {out} && mosquitto -c {path.name}")
