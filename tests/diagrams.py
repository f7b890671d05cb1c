"""Draws a lifecycle's table as a Mermaid diagram; pages show what this returns."""

from collections.abc import Mapping
from enum import StrEnum


def draw(transitions: Mapping[StrEnum, Mapping[StrEnum, StrEnum]]) -> str:
    """Return the diagram as the page has it, with its fences; the first state is the first one."""
    states = list(transitions)
    lines = [f"    [*] --> {states[0].value}"]
    for state, events in transitions.items():
        lines += [
            f"    {state.value} --> {to.value}: {event.value}" for event, to in events.items()
        ]
        if not events:
            lines.append(f"    {state.value} --> [*]")
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])
