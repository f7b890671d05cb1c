"""Reads a CSV file with a header: numeric feature columns and one target column, in any order."""

import csv
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from shared.errors import DataError
from shared.tasks.contract import DataContract
from shared.tasks.examples import Examples
from shared.tasks.intake import SkippedRows, not_a_label

_DELIMITERS = ",;\t"
_LARGEST = float(np.finfo(np.float32).max)


class _BadRowError(Exception):
    """Carries the reason for which one row is skipped."""


def read_csv(path: Path, contract: DataContract, skipped: SkippedRows) -> Examples:
    """Read the rows that fit; columns that the contract does not name are ignored.

    The delimiter (comma, semicolon or tab) is the commonest of the header line.

    Raises:
        DataError: not UTF-8 text, not CSV, or a column is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            rows = csv.reader(file, delimiter=max(_DELIMITERS, key=first.count))
            header = [name.strip() for name in next(rows, [])]
            parse = _row_parser(path, header, contract)
            numbered_rows = ((rows.line_num, row) for row in rows)
            return _collect(numbered_rows, parse, contract, skipped)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file: {error}; save it as CSV again") from error


def _collect(
    numbered_rows: Iterable[tuple[int, Sequence[str]]],
    parse: Callable[[Sequence[str]], tuple[list[float], float]],
    contract: DataContract,
    skipped: SkippedRows,
) -> Examples:
    inputs, targets = array("f"), array("d")
    for line, row in numbered_rows:
        if not row:  # a blank line
            continue
        try:
            values, target = parse(row)
        except _BadRowError as bad:
            skipped.add(str(bad), f"line {line}")
            continue
        inputs.extend(values)
        targets.append(target)
    kind = np.int64 if contract.labels else np.float32
    width = len(contract.features)
    return Examples(
        np.array(inputs, np.float32).reshape(len(targets), width), np.array(targets).astype(kind)
    )


def _row_parser(
    path: Path, header: Sequence[str], contract: DataContract
) -> Callable[[Sequence[str]], tuple[list[float], float]]:
    """Return the function from one row's fields to its features and target."""
    positions = {
        name: _position(path, header, name) for name in (*contract.feature_names, contract.target)
    }
    features = [
        (positions[f.name], f"feature {f.name!r}", f.minimum, f.maximum) for f in contract.features
    ]
    target_at, target_name = positions[contract.target], f"target {contract.target!r}"
    index_of = {label: index for index, label in enumerate(contract.labels)}
    no_label = not_a_label(contract.labels)

    def parse(row: Sequence[str]) -> tuple[list[float], float]:
        if len(row) != len(header):
            raise _BadRowError("number of fields is not that of the header")
        values = [_number(row[at], name, low, high) for at, name, low, high in features]
        text = row[target_at]
        if not index_of:
            low, high = contract.target_minimum, contract.target_maximum
            return values, _number(text, target_name, low, high)
        if (index := index_of.get(text.strip())) is None:
            raise _BadRowError(no_label)
        return values, index

    return parse


def _position(path: Path, header: Sequence[str], name: str) -> int:
    match header.count(name):
        case 1:
            return header.index(name)
        case 0:
            raise DataError(
                f"{path} has no column {name!r}, it has {', '.join(map(repr, header)) or 'none'}; "
                "rename the column in the header line or in the task's options"
            )
        case _:
            raise DataError(f"{path} has several columns {name!r}; rename all but one")


def _number(text: str, name: str, minimum: float, maximum: float) -> float:
    try:
        value = float(text)
    except ValueError:
        problem = "is not a number" if text.strip() else "is missing"
        raise _BadRowError(f"{name} {problem}") from None
    if math.isnan(value):
        raise _BadRowError(f"{name} is missing")
    if not minimum <= value <= maximum or abs(value) > _LARGEST:
        raise _BadRowError(f"{name} is out of range")
    return value
