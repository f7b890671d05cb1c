"""``shoal model`` and ``shoal rollout``."""

from typing import Any

import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table
from shared.errors import ConfigError, NotFoundError

models = typer.Typer(help="Model versions.", no_args_is_help=True)
rollouts = typer.Typer(help="Which version devices should serve.", no_args_is_help=True)


@models.command("list")
def list_models(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List model versions, the newest first."""
    answer = ApiClient(home).get("/v1/models")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            digest(model["version"]),
            model["model"],
            model["state"],
            model["run_id"],
            moment(model["created_at"]),
        )
        for model in answer
    ]
    columns = ("version", "model", "state", "run", "made (UTC)")
    print_table(columns, rows, empty="no model versions yet; a finished run makes one")


@models.command("show")
def show_model(version: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show one version with every variant; VERSION may be the first characters of its digest."""
    client = ApiClient(home)
    model = client.get(f"/v1/models/{_full_version(client, version)}")
    if as_json:
        print_json(model)
        return
    print_facts(
        {
            "version": model["version"],
            "model": model["model"],
            "state": model["state"],
            "run": f"{model['run_id']}, {model['rounds']} rounds",
            "made": moment(model["created_at"]),
        }
    )
    rows = [_variant_row(variant) for variant in model["variants"]]
    columns = ("variant", "bytes", "p50 µs", "off by", "passed", "ranges", "")
    print_table(columns, rows, empty="no variants")


@rollouts.command("start")
def start_rollout(version: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Let all devices with data for the version's task serve it, now and later."""
    client = ApiClient(home)
    answer = client.post(f"/v1/models/{_full_version(client, version)}/deploy")
    if as_json:
        print_json(answer)
        return
    typer.echo(
        f"{digest(answer['version'])} goes to {answer['devices']} devices with data for "
        f"{answer['task']}; 'shoal device list' shows what they serve"
    )


def _full_version(client: ApiClient, start: str) -> str:
    """Complete the first characters of a version.

    Raises:
        NotFoundError: no version begins so.
        ConfigError: several do.
    """
    known = [m["version"] for m in client.get("/v1/models") if m["version"]]
    found = [version for version in known if version.startswith(start)]
    if not found:
        raise NotFoundError(f"no model version begins with {start!r}; see 'shoal model list'")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} versions begin with {start!r}; give more of the digest")
    return str(found[0])


def _variant_row(variant: dict[str, Any]) -> tuple[str, ...]:
    error, latency = variant["relative_error"], variant["latency_p50_us"]
    return (
        variant["variant"],
        f"{variant['size_bytes']:,}",
        "-" if latency is None else f"{latency:.0f}",
        "-" if error is None else f"{error:.2%}",
        "yes" if variant["passed"] else f"no: {variant['cause']}",
        variant["step"] or "-",
        "shipped" if variant["shipped"] else "",
    )
