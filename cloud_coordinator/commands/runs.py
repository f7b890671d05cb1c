"""``shoal run``."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import (
    digest,
    moment,
    people,
    print_facts,
    print_json,
    print_table,
)
from cloud_coordinator.rounds.plan_explanation import explain
from shared.errors import ShoalError, UnavailableError
from shared.logs import visible
from shared.run_plan import RunPlan, read_plan

runs = typer.Typer(help="Runs: training of one model over many rounds.", no_args_is_help=True)

_ENDED = {"finished", "failed", "stopped"}
_POLL_S = 1.0
_AWAY_S = 300.0  # a coordinator that starts again is back sooner


@runs.command("start")
def start_run(
    plan: Annotated[Path, typer.Argument(help="The plan, a TOML file.")],
    home: Home = DEFAULT_HOME,
    *,
    watch: Annotated[bool, typer.Option(help="Show its progress until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run from PLAN; exit status 1 if --watch sees it fail."""
    run = start(read_plan(plan), home, watch=watch, as_json=as_json)
    if as_json:
        print_json(run)
    elif not watch:
        typer.echo(run["run_id"])


def start(wanted: RunPlan, home: Path, *, watch: bool, as_json: bool) -> Any:
    """Start a run, say what its plan promises, and return the run: ended, with ``watch``.

    Raises:
        ShoalError: it was watched, and did not finish.
    """
    client = ApiClient(home)
    run = client.post("/v1/runs", msgspec.to_builtins(wanted))
    console = people(to_stderr=True)  # the output is the run's id
    for line in explain(wanted):
        console.print(visible(line))
    if watch:
        try:
            run = watch_run(client, run["run_id"], say=_note(as_json=as_json), pause=time.sleep)
        except KeyboardInterrupt:
            typer.echo(f"the run goes on; end it with 'shoal run stop {run['run_id']}'", err=True)
            raise typer.Exit(130) from None
    return run


