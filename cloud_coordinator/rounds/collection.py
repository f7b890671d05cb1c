"""Who was asked one question and what became of each device. Pure: times are handed in.

A question is "train", "evaluate" or a stage of a secure sum; times are seconds on a clock that
never jumps. Sums that are made side by side have a collection each (`SideBySide`).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cloud_coordinator.rounds.worker_messages import Outcome, Participation


@dataclass(frozen=True, slots=True)
class Leftover:
    """A message of a closed round that was not answered."""

    device_id: str
    busy_until_s: float  # the device may be working on it until then
    expires_s: float  # no answer can come any more


TTL_MARGIN_S = 5.0  # messages outlive their deadline a little, so that our clock decides
WAVE = 32  # devices that may be busy at once, so that the SuperLink never holds more uploads
SHORTEST_PATIENCE_S = 2.0  # once plenty have replied, the others are waited for so long,
PATIENCE = 3.0  # or so many times as long as plenty took


class Collection:
    """Bookkeeping from push to close; every device ends with exactly one `Participation`."""

    def __init__(
        self,
        cohort: Sequence[str],
        message_ids: Mapping[str, str],
        *,
        wanted: int,
        needed: int,
        started_s: float,
        deadline_s: float,
        bytes_down: int,
        plenty: int | None = None,
        enough: Callable[[], bool] = lambda: False,
        wave: int = WAVE,
    ) -> None:
        """Begin when the messages are pushed.

        Args:
            cohort: the devices, in the order in which they are nudged.
            message_ids: by device; the SuperLink refused the message of one that is missing.
            wanted: so many replies are enough.
            needed: with fewer the question was asked in vain.
            started_s: when the messages were pushed.
            deadline_s: when nobody waits any longer.
            bytes_down: what one device downloads.
            plenty: once so many replied, the others are given up sooner than at the deadline.
            enough: says that what came is all that is needed, whoever it came from.
            wave: devices that are nudged at once.
        """
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.wanted = wanted
        self.replied = 0
        self._needed = needed
        self._bytes_down = bytes_down
        self._plenty, self._enough, self._wave = plenty, enough, wave
        self._expires_s = deadline_s + TTL_MARGIN_S
        self._pending = {message_ids[d]: d for d in cohort if d in message_ids}
        self._unnudged = [message_ids[d] for d in cohort if d in message_ids]
        self._nudged_at: dict[str, float] = {}
        # A dead device gives its place in the wave away in time for all to be nudged.
        self._place_s = (deadline_s - started_s) / max(1, math.ceil(len(cohort) / wave))
        self._left: dict[str, str] = {}  # messages of devices that left
        self._results: dict[str, Participation] = {}
        for device in cohort:
            if device not in message_ids:
                self._settle(device, "failed", cause="the SuperLink refused its message")

    @property
    def pending(self) -> Mapping[str, str]:
        """Messages without a result, and whose they are."""
        return self._pending

    @property
    def devices_replied(self) -> tuple[str, ...]:
        """Devices whose reply counts."""
        return tuple(d for d, result in self._results.items() if result.outcome == "replied")

    def nudge(self, now_s: float) -> tuple[str, ...]:
        """Return the devices to nudge now, once each."""
        if not self._unnudged:
            return ()
        free = self._wave - sum(
            now_s - at < self._place_s
            for message_id, at in self._nudged_at.items()
            if message_id in self._pending
        )
        wave, self._unnudged = self._unnudged[: max(0, free)], self._unnudged[max(0, free) :]
        self._nudged_at.update(dict.fromkeys(wave, now_s))
        return tuple(self._pending[m] for m in wave if m in self._pending)

    def patience_s(self, now_s: float) -> float:
        """Return how long nothing is due of itself: until the deadline or the next nudge."""
        due = self.deadline_s
        if self._unnudged and self._nudged_at:
            due = min(due, min(self._nudged_at.values()) + self._place_s)
        return max(0.0, due - now_s)

    def count(self, message_id: str, *, num_examples: int, bytes_up: int, now_s: float) -> None:
        """Note that the device's reply was used."""
        self.replied += 1
        if self.replied == self._plenty:
            took_s = now_s - self.started_s
            patience_s = max(SHORTEST_PATIENCE_S, PATIENCE * took_s)
            self.deadline_s = min(self.deadline_s, now_s + patience_s)
        self._settle(
            self._pending.pop(message_id),
            "replied",
            num_examples=num_examples,
            seconds=now_s - self.started_s,
            bytes_up=bytes_up,
        )

    def fail(self, message_id: str, cause: str, *, gone: bool, bytes_up: int = 0) -> None:
        """Note that no usable reply will come, and why."""
        outcome: Outcome = "dropped" if gone else "failed"
        self._settle(self._pending.pop(message_id), outcome, cause=cause, bytes_up=bytes_up)

    def leave(self, device_id: str, cause: str) -> None:
        """Count a device out that left; one that has replied stays counted."""
        for message_id in [m for m, device in self._pending.items() if device == device_id]:
            self.fail(message_id, cause, gone=True)
            self._left[message_id] = device_id

    def is_over(self, now_s: float) -> bool:
        """Say whether waiting longer could change anything, or nobody may wait any longer."""
        return self.is_settled or now_s >= self.deadline_s

    @property
    def has_plenty(self) -> bool:
        """Say whether so many replied that nobody who is away needs to be waited for."""
        return self._plenty is not None and self.replied >= self._plenty

    @property
    def is_settled(self) -> bool:
        """Say whether no reply could change anything any more."""
        return (
            self.replied >= self.wanted
            or not self._pending
            or self.replied + len(self._pending) < self._needed
            or self._enough()
        )

    def close(self, now_s: float) -> tuple[Participation, ...]:
        """Return every device's part; those that are still out are late or not needed."""
        for device in self._pending.values():
            if now_s >= self.deadline_s:
                waited = self.deadline_s - self.started_s
                self._settle(device, "late", cause=f"no reply within {waited:.0f} s")
            else:
                self._settle(device, "not-needed", cause="the round closed without it")
        return tuple(self._results.values())

    def leftovers(self, now_s: float) -> Mapping[str, Leftover]:
        """Return the messages that were not answered, by id; devices that left do not work."""
        expires_s = self._expires_s
        busy = {m: Leftover(d, self.deadline_s, expires_s) for m, d in self._pending.items()}
        return busy | {m: Leftover(d, now_s, expires_s) for m, d in self._left.items()}

    def _settle(
        self,
        device: str,
        outcome: Outcome,
        *,
        cause: str = "",
        num_examples: int = 0,
        seconds: float | None = None,
        bytes_up: int = 0,
    ) -> None:
        self._results[device] = Participation(
            device_id=device,
            outcome=outcome,
            cause=cause,
            num_examples=num_examples,
            seconds=seconds,
            bytes_down=self._bytes_down,
            bytes_up=bytes_up,
        )


