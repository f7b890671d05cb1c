"""A run worker that trains nothing and misbehaves on request; speaks the real messages.

Requests are files in the folder given as the only argument: ``hold-N`` keeps round N open,
``crash-N`` ends the process in round N (once), ``crash-always`` at the start, ``fail`` ends the
run, ``babble`` breaks the protocol (once), ``sum`` asks the cohort one question of a secure sum and
keeps what came back as ``signed`` and ``answers``. Parameters of round N are a digest over those
of round N-1, so the last ones show that every round was trained once, on top of the one before.
"""

import hashlib
import os
import queue
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    ConfigsSigned,
    DeviceAnswered,
    DeviceJoined,
    DeviceLeft,
    NudgeDevices,
    Participation,
    ReplyWaits,
    RoundClosed,
    RoundProgress,
    RoundRecord,
    RoundSaved,
    RoundStarted,
    RunFailed,
    RunFinished,
    SignConfigs,
    StartRun,
    StopRun,
    ToWorker,
    WaitingForDevices,
    WorkerReady,
)
from shared.child import ParentLink, die_with_parent

DEADLINE = timedelta(seconds=60)
POLL_S = 0.05


def parameters_after(rounds: int) -> bytes:
    """What an undisturbed run ends with."""
    content = b"initial"
    for number in range(1, rounds + 1):
        content = hashlib.sha256(content + str(number).encode()).digest()
    return content


class Worker:
    def __init__(self, requests: Path) -> None:
        self.requests = requests
        self.link: ParentLink[ToWorker] = ParentLink(ToWorker)
        start = self.link.incoming.get(timeout=DEADLINE.total_seconds())
        assert isinstance(start, StartRun)
        self.start = start
        self.blobs = BlobStore(Path(start.blobs))
        self.joined: set[str] = set()
        self.awaited: set[str] = set()  # who was asked in this round, and has not left since
        self.replies: list[str] = []
        self.signed: tuple[bytes, ...] = ()
        self.answers: dict[str, bytes] = {}
        self.saved = -1
        (requests / "starts").open("a").write(f"{start.session_id} {start.next_round}\n")

    def run(self) -> int:
        if self.asked("crash-always"):
            return 3
        self.link.send(WorkerReady())
        if self.asked("fail"):
            self.link.send(RunFailed("the plan asks for the impossible"))
            return 1
        if self.take("babble"):
            self.link.send(ReplyWaits("not for a coordinator"))
            self.read_for_ever()
        if self.start.resume is None:
            self.close(self.record(0, self.blobs.put(b"initial"), ()))
        for number in range(self.start.next_round, self.start.plan.rounds + 1):
            self.one_round(number)
        self.link.send(RunFinished())
        return 0

    def one_round(self, number: int) -> None:
        self.await_devices()
        cohort = tuple(sorted(self.joined))
        self.awaited = set(cohort)
        self.link.send(
            RoundStarted(round_number=number, cohort=cohort, deadline_at=self.now() + DEADLINE)
        )
        self.link.send(NudgeDevices(cohort))
        if self.take(f"crash-{number}"):
            os._exit(3)
        while self.asked(f"hold-{number}") or len(self.replies) < len(self.awaited):
            self.read(POLL_S)
        self.replies.clear()
        if self.take("sum"):
            self.one_sum(cohort)
        self.link.send(
            RoundProgress(
                round_number=number, stage="train", replied=len(cohort), cohort=len(cohort)
            )
        )
        before = self.blobs.read(self.last_parameters)
        after = hashlib.sha256(before + str(number).encode()).digest()
        self.close(self.record(number, self.blobs.put(after), cohort))

    def one_sum(self, cohort: tuple[str, ...]) -> None:
        self.link.send(SignConfigs((b"what it is about",)))
        ask = AskDevices(
            device_ids=cohort,
            session=b"s" * 32,
            stage="share",
            question=b"who takes part",
            deadline_at=self.now() + DEADLINE,
        )
        self.link.send(ask)
        while not self.signed or len(self.answers) < len(cohort):
            self.read(POLL_S)
        (self.requests / "signed").write_bytes(self.signed[0])
        (self.requests / "answers").write_bytes(msgspec.json.encode(self.answers))

    def await_devices(self) -> None:
        wanted = self.start.plan.cohort.quorum
        until = self.now() + DEADLINE
        told = None
        while len(self.joined) < wanted:
            if told != len(self.joined):
                told = len(self.joined)
                self.link.send(WaitingForDevices(joined=told, wanted=wanted, until=until))
            self.read(POLL_S)

    def close(self, record: RoundRecord) -> None:
        self.link.send(RoundClosed(record))
        while self.saved < record.round_number:
            self.read(POLL_S)
        self.last = record.parameters_sha256

    @property
    def last_parameters(self) -> str:
        last = getattr(self, "last", None)
        if last is None:
            assert self.start.resume is not None
            return self.start.resume.parameters_sha256
        return str(last)

    def record(self, number: int, digest: str, cohort: tuple[str, ...]) -> RoundRecord:
        return RoundRecord(
            round_number=number,
            state="committed",
            started_at=self.now(),
            closed_at=self.now(),
            participations=tuple(
                Participation(
                    device_id=device,
                    outcome="replied" if device in self.joined else "dropped",
                    cause="" if device in self.joined else "left",
                    num_examples=10,
                    seconds=0.1,
                    bytes_down=4,
                    bytes_up=4,
                )
                for device in cohort
            ),
            metrics={"loss": 1.0 / (number + 1)},
            parameters_sha256=digest,
        )

    def read(self, timeout_s: float) -> None:
        try:
            message = self.link.incoming.get(timeout=timeout_s)
        except queue.Empty:
            return
        match message:
            case DeviceJoined(device_id=device_id, identity_key=key):
                self.joined.add(device_id)
                assert key or self.start.plan.privacy.mode == "plain"
            case ConfigsSigned(sealed):
                self.signed = sealed
            case DeviceAnswered(device_id, answer):
                self.answers[device_id] = answer
            case DeviceLeft(device_id=device_id):
                self.joined.discard(device_id)
                self.awaited.discard(device_id)
            case ReplyWaits(message_id=message_id):
                self.replies.append(message_id)
            case RoundSaved(round_number=number):
                self.saved = number
            case StopRun() | None:
                sys.exit(0)

    def read_for_ever(self) -> None:
        while True:
            self.read(POLL_S)

    def asked(self, name: str) -> bool:
        return (self.requests / name).exists()

    def take(self, name: str) -> bool:
        if not self.asked(name):
            return False
        (self.requests / name).unlink()
        return True

    @staticmethod
    def now() -> datetime:
        return datetime.now(UTC)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(Worker(Path(sys.argv[1])).run())
