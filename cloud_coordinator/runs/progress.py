"""What a run does right now, for people: kept in memory, since a crash makes all of it untrue."""

from dataclasses import dataclass
from datetime import datetime

_VERBS = {  # the stages of a round, and of its secure sums
    "train": "training",
    "evaluate": "evaluating",
    "statistics": "asking for statistics",
    "share": "dealing key shares",
    "mask": "sending masked vectors",
    "consent": "signing whose vectors are in the sum",
    "reveal": "revealing the shares that unmask the sum",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One moment of an active run. Times are aware UTC."""

    doing: str  # "starting", "waiting", a key of `_VERBS`, "exporting", "pausing"
    since: datetime
    until: datetime | None = None  # its deadline
    round_number: int | None = None
    joined: int = 0
    wanted: int = 0
    replied: int = 0
    asked: int = 0  # devices whose replies the stage waits for
    note: str = ""

    @property
    def sentence(self) -> str:
        """Say it as a person would."""
        match self.doing:
            case "waiting":
                missing = max(0, self.wanted - self.joined)
                devices = "device" if missing == 1 else "devices"
                return (
                    f"waiting for {missing} more {devices} ({self.joined} of {self.wanted} joined)"
                    f"{self._times()}"
                )
            case stage if verb := _VERBS.get(stage):
                return (
                    f"round {self.round_number}: {verb}, {self.replied} of {self.asked} "
                    f"replied{self._times()}"
                )
            case "exporting":
                return f"building the model version{self._noted()}{self._times()}"
            case "pausing":
                return f"starting again after {self.note}{self._times()}"
            case _:
                return f"{self.note or 'starting the worker'}{self._times()}"

    def _noted(self) -> str:
        return f" ({self.note})" if self.note else ""

    def _times(self) -> str:
        until = f", until {self.until:%H:%M:%S}" if self.until else ""
        return f", since {self.since:%H:%M:%S}{until} UTC"