@runs.command("list")
def list_runs(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """List runs, the newest first."""
    answer = ApiClient(home).get("/v1/runs")
    if as_json:
        print_json(answer)
        return
    print_runs(answer, empty="no runs yet; 'shoal run start PLAN.toml' begins one")


def print_runs(runs: Iterable[Mapping[str, Any]], *, empty: str) -> None:
    """Print a line for each run, or what to do where there is none."""
    rows = [
        (run["run_id"], run["state"], moment(run["created_at"]), run["doing"] or run["cause"])
        for run in runs
    ]
    print_table(("run", "state", "started (UTC)", "now"), rows, empty=empty)


@runs.command("show")
def show_run(run_id: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show one run: its rounds, who took part, and why others did not."""
    run = ApiClient(home).get(f"/v1/runs/{run_id}")
    if as_json:
        print_json(run)
        return
    print_facts(
        {
            "run": run["run_id"],
            "state": run["state"],
            "now": run["doing"] or run["cause"] or "-",
            "task": run["plan"]["task"]["name"],
            "plan": digest(run["plan_digest"]),
            "version": digest(run["model_version"]),
        }
    )
    if run["plan"].get("statistics"):
        people().print(f"its answers: shoal stats show {run_id}")
    rows = [_round_row(record) for record in run["rounds"]]
    print_table(("round", "state", "s", "metrics", "took part", "did not"), rows, empty="no rounds")
    if secret := [_secrecy_row(r) for r in run["rounds"] if r["secrecy"]]:
        headings = ("round", "in the sum", "learns nothing with", "noise", "KiB up", "left out")
        print_table(headings, secret, empty="")
    elif run["plan"].get("privacy", {}).get("mode") == "plain":
        people().print("plain rounds: the coordinator saw each device's update")
    invited = [
        (i["device_id"], i["state"], moment(i["changed_at"]), i["reason"])
        for i in run["invitations"]
    ]
    columns = ("device", "invitation", "since (UTC)", "reason")
    print_table(columns, invited, empty="nobody was invited yet")


@runs.command("stop")
def stop_run(run_id: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """End a run; the rounds that it committed stay."""
    run = ApiClient(home).post(f"/v1/runs/{run_id}/stop")
    if as_json:
        print_json(run)
    else:
        typer.echo(f"run {run['run_id']} is ending")


def watch_run(
    client: ApiClient, run_id: str, *, say: Callable[[str], None], pause: Callable[[float], None]
) -> Any:
    """Say what is new about a run until it ends, and return it; outlive a coordinator's restart.

    Args:
        client: to ask.
        run_id: the run.
        say: told each new line.
        pause: waits for some seconds.

    Raises:
        ShoalError: the run did not finish.
        UnavailableError: the coordinator was away for minutes.
    """
    say(f"run {run_id}")
    seen_rounds, last = 0, ""
    while True:
        run = _ask_patiently(client, f"/v1/runs/{run_id}", say=say, pause=pause)
        for record in run["rounds"][seen_rounds:]:
            say(_round_line(record))
        seen_rounds = len(run["rounds"])
        now = f"{run['state']}: {run['doing']}" if run["doing"] else run["state"]
        if now != last and run["state"] not in _ENDED:
            say(now)
        last = now
        if run["state"] in _ENDED:
            break
        pause(_POLL_S)
    if run["state"] != "finished":
        raise ShoalError(f"run {run_id} {run['state']}: {run['cause']}")
    result = digest(run["model_version"])
    asked = f"'shoal stats show {run_id}' tells the answers"
    say(f"finished: model version {result}" if run["model_version"] else f"finished: {asked}")
    return run


def _ask_patiently(
    client: ApiClient, path: str, *, say: Callable[[str], None], pause: Callable[[float], None]
) -> Any:
    """GET ``path``; while the coordinator is away say so once, and ask again."""
    waited_s = 0.0
    while True:
        try:
            return client.get(path)
        except UnavailableError as error:
            if waited_s >= _AWAY_S:
                raise
            if not waited_s:
                say(f"{error}; waiting for it, Ctrl-C ends only this view")
        pause(_POLL_S)
        waited_s += _POLL_S


def _note(*, as_json: bool) -> Callable[[str], None]:
    """Return what prints progress: to standard error where the output is JSON."""
    console = people(to_stderr=as_json)
    return lambda line: console.print(visible(line))


def _round_line(record: dict[str, Any]) -> str:
    number, state, seconds, metrics, present, absent = _round_row(record)
    line = f"round {number:>3}  {state} in {seconds} s  {metrics}  {present}"
    return f"{line}  ({absent})" if absent else line


def _secrecy_row(record: dict[str, Any]) -> tuple[str, ...]:
    """Say how one round's updates stayed secret: of whom the sums are, and what broke a rule."""
    secrecy = record["secrecy"]
    groups = secrecy["groups"]
    summed = [group for group in groups if group["survivors"]]
    left_out = [f"group {g['group']}: {g['cause']}" for g in groups if g["cause"]]
    blamed = [f"{device}: {how}" for device, how in secrecy["blamed"].items()]
    return (
        str(record["round_number"]),
        " + ".join(f"{group['survivors']} of {group['roster']}" for group in summed) or "-",
        f"{min(group['corrupted'] for group in summed)} corrupted" if summed else "-",
        _noise(secrecy),
        f"{secrecy['bytes_up'] / 1024:.1f}",
        "; ".join(left_out + blamed) or "-",
    )


def _noise(secrecy: dict[str, Any]) -> str:
    if secrecy["noise"] == "none":
        return "none: exact sums"
    epsilon = "no bound" if secrecy["epsilon"] is None else f"ε = {secrecy['epsilon']:.2f}"
    promised = ", only promised" if secrecy["noise"] == "central" else ""
    return f"{secrecy['noise']}, {epsilon}{promised}"


def _round_row(record: dict[str, Any]) -> tuple[str, ...]:
    parts = record["participations"]
    absent = [p for p in parts if p["outcome"] not in {"replied", "not-needed"}]
    return (
        str(record["round_number"]),
        record["state"],
        f"{record['seconds']:.1f}",
        " ".join(f"{name}={value:.4f}" for name, value in record["metrics"].items()) or "-",
        " ".join(p["device_id"] for p in parts if p["outcome"] == "replied") or "-",
        "; ".join(f"{p['device_id']}: {p['cause'] or p['outcome']}" for p in absent)
        or record["cause"],
    )
