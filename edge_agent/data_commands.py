"""``shoal-agent data …``: the owner says which data this device may learn from, and for what.

The daemon's command line imports this module, so torch is loaded only where a task is.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edge_agent.data_registry import DataEntry, DataRegistry
from edge_agent.enrolment import is_enrolled
from shared.errors import DataError
from shared.messages import utc_now
from shared.tasks.spec import TaskSpec

app = typer.Typer(
    help="Name the data on this device that a task may learn from. They never leave the device.",
    no_args_is_help=True,
)
Home = Annotated[
    Path,
    typer.Option(help="The agent's state folder.", envvar="SHOAL_AGENT_HOME", file_okay=False),
]
Name = Annotated[str, typer.Argument(help="Your name for the data.")]


@app.command()
def add(
    name: Name,
    path: Annotated[Path, typer.Argument(help="A CSV, NPZ or IDX file, or a folder of images.")],
    *,
    task: Annotated[
        str, typer.Option(help="Task file (TOML) as the run has it, or module:object.")
    ],
    home: Home,
) -> None:
    """Check data against a task's contract, and let the device train on them from now on.

    Data of the same name are replaced. Rows that break the contract are left
    out and counted; a source with too many is refused. A tenth of the rows is
    held out to measure on, for ever.
    """
    from edge_agent.local_data import read_task_spec  # noqa: PLC0415  # see the module's docstring

    entry = _check(name, path, read_task_spec(task))
    DataRegistry(home).add(entry)
    _show(entry, f"data {name!r} can be trained on for task {entry.task.name!r}")
    if not is_enrolled(home):
        typer.echo(f"{home} is not enrolled yet; 'shoal-agent enroll --home {home} …' does that")


@app.command()
def check(name: Name, *, home: Home) -> None:
    """Read data again, tell what changed since, and stop training on them if they broke."""
    registry = DataRegistry(home)
    known = registry.get(name)
    try:
        entry = _check(name, Path(known.path), known.task)
    except DataError as error:
        registry.add(known.broken(str(error), at=utc_now()))
        raise
    registry.add(entry)
    _show(entry, _difference(known, entry))


@app.command(name="list")
def list_(*, home: Home) -> None:
    """Show all data of this device, as last checked."""
    entries = DataRegistry(home).entries()
    if not entries:
        typer.echo("no data yet; add some with `shoal-agent data add NAME PATH --task TASK.toml`")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "task", "train", "held out", "skipped", "checked (UTC)", "path"):
        counts = column in {"train", "held out", "skipped"}
        table.add_column(column, justify="right" if counts else "left", overflow="fold")
    for entry in entries:
        checked = f"{entry.checked_at:%Y-%m-%d %H:%M}"
        table.add_row(
            entry.name,
            entry.task.name,
            f"{entry.train_rows:,}",
            f"{entry.held_out_rows:,}",
            f"{sum(entry.skipped.values()):,}",
            f"broken {checked}" if entry.problem else checked,
            escape(entry.path),
        )
    Console().print(table)


@app.command()
def remove(name: Name, *, home: Home) -> None:
    """Forget data: the device trains on them no more. The files stay where they are."""
    DataRegistry(home).remove(name)
    typer.echo(f"data {name!r} are forgotten; their files were not touched")


def _check(name: str, path: Path, task: TaskSpec) -> DataEntry:
    from edge_agent.local_data import check_data  # noqa: PLC0415  # see the module's docstring

    return check_data(name, path, task, now=utc_now())


def _difference(before: DataEntry, after: DataEntry) -> str:
    """Say what became of data between two checks."""
    if before.problem:
        return f"data {after.name!r} are usable again"
    if before.digest == after.digest:
        return f"data {after.name!r} are unchanged since {before.checked_at:%Y-%m-%d %H:%M}Z"
    return (
        f"data {after.name!r} changed since {before.checked_at:%Y-%m-%d %H:%M}Z: "
        f"{before.usable_rows:,} usable rows became {after.usable_rows:,}"
    )


def _show(entry: DataEntry, sentence: str) -> None:
    """Print the counts of one entry, and what they mean."""
    typer.echo(f"{entry.name}: {entry.path}, rows:")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("  usable", f"{entry.usable_rows:,}")
    table.add_row("    to train on", f"{entry.train_rows:,}")
    table.add_row("    held out", f"{entry.held_out_rows:,}")
    for reason, count in sorted(entry.skipped.items()):
        table.add_row(escape(f"  skipped: {reason}"), f"{count:,}")
    Console().print(table)
    typer.echo(sentence)
    if not entry.held_out_rows:
        typer.echo("no row is held out of so few: this device will train but not measure")
