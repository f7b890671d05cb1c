"""What the demo shows: plain functions from API documents to rich tables.

With five agents every table fits a terminal of 80 columns; wider cells fold, and none is cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

_KIB = 1024.0


def partition_table(counts: Mapping[str, NDArray[np.int64]], names: Sequence[str]) -> Table:
    """Show how many images of each class each agent owns; ``counts`` are arrays of shape (k,)."""
    total = {agent: int(per_class.sum()) for agent, per_class in counts.items()}
    title = "Who owns what (Dirichlet 0.3: few classes dominate each agent)"
    if len(counts) > len(names):
        table = _table(title, left=("agent",), right=(*names, "total"))
        for agent, per_class in counts.items():
            table.add_row(agent, *map(str, per_class), str(total[agent]))
        return table
    table = _table(title, left=("",), right=tuple(counts))
    for index, name in enumerate(names):
        table.add_row(name, *(str(per_class[index]) for per_class in counts.values()))
    table.add_section()
    table.add_row("total", *map(str, total.values()), style="bold")
    return table


def rounds_table(run: Mapping[str, Any]) -> Table:
    """Show a run's rounds: quality on held-out rows, who took part and why others did not."""
    table = _table(f"Run {run['run_id']}: {_describe(run)}", right=("round", "loss", "accuracy"))
    _add_columns(table, left=("took part", "not"))
    _add_columns(table, right=("KiB down", "KiB up", "seconds"))
    for record in run["rounds"]:
        table.add_row(*_round_row(record))
    return table


def secrecy_words(run: Mapping[str, Any]) -> str:
    """Say what the coordinator saw of the agents' updates in a run whose rounds were all summed."""
    rounds = [record["secrecy"] for record in run["rounds"] if record["secrecy"]]
    survivors = [group["survivors"] for round_ in rounds for group in round_["groups"]]
    corrupted = max(group["corrupted"] for round_ in rounds for group in round_["groups"])
    upload = max(round_["bytes_up"] for round_ in rounds) / _KIB
    fewest, most = min(survivors), max(survivors)
    sizes = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"[green]✓[/] each round reached the coordinator only as a sum of {sizes} agents, exact,\n"
        f"  {upload:,.0f} KiB from each; {corrupted} of them in league with it would reveal no "
        "other.\n"
        "  Here the fleet key, which says who is an agent, lies beside the coordinator;\n"
        "  to guard against one that invents agents, keep it elsewhere (docs/privacy.md)."
    )


def variants_table(version: Mapping[str, Any]) -> Table:
    """Show every variant of a model version, its parity and speed; the shipped one is marked."""
    title = f"Model version {version['version'][:12]}: every variant, one is shipped"
    table = _table(title, left=("variant",), right=("bytes", "× smaller", "latency", "× fastest"))
    _add_columns(table, left=("parity", ""))
    full = next(v["size_bytes"] for v in version["variants"] if v["variant"] == "fp32")
    fastest = min(v["latency_p50_us"] for v in version["variants"] if v["passed"])
    judged = {v["variant"] for v in (version["judgement"] or {"variants": ()})["variants"]}
    for variant in version["variants"]:
        latency = variant["latency_p50_us"]  # null where the variant never ran
        right = variant["passed"] or variant["variant"] in judged
        table.add_row(
            variant["variant"],
            f"{variant['size_bytes']:,}" if variant["size_bytes"] else "-",
            f"{full / variant['size_bytes']:.2f}" if variant["size_bytes"] else "-",
            f"{latency:.0f} µs" if latency else "-",
            f"{latency / fastest:.2f}" if latency else "-",
            "passed" if right else f"failed: {variant['cause']}",
            "[bold green]shipped[/]" if variant["variant"] == version["ship"] else "",
        )
    return table


def judgement_table(judgement: Mapping[str, Any]) -> Table:
    """Show how each variant fared on the agents' own rows, and which gate held it back."""
    scores = {answer["feature"]: answer["values"] for answer in judgement["answers"]}
    mean = next(values["mean"] for values in scores.values() if "mean" in values)
    table = _table(
        f"Judged by {judgement['devices']} agents on held-out images, summed; against "
        f"{judgement['reference']}",
        left=("variant",),
        right=("accuracy", "worst\ntenth"),
    )
    _add_columns(table, left=("",))
    for judged in judgement["variants"]:
        values = scores[judged["variant"]]
        objections = [v for v in judged["verdicts"] if v["outcome"] != "pass"]
        table.add_row(
            judged["variant"],
            f"{mean + values.get('gain', 0.0):.2%}",
            f"{values['worst_decile']:.1%}",
            "; ".join(f"[yellow]{v['gate']}[/]: {v['words']}" for v in objections) or "passed",
        )
    return table


def rollout_table(rollout: Mapping[str, Any]) -> Table:
    """Show where each device of a rollout stands, wave by wave."""
    version, state = rollout["version"][:12], rollout["state"].replace("_", " ")
    title = f"Rolling out {version}\nwave {rollout['wave']} of {rollout['waves']}: {state}"
    table = _table(title, left=("agent",), right=("wave",))
    _add_columns(table, left=("standing", "cause"))
    for device in rollout["devices"]:
        table.add_row(device["device_id"], str(device["wave"]), device["standing"], device["cause"])
    return table


def rollback_words(rollout: Mapping[str, Any], serving: int, agents: int) -> str:
    """Say which gate turned a version back, and that the one before is served."""
    canary = ", ".join(device["device_id"] for device in rollout["devices"])
    return (
        f"[green]✓[/] {canary} tried it, alone. Gate [bold]{rollout['gate']}[/]: "
        f"{rollout['cause']}.\n"
        f"  It was turned back by itself; {serving} of {agents} agents serve the version before."
    )


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the end of the loop: one row per agent, measured at its own endpoint."""
    title = "The same test images, sent to every agent's own endpoint: accuracy"
    table = _table(title, left=("agent",), right=("before", "after"))
    _add_columns(table, left=("serving\n(reported)", "digest"))
    _add_columns(table, right=("KiB, fp32\n→ shipped", "p50 ms"))
    for row in rows:
        table.add_row(
            row["agent"],
            f"{row['before']:.2%}",
            f"[bold green]{row['after']:.2%}[/]",
            row["serving"][:12],
            "verified" if row["serving"] == row["wanted"] else "[red]another[/]",
            f"{row['full_bytes'] / _KIB:,.0f} → {row['shipped_bytes'] / _KIB:,.0f}",
            f"{row['p50_ms']:.2f}",
        )
    return table


def _table(title: str, *, left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    table = Table(title=title)
    _add_columns(table, left=left, right=right)
    return table


def _add_columns(table: Table, *, left: Sequence[str] = (), right: Sequence[str] = ()) -> None:
    """Add columns of words, then columns of numbers."""
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")


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
        _present(parts),
        "; ".join(f"{p['device_id']}: {p['cause'] or p['outcome']}" for p in absent)
        or ("-" if record["state"] == "committed" else record["cause"]),
        _kib(sum(p["bytes_down"] for p in parts)),
        _kib(sum(p["bytes_up"] for p in parts)),
        f"{record['seconds']:.1f}",
    )


def _present(parts: Sequence[Mapping[str, Any]]) -> str:
    """Name who took part; where all who were asked did, their number says it."""
    present = sorted(p["device_id"] for p in parts if p["outcome"] == "replied")
    if present and len(present) == len(parts):
        return f"all {len(present)}"
    return " ".join(present) or "-"


def _kib(size: int) -> str:
    return f"{size / _KIB:,.0f}" if size else "-"
