"""``shoal-sim``: the demo and the benchmarks."""

import importlib
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.errors import ConfigError
from simulations.benchmarks.report import as_json, as_table

BENCHMARKS = (
    "rounds",
    "serving",
    "secure-sum",
    "secure-sum-accuracy",
    "delivery",
    "models",
    "models-accuracy",
)

app = typer.Typer(
    help="Experiments on Shoal: the demo and the benchmarks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def demo(
    *,
    home: Annotated[
        Path, typer.Option(help="Folder for all state; used again by the next start.")
    ] = Path(".shoal/demo"),
    data: Annotated[
        Path | None, typer.Option(help="Folder with Fashion-MNIST's four IDX files.")
    ] = None,
    agents: Annotated[int, typer.Option(min=2, max=50, help="How many devices.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of training.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Decides the partition and the weights.")] = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Leave all processes running.")] = False,
) -> None:
    """Show the whole loop: a fleet learns, the model comes back small and signed, and is served."""
    # The demo computes with torch; the benchmarks' --help should not wait for its import.
    module = importlib.import_module("simulations.demo")
    options = module.DemoOptions(
        home=home.resolve(), data=data, agents=agents, rounds=rounds, seed=seed, keep=keep
    )
    module.run_demo(options, Console(width=None if sys.stdout.isatty() else 140))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    *,
    only: Annotated[str | None, typer.Option(help="Measure this row alone.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure, side by side with the reference; progress goes to standard error."""
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"simulations.benchmarks.{name.replace('-', '_')}")
    progress = Console(stderr=True)
    rows = module.run(only=only, quick=quick, progress=progress.print)
    if json:
        sys.stdout.write(as_json(name, platform.platform(), rows) + "\n")
    else:
        Console().print(as_table(name, rows))
