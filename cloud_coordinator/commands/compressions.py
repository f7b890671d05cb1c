"""``shoal compression``."""

import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.models import print_judgement
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table

compressions = typer.Typer(
    help="Compressions: from a run's parameters to small files.", no_args_is_help=True
)


@compressions.command("list")
def list_compressions(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List the runs whose plan has a table [compression] or [judge], the newest first."""
    answer = ApiClient(home).get("/v1/compressions")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            job["run_id"],
            job["state"],
            moment(job["created_at"]),
            ", ".join(step["step"] for step in job["steps"]) or "-",
            job["doing"] or job["cause"],
        )
        for job in answer
    ]
    columns = ("run", "state", "run started (UTC)", "done", "now")
    empty = "no compressions; write a table [compression] or [judge] into a run's plan"
    print_table(columns, rows, empty=empty)


@compressions.command("show")
def show_compression(run_id: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show what the compression of a run has done, and what it does now."""
    job = ApiClient(home).get(f"/v1/compressions/{run_id}")
    if as_json:
        print_json(job)
        return
    print_facts(
        {
            "run": job["run_id"],
            "state": job["state"],
            "now": job["doing"] or job["cause"] or "-",
            "version": digest(job["model_version"]),
        }
    )
    rows = [(step["step"], step["result"]) for step in job["steps"]]
    print_table(("step", "result"), rows, empty="nothing is done yet")
    print_judgement(job["judgement"])


@compressions.command("stop")
def stop_compression(run_id: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """End the compression of a run, and the run with it; its parameters stay."""
    answer = ApiClient(home).post(f"/v1/compressions/{run_id}/stop")
    if as_json:
        print_json(answer)
        return
    typer.echo(f"{run_id} is ending")
