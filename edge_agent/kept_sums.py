"""The secure sums that a keeper holds, as the process of one message sees them."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from numpy.typing import NDArray

from edge_agent.keeper_messages import (
    Advertise,
    Answer,
    Array,
    Calls,
    Decline,
    Failed,
    Mask,
    Open,
    Opened,
    Replies,
    Said,
    Stop,
    receive,
    send,
)
from edge_agent.privacy.sources import DataUse, Part
from edge_agent.secure_sums import OpenSum, SecureSums
from edge_agent.sum_keeper import PLACE_FILE
from shared.errors import (
    ConfigError,
    DataError,
    PeerError,
    PolicyError,
    ShoalError,
    UnavailableError,
)
from shared.files import make_folder
from shared.secure_sum.config import decode_config
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import Stage

T = TypeVar("T")
_START_DEADLINE_S = 30.0
_CALL_DEADLINE_S = 600.0  # masks of a large model among 256 devices take minutes on a small device
_POLL_S = 0.05
_ERRORS = {
    error.__name__: error
    for error in (ConfigError, DataError, PeerError, PolicyError, UnavailableError)
}
_started: dict[Path, subprocess.Popen[bytes]] = {}  # by this process


class KeptSums:
    """Stands in for the `SecureSums` that a keeper holds; what needs no secrets is done here."""

    def __init__(self, home: Path, *, keeper: Path | None = None) -> None:
        """Describe; nothing is started yet.

        Args:
            home: the agent's state folder.
            keeper: folder of the keeper; several homes may share one. By default the home.
        """
        self._home, self._keeper = home, keeper or home

    def data_use(self, *, name: str, path: str, digest: str, part: Part) -> DataUse:
        """See `SecureSums.data_use`."""
        with SecureSums(self._home) as sums:
            return sums.data_use(name=name, path=path, digest=digest, part=part)

    def allow_plain_update(self, run_id: str, round_number: int, data: DataUse) -> None:
        """See `SecureSums.allow_plain_update`."""
        with SecureSums(self._home) as sums:
            sums.allow_plain_update(run_id, round_number, data)

    def open(
        self,
        sealed_config: bytes,
        *,
        task_digest: str,
        question_digest: str,
        base_digest: str | None,
        data: DataUse,
    ) -> OpenSum:
        """See `SecureSums.open`; the members stay with the keeper."""
        call = Open(
            home=str(self._home),
            sealed_config=sealed_config,
            task_digest=task_digest,
            question_digest=question_digest,
            base_digest=base_digest,
            data=data,
        )
        opened = self._ask(call, Opened)
        return OpenSum(decode_config(opened.config), opened.config_digest, data, members={})

    def advertise(
        self, opened: OpenSum, vector: NDArray[Any] | None, exact: Mapping[str, float]
    ) -> bytes:
        """See `SecureSums.advertise`."""
        array = None if vector is None else Array.of(vector)
        session = opened.config.session
        call = Advertise(home=str(self._home), session=session, vector=array, exact=dict(exact))
        return self._ask(call, Said).answer

    def decline(self, opened: OpenSum, reason: str) -> bytes:
        """See `SecureSums.decline`."""
        session = opened.config.session
        return self._ask(Decline(home=str(self._home), session=session, reason=reason), Said).answer

    def answer(self, session: bytes, stage: Stage, question: bytes) -> bytes:
        """See `SecureSums.answer`."""
        call = Answer(home=str(self._home), session=session, stage=stage, question=question)
        return self._ask(call, Said).answer

    def mask(self, session: bytes, question: bytes) -> tuple[bytes, Lanes | None]:
        """See `SecureSums.mask`."""
        said = self._ask(Mask(home=str(self._home), session=session, question=question), Said)
        if said.main is None or said.exact is None:
            return said.answer, None
        return said.answer, Lanes(said.main.read(), said.exact.read())

    def _ask(self, call: Calls, kind: type[T]) -> T:
        with _connected(self._keeper, start=True) as connection:
            reply = _exchange(connection, call)
        if isinstance(reply, Failed):
            raise _ERRORS.get(reply.kind, ShoalError)(reply.message)
        assert isinstance(reply, kind)
        return reply


def stop_keeper(folder: Path) -> None:
    """End the keeper of ``folder``, if there is one; what it held is lost."""
    with contextlib.suppress(UnavailableError), _connected(folder, start=False) as connection:
        _exchange(connection, Stop(home=str(folder)))


def _exchange(connection: socket.socket, call: Calls) -> Replies:
    try:
        send(connection, call)
        reply: Replies = receive(connection, Replies)
    except OSError as error:
        raise UnavailableError(f"the keeper of secure sums went away: {error}") from error
    return reply


@contextlib.contextmanager
def _connected(folder: Path, *, start: bool) -> Iterator[socket.socket]:
    deadline = time.monotonic() + _START_DEADLINE_S
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_CALL_DEADLINE_S)
        while not _connects(connection, folder):
            if not start or time.monotonic() > deadline:
                raise UnavailableError(
                    f"the keeper of secure sums did not start; see {_log_of(folder)}"
                )
            _start(folder)
            time.sleep(_POLL_S)
        yield connection


def _connects(connection: socket.socket, folder: Path) -> bool:
    try:
        connection.connect(_place(folder))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def _place(folder: Path) -> str:
    return str(msgspec.json.decode((folder / PLACE_FILE).read_bytes(), type=str))


def _log_of(folder: Path) -> Path:
    return folder / "logs" / "sum-keeper.log"


def _start(folder: Path) -> None:
    """Start a keeper; if there is another one after all, ours ends by itself."""
    if (before := _started.get(folder)) and before.poll() is None:
        return
    make_folder(_log_of(folder).parent)
    with _log_of(folder).open("ab") as log:
        _started[folder] = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.sum_keeper", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # it outlives this message's process
        )