class SideBySide:
    """Several collections of one question, each of devices of its own, as one."""

    def __init__(self, parts: Sequence[Collection]) -> None:
        self.parts = parts

    @property
    def pending(self) -> Mapping[str, str]:
        """Messages whose reply would still count, and whose they are."""
        open_parts = [part.pending for part in self.parts if not part.is_settled]
        if len(open_parts) == 1:  # not copied: it is asked for with every message
            return open_parts[0]
        return {m: device for pending in open_parts for m, device in pending.items()}

    @property
    def started_s(self) -> float:
        """When the first was asked."""
        return min(part.started_s for part in self.parts)

    @property
    def wanted(self) -> int:
        """So many replies are enough."""
        return sum(part.wanted for part in self.parts)

    @property
    def replied(self) -> int:
        """Replies that count."""
        return sum(part.replied for part in self.parts)

    def nudge(self, now_s: float) -> tuple[str, ...]:
        """Return the devices to nudge now, once each."""
        return tuple(itertools.chain.from_iterable(part.nudge(now_s) for part in self.parts))

    def patience_s(self, now_s: float) -> float:
        """Return how long nothing is due of itself."""
        waits = [part.patience_s(now_s) for part in self.parts if not part.is_over(now_s)]
        return min(waits, default=0.0)

    def count(self, message_id: str, *, num_examples: int, bytes_up: int, now_s: float) -> None:
        """Note that the device's reply was used."""
        part = self._part_of(message_id)
        part.count(message_id, num_examples=num_examples, bytes_up=bytes_up, now_s=now_s)

    def fail(self, message_id: str, cause: str, *, gone: bool, bytes_up: int = 0) -> None:
        """Note that no usable reply will come, and why."""
        self._part_of(message_id).fail(message_id, cause, gone=gone, bytes_up=bytes_up)

    def leave(self, device_id: str, cause: str) -> None:
        """Count a device out that left."""
        for part in self.parts:
            part.leave(device_id, cause)

    def is_over(self, now_s: float) -> bool:
        """Say whether all are over."""
        return all(part.is_over(now_s) for part in self.parts)

    def leftovers(self, now_s: float) -> Mapping[str, Leftover]:
        """Return the messages that were not answered, by id."""
        return {m: left for part in self.parts for m, left in part.leftovers(now_s).items()}

    def _part_of(self, message_id: str) -> Collection:
        return next(part for part in self.parts if message_id in part.pending)
