"""How commands print: a table for people, one JSON document for programs.

Devices choose some of the words, so no cell is markup and none can steer the terminal.
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.logs import visible

_DIGEST_LENGTH = 12  # of 64; enough to tell versions apart
_UNWRAPPED = 10_000  # columns; programs that read lines want one for each row


def print_json(document: Any) -> None:
    """Print a document to standard output, and nothing else."""
    print(json.dumps(document, indent=2, ensure_ascii=False))  # noqa: T201  # this is the output


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print rows under ``columns``, or the sentence ``empty`` where there are none."""
    if not rows:
        people().print(empty)
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # half an id is of no use to anybody
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    people().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one a line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(visible(value)))
    people().print(table)


def people(*, to_stderr: bool = False) -> Console:
    """Return what prints for people: as wide as their terminal, unwrapped into pipes and files."""
    console = Console(stderr=to_stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNWRAPPED
    return console


def moment(text: str | None) -> str:
    """Shorten an API time to seconds, in UTC."""
    if text is None:
        return "-"
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def digest(text: str | None) -> str:
    """Shorten a digest."""
    return text[:_DIGEST_LENGTH] if text else "-"
