"""``shoal-agent privacy …``: the owner reads what was given away, and may begin anew.

The daemon's command line imports this module, so numpy is loaded only where curves are added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edge_agent.privacy.policy import read_policy
from edge_agent.privacy.store import STORE_FILE, PrivacyStore
from shared.errors import ConfigError, NotFoundError
from shared.messages import utc_now

app = typer.Typer(
    help="What your data gave away so far: receipts from this device's own ledger.",
    no_args_is_help=True,
)
Home = Annotated[
    Path,
    typer.Option(help="The agent's state folder.", envvar="SHOAL_AGENT_HOME", file_okay=False),
]


@app.command()
def show(
    *,
    home: Home,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Show for each data set how many sums it was part of, for what, and what that cost."""
    from edge_agent.privacy.receipts import (  # noqa: PLC0415  # see the module's docstring
        describe,
        read_receipts,
    )

    policy = read_policy(home)
    if not (home / STORE_FILE).exists():
        typer.echo("[]" if as_json else "no data of this device took part in anything yet")
        return
    with PrivacyStore(home) as store, store.transaction() as connection:
        receipts = read_receipts(connection, policy)
    if as_json:
        typer.echo(msgspec.json.encode(receipts).decode())
        return
    typer.echo("\n".join(describe(r) for r in receipts) or "no data took part in anything yet")


@app.command()
def reset(
    name: Annotated[str, typer.Argument(help="Your name for the data.")],
    *,
    home: Home,
    yes: Annotated[
        bool, typer.Option("--yes", help="Yes, what was given away is forgiven.")
    ] = False,
) -> None:
    """Begin the account of a data set anew: its whole budget is there again.

    What was given away stays given away; only the counting begins anew. Do
    this where the data behind the name were replaced altogether.
    """
    from edge_agent.privacy.ledger import (  # noqa: PLC0415  # see the module's docstring
        reset as reset_account,
    )

    with _existing_store(home) as store, store.transaction() as connection:
        found = connection.execute("SELECT data_id FROM sources WHERE name = ?", (name,)).fetchall()
        if not found:
            raise NotFoundError(f"no data {name!r} in the ledger; see `shoal-agent privacy show`")
        if not yes:
            raise ConfigError(
                f"this forgives all that {name!r} gave away so far, which cannot be taken back; "
                "add --yes if that is what you want"
            )
        now = utc_now()
        count = sum(reset_account(connection, data_id, now) for (data_id,) in found)
    typer.echo(f"the account of {name!r} begins anew; charges that count no more: {count}")


@contextmanager
def _existing_store(home: Path) -> Iterator[PrivacyStore]:
    if not (home / STORE_FILE).exists():
        raise NotFoundError(f"{home} has no ledger yet; no data took part in anything")
    with PrivacyStore(home) as store:
        yield store
