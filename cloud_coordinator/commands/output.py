"""How commands print: a table for people, one JSON document for programs.

Devices choose some of the words, so no cell is markup and none can steer the terminal.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.logs import visible

_DIGEST_LENGTH = 12  # of 64; enough to tell versions apart


def print_json(document: Any) -> None:
    """Print a document to standard output, and nothing else."""
    print(json.dumps(document, indent=2, ensure_ascii=False))  # noqa: T201  # this is the output


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print rows under ``columns``, or the sentence ``empty`` where there are none."""
    console = Console()
    if not rows:
        console.print(empty)
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one a line."""
    console = Console()
    width = max(map(len, facts))
    for name, value in facts.items():
        line = f"{name:<{width}}  {visible(value)}"
        console.print(line, highlight=False, markup=False)


def moment(text: str | None) -> str:
    """Shorten an API time to seconds, in UTC."""
    if text is None:
        return "-"
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def digest(text: str | None) -> str:
    """Shorten a digest."""
    return text[:_DIGEST_LENGTH] if text else "-"
