"""``shoal stats``."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import (
    people,
    print_facts,
    print_json,
    print_table,
)
from cloud_coordinator.commands.runs import print_runs, start
from shared.errors import ConfigError
from shared.run_plan import read_plan

statistics = typer.Typer(
    help="Statistics: what the rows of a fleet are like, known only summed.", no_args_is_help=True
)


@statistics.command("start")
def start_statistics(
    plan: Annotated[Path, typer.Argument(help="A plan with a table [statistics], a TOML file.")],
    home: Home = DEFAULT_HOME,
    *,
    watch: Annotated[bool, typer.Option(help="Wait for the answers and show them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask what PLAN asks, in one run; exit status 1 if --watch sees it fail."""
    wanted = read_plan(plan)
    if wanted.statistics is None:
        raise ConfigError(
            f"{plan} has no table [statistics]; write what to ask, or train with 'shoal run start'"
        )
    run = start(wanted, home, watch=watch, as_json=as_json)
    if as_json:
        print_json(run)
    elif watch:
        _show(run)
    else:
        typer.echo(run["run_id"])


@statistics.command("list")
def list_statistics(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List the runs that ask for statistics, the newest first."""
    runs = [run for run in ApiClient(home).get("/v1/runs") if run["purpose"] == "statistics"]
    if as_json:
        print_json(runs)
        return
    print_runs(runs, empty="nothing was asked yet; 'shoal stats start PLAN.toml' does")


@statistics.command("show")
def show_statistics(run_id: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show the answers of one run, and how far noise may have moved them."""
    run = ApiClient(home).get(f"/v1/runs/{run_id}")
    if run["purpose"] == "train":
        raise ConfigError(
            f"run {run_id} trains a model and asks for no statistics; see 'shoal run show {run_id}'"
        )
    if as_json:
        print_json(run)
    else:
        _show(run)


def _show(run: Mapping[str, Any]) -> None:
    answered = next((record for record in run["rounds"] if record["answers"]), None)
    facts = {
        "run": run["run_id"],
        "state": run["state"],
        "now": run["doing"] or run["cause"] or "-",
        "task": run["plan"]["task"]["name"],
    }
    if answered is not None:
        facts |= _how(answered["secrecy"])
    print_facts(facts)
    if answered is None:
        people().print("no answers; 'shoal run show' says who took part and why others did not")
        return
    rows = [row for answer in answered["answers"] for row in _rows(answer)]
    print_table(("statistic", "of", "figure", "value", "± noise"), rows, empty="no figures")


def _how(secrecy: Mapping[str, Any]) -> dict[str, str]:
    """Say whose rows the figures are of, and what that cost them."""
    devices = str(sum(group["survivors"] for group in secrecy["groups"]))
    missing = [group["cause"] for group in secrecy["groups"] if group["cause"]]
    facts = {"devices": "; ".join([devices, *missing])}
    if secrecy["noise"] == "none":
        return {**facts, "noise": "none: the figures are exact"}
    cost = "no ε is promised"
    if secrecy["epsilon"] is not None:
        cost = f"ε = {secrecy['epsilon']:.3g} at δ = {secrecy['delta']:g} of each device's rows"
    return {**facts, "noise": "added by the devices", "cost": cost}


def _rows(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    values, errors = answer["values"], answer["standard_error"]
    if not values:
        yield answer["kind"], answer["feature"], "-", "lost in the noise", "-"
    for name, value in values.items():
        figure = _with_error(value, errors.get(name)) if errors else (f"{value:.10g}", "exact")
        yield answer["kind"], answer["feature"], name, *figure


def _with_error(value: float, error: float | None) -> tuple[str, str]:
    """Show no more digits than mean something beside the error, of which two do."""
    if not error:
        return f"{value:.4g}", "-"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f}", f"{error:.{decimals}f}"
