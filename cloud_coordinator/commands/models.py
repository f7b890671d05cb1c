"""``shoal model``."""

import getpass
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table
from cloud_coordinator.models.lifecycle import VersionState
from shared.errors import ConfigError, NotFoundError
from shared.logs import visible

models = typer.Typer(help="Model versions.", no_args_is_help=True)
NO_VERSIONS = "no model versions yet; a finished run makes one"
NONE_FITS = "no model version fits"


@models.command("list")
def list_models(
    home: Home = DEFAULT_HOME,
    *,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    state: Annotated[str | None, typer.Option(help="Only in this state, as 'current'.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Only with this in the digest's start, the run or a note.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List model versions, the newest first."""
    if state is not None and state not in set(VersionState):
        raise ConfigError(f"there is no state {state!r}; choose one of: {', '.join(VersionState)}")
    answer = ApiClient(home).get("/v1/models", model=model, state=state, text=text)
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
    print_table(columns, rows, empty=NO_VERSIONS if model is state is text is None else NONE_FITS)


@models.command("show")
def show_model(version: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show one version with every variant; VERSION may be the first characters of its digest."""
    client = ApiClient(home)
    model = client.get(f"/v1/models/{full_version(client, version)}")
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
    print_judgement(model["judgement"])
    for note in client.get(f"/v1/models/{model['version']}/notes"):
        typer.echo(
            f"{moment(note['written_at'])} {visible(note['author'])}: {visible(note['text'])}"
        )


def print_judgement(judgement: Mapping[str, Any] | None) -> None:
    """Print what every gate said of every variant, where devices judged them."""
    if judgement is None:
        return
    devices = f"{judgement['devices']}, by run {judgement['run_id']}"
    print_facts({"judged on": devices, "against": judgement["reference"]})
    rows = [
        (judged["variant"], verdict["gate"], verdict["outcome"], visible(verdict["words"]))
        for judged in judgement["variants"]
        for verdict in judged["verdicts"]
    ]
    print_table(("variant", "gate", "", "found"), rows, empty="no variant was judged")


@models.command("note")
def note_model(
    version: str,
    text: str,
    home: Home = DEFAULT_HOME,
    *,
    author: Annotated[str | None, typer.Option(help="Who says so; default: your user.")] = None,
) -> None:
    """Add a note to a version; notes are never changed."""
    client = ApiClient(home)
    note = {"author": author or getpass.getuser(), "text": text}
    full = full_version(client, version)
    client.post(f"/v1/models/{full}/notes", note)
    typer.echo(f"noted about {digest(full)}")


@models.command("card")
def show_card(version: str, home: Home = DEFAULT_HOME) -> None:
    """Print a version's model card, in Markdown."""
    client = ApiClient(home)
    typer.echo(client.get_text(f"/v1/models/{full_version(client, version)}/card"), nl=False)


@models.command("report")
def show_report(version: str, home: Home = DEFAULT_HOME) -> None:
    """Print a version's report, a page for a browser: shoal model report VERSION > page.html."""
    client = ApiClient(home)
    typer.echo(client.get_text(f"/v1/models/{full_version(client, version)}/report"), nl=False)


@models.command("compare")
def compare_models(
    first: str, second: str, home: Home = DEFAULT_HOME, *, as_json: AsJson = False
) -> None:
    """Show two versions side by side: figures, and where their plans differ."""
    client = ApiClient(home)
    one, other = full_version(client, first), full_version(client, second)
    answer = client.get(f"/v1/models/{one}/compare/{other}")
    if as_json:
        print_json(answer)
        return
    left, right = _figures(answer["first"]), _figures(answer["second"])
    rows = [(key, left.get(key, "-"), right.get(key, "-")) for key in left | right]
    rows += [(f"plan: {key}", str(a), str(b)) for key, (a, b) in answer["plan"].items()]
    print_table(("", digest(one), digest(other)), rows, empty="")


def full_version(client: ApiClient, start: str) -> str:
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


def _figures(facts: dict[str, Any]) -> dict[str, str]:
    """Return what two versions are compared by, for people."""
    examples, shipped = facts["examples"], [v for v in facts["variants"] if v["shipped"]]
    figures = {
        "model": facts["model"],
        "state": facts["state"],
        "run": facts["run_id"],
        "rounds": str(facts["rounds"]),
        "devices": str(facts["devices"]),
        "rows, last round": "-" if examples is None else f"{examples:,.0f}",
        **{name: f"{value:.4f}" for name, value in facts["metrics"].items()},
        "ε": "-" if (spent := facts["privacy"]["epsilon"]) is None else f"{spent:.3g}",
    }
    for variant in shipped:
        latency = variant["latency_p50_us"]
        figures |= {
            "ships": variant["variant"],
            "bytes": f"{variant['size_bytes']:,}",
            "p50 µs": "-" if latency is None else f"{latency:.0f}",
        }
    return figures


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
