"""``shoal trust``: what devices believe about models, and until when."""

import typer

from cloud_coordinator.commands.client import DEFAULT_HOME, ApiClient, AsJson, Home
from cloud_coordinator.commands.output import digest, moment, print_facts, print_json, print_table

trust = typer.Typer(help="What devices believe about models (TUF).", no_args_is_help=True)


@trust.callback()
def _group() -> None:
    """Keep ``status`` a word of its own while it is the only command."""


@trust.command("status")
def show_status(home: Home = DEFAULT_HOME, *, as_json: AsJson = False) -> None:
    """Show each role's version, when it expires, what it lists, and the root to pin."""
    answer = ApiClient(home).get("/v1/trust")
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            role["role"],
            str(role["version"]),
            moment(role["expires_at"]),
            str(role["files"]),
            digest(role["key_id"]),
        )
        for role in answer["roles"]
    ]
    print_table(("role", "version", "expires (UTC)", "files", "key"), rows, empty="")
    print_facts({"root": answer["root_fingerprint"]})
    typer.echo("a new device can pin it: shoal-agent enroll --root FINGERPRINT …")
