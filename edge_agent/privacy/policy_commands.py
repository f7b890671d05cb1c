"""``shoal-agent policy …``: the owner writes, reads and checks ``policy.toml``."""

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from edge_agent.privacy.policy import POLICY_FILE, OwnerPolicy, read_policy
from shared.config import read_document
from shared.errors import ConfigError
from shared.files import make_folder, write_private

app = typer.Typer(
    help="What you, the owner of this device, allow. It beats whatever a coordinator asks.",
    no_args_is_help=True,
)
Home = Annotated[
    Path,
    typer.Option(help="The agent's state folder.", envvar="SHOAL_AGENT_HOME", file_okay=False),
]

WORDS = {
    "min_cohort": "fewest devices whose vectors are in a sum with this one's, itself included",
    "corrupt_fraction": "share of a sum's devices that may be in league with the coordinator",
    "corrupt_devices": "at least so many of them, however small the sum",
    "max_corrupt": "no sums that reckon with more corrupted devices (left out: no limit)",
    "exact_sums": "sums without noise of the devices' own: no ε holds for the data afterwards",
    "max_exact_sums": "as many exact sums of one version of a data set",
    "min_noise_multiplier": "least noise of a noised sum: standard deviation over the clip norm",
    "epsilon": "budget of each data set for noised sums, for good",
    "delta": "the δ at which ε is counted",
    "individual_updates": "updates may leave by themselves, where the coordinator sees each one",
    "statistics": "counts, means and histograms of the data, as secure sums",
    "required_peers": "device ids that must be in every sum with this one",
    "min_peers_known_for_days": "how long each peer must have been in the membership list",
    "min_owners": "different owners whose devices are in a sum; all without one count as one",
}


class _Effective(msgspec.Struct, frozen=True):
    """What ``policy show --json`` prints."""

    values: dict[str, Any]
    defaults: list[str]  # keys that policy.toml does not name


@app.command()
def init(*, home: Home) -> None:
    """Write policy.toml with all defaults and what they mean, where there is none yet."""
    path = home / POLICY_FILE
    if path.exists():
        raise ConfigError(f"{path} exists already; edit it, `shoal-agent policy show` explains it")
    make_folder(home)
    write_private(path, _template().encode())
    typer.echo(f"wrote {path}; edit it and see what holds with 'shoal-agent policy show'")


@app.command()
def show(
    *,
    home: Home,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what holds for the next sum: what you wrote, and defaults for the rest."""
    values = msgspec.structs.asdict(read_policy(home))
    written = _written(home)
    if as_json:
        effective = _Effective(values, [key for key in values if key not in written])
        typer.echo(msgspec.json.encode(effective).decode())
        return
    table = Table(box=None, pad_edge=False)
    for column in ("key", "value", "from", "meaning"):
        table.add_column(column, overflow="fold")
    for key, value in values.items():
        origin = POLICY_FILE if key in written else "default"
        table.add_row(key, _toml(value), origin, WORDS[key])
    Console().print(table)


@app.command()
def check(*, home: Home) -> None:
    """Check policy.toml, and say what the next sum must be like."""
    policy = read_policy(home)
    origin = f"{home / POLICY_FILE} is fine" if _written(home) else "the strict defaults hold"
    typer.echo(f"{origin}: {summary(policy)}")


def summary(policy: OwnerPolicy) -> str:
    """Say in one sentence what the policy comes down to."""
    if policy.exact_sums:
        noise = f"exact ones allowed, up to {policy.max_exact_sums} of one version of the data"
    else:
        noise = f"with noise only, up to ε = {policy.epsilon:g} at δ = {policy.delta:g}"
    alone = "; updates may also leave by themselves" if policy.individual_updates else ""
    return (
        f"sums of at least {policy.min_cohort} devices, {policy.min_honest} of them honest, "
        f"{noise}{alone}"
    )


def _written(home: Path) -> set[str]:
    path = home / POLICY_FILE
    return set(read_document(path)) if path.exists() else set()


def _template() -> str:
    lines = ["# What this device's owner allows. It beats whatever a coordinator asks.", ""]
    for key, value in msgspec.structs.asdict(OwnerPolicy()).items():
        given = f"{key} = {_toml(value)}" if value is not None else f"# {key} = 10"
        lines += [f"# {WORDS[key]}", given, ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """Write a value as TOML has it; an absent one as a dash, for people."""
    match value:
        case None:
            return "–"
        case bool():
            return str(value).lower()
        case float() if value and abs(math.log10(value)) >= 4:
            return f"{value:.0e}"
        case tuple():
            return "[" + ", ".join(msgspec.json.encode(item).decode() for item in value) + "]"
    return str(value)
