"""What the demo shows: plain functions from API documents to rich tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

_KIB = 1024.0


def partition_table(counts: Mapping[str, NDArray[np.int64]], names: Sequence[str]) -> Table:
    """Show how many images of each class each agent owns; ``counts`` are arrays of shape (k,)."""
    table = Table(title="Who owns what (Dirichlet 0.3: few classes dominate each agent)")
    table.add_column("agent")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("total", justify="right", style="bold")
    for agent, per_class in counts.items():
        table.add_row(agent, *(str(c) for c in per_class), str(per_class.sum()))
    return table


def rounds_table(run: Mapping[str, Any]) -> Table:
    """Show a run's rounds: quality on held-out rows, who took part and why others did not."""
    table = Table(title=f"Run {run['run_id']}: {_describe(run)}")
    for column in ("round", "loss", "accuracy", "took part", "not", "down", "up", "seconds"):
        table.add_column(column, justify="left" if column in {"took part", "not"} else "right")
    for record in run["rounds"]:
        table.add_row(*_round_row(record))
    return table


def variants_table(version: Mapping[str, Any]) -> Table:
    """Show every variant of a model version, its parity and speed; the shipped one is marked."""
    table = Table(title=f"Model version {version['version'][:12]}: every variant, one is shipped")
    for column in ("variant", "bytes", "× smaller", "latency", "× fastest", "parity", ""):
        table.add_column(column, justify="left" if column in {"variant", "parity", ""} else "right")
    full = next(v["size_bytes"] for v in version["variants"] if v["variant"] == "fp32")
    fastest = min(v["latency_p50_us"] for v in version["variants"] if v["passed"])
    for variant in version["variants"]:
        latency = variant["latency_p50_us"]  # null where the variant never ran
        table.add_row(
            variant["variant"],
            f"{variant['size_bytes']:,}" if variant["size_bytes"] else "-",
            f"{full / variant['size_bytes']:.2f}" if variant["size_bytes"] else "-",
            f"{latency:.0f} µs" if latency else "-",
            f"{latency / fastest:.2f}" if latency else "-",
            "passed" if variant["passed"] else f"failed: {variant['cause']}",
            "[bold green]shipped[/]" if variant["variant"] == version["ship"] else "",
        )
    return table


def serving_table(devices: Sequence[Mapping[str, Any]], wanted: str) -> Table:
    """Show where each device is on its way to the wanted version."""
    table = Table(title=f"Rolling out {wanted[:12]}")
    for column in ("agent", "step", "serving (reported)", "cause"):
        table.add_column(column)
    for device in devices:
        reported = device.get("reported") or {}
        table.add_row(
            device["device_id"],
            reported.get("deployment", "-"),
            (reported.get("serving_version") or "-")[:12],
            reported.get("cause", ""),
        )
    return table


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the end of the loop: one row per agent, measured at its own endpoint."""
    table = Table(title="The same test images, sent to every agent's own endpoint")
    for column in ("agent", "before", "after", "serving (reported)", "digest", "fp32 → shipped"):
        table.add_column(column, justify="right" if column in {"before", "after"} else "left")
    table.add_column("p50 latency", justify="right")
    for row in rows:
        table.add_row(
            row["agent"],
            f"{row['before']:.2%}",
            f"[bold green]{row['after']:.2%}[/]",
            row["serving"][:12],
            "verified" if row["serving"] == row["wanted"] else "[red]another[/]",
            f"{row['full_bytes']:,} → {row['shipped_bytes']:,} B",
            f"{row['p50_ms']:.2f} ms",
        )
    return table


def _describe(run: Mapping[str, Any]) -> str:
    words = (run["state"], run["doing"], run["cause"])
    return ", ".join(word for word in words if word)


def _round_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    parts = record["participations"]
    absent = [p for p in parts if p["outcome"] not in {"replied", "not-needed"}]
    metrics = record["metrics"]
    return (
        str(record["round_number"]) if record["round_number"] else "before",
        f"{metrics['loss']:.4f}" if "loss" in metrics else "-",
        f"{metrics['accuracy']:.2%}" if "accuracy" in metrics else "-",
        " ".join(sorted(p["device_id"] for p in parts if p["outcome"] == "replied")) or "-",
        "; ".join(f"{p['device_id']}: {p['cause'] or p['outcome']}" for p in absent)
        or ("-" if record["state"] == "committed" else record["cause"]),
        _kib(sum(p["bytes_down"] for p in parts)),
        _kib(sum(p["bytes_up"] for p in parts)),
        f"{record['seconds']:.1f}",
    )


def _kib(size: int) -> str:
    return f"{size / _KIB:,.0f} KiB" if size else "-"
