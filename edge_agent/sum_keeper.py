"""Keeps secure sums in memory between messages, where each message has a process of its own.

A stock SuperNode starts a process for every message, and Flower's simulation engine hands a node's
messages to any of its workers. The secrets of a session must live from its first stage to its last,
and rest neither on disk nor in Flower's `Context`, which the SuperNode stores. So the first message
starts a keeper: a small process of the same user, without torch and Flower, that holds `SecureSums`
and is spoken to over a Unix socket. It ends by itself when no session can be open any more. Our own
trainer is one process for a whole run and needs none.

The socket lies in a folder of its own that only this user may enter, since paths of sockets are
short; a file in the home says where. Messages are MessagePack behind eight bytes of length.
"""

import argparse
import contextlib
import fcntl
import logging
import shutil
import signal
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

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
from edge_agent.secure_sums import OpenSum, SecureSums
from shared.errors import PeerError, ShoalError
from shared.files import write_private
from shared.logs import configure_logging
from shared.messages import utc_now
from shared.secure_sum.config import encode_config
from shared.secure_sum.masking import Lanes

logger = logging.getLogger(__name__)

PLACE_FILE = "sum-keeper.json"
_LOCK_FILE = "sum-keeper.lock"
_IDLE = timedelta(minutes=2)  # after the last call, where no session is open
_LOOK_EVERY_S = 5.0


class Keeper:
    """The sums of one or several homes, and the sessions that were opened."""

    def __init__(self, *, now: Callable[[], datetime] = utc_now) -> None:
        self._now = now
        self._sums: dict[str, SecureSums] = {}
        self._opened: dict[bytes, OpenSum] = {}
        self._lock = threading.Lock()
        self._used_at = now()
        self._calls = 0

    def answer(self, call: Calls) -> Replies:
        """Do what is asked; an error of ours is an answer too."""
        with self._lock:
            self._calls += 1
        try:
            return self._do(call)
        except ShoalError as error:
            return Failed(type(error).__name__, str(error))
        finally:
            with self._lock:
                self._calls -= 1
                self._used_at = self._now()

    def is_needed(self) -> bool:
        """Whether somebody may come back: a session is open, or the last call was just now."""
        with self._lock:
            now = self._now()
            for session, opened in list(self._opened.items()):
                if opened.config.expires_at <= now:
                    del self._opened[session]
            return bool(self._calls or self._opened) or now < self._used_at + _IDLE

    def close(self) -> None:
        """Wipe all secrets."""
        with self._lock:
            for sums in self._sums.values():
                sums.close()
            self._sums.clear()
            self._opened.clear()

    def _do(self, call: Calls) -> Replies:
        sums = self._sums_in(call.home)
        match call:
            case Open():
                opened = sums.open(
                    call.sealed_config,
                    task_digest=call.task_digest,
                    question_digest=call.question_digest,
                    base_digest=call.base_digest,
                    data=call.data,
                )
                self._opened[opened.config.session] = opened
                return Opened(encode_config(opened.config), opened.config_digest)
            case Advertise(vector=vector):
                read = None if vector is None else vector.read()
                return Said(sums.advertise(self._opened_as(call.session), read, call.exact))
            case Decline():
                return Said(sums.decline(self._opened_as(call.session), call.reason))
            case Mask():
                return _masked(*sums.mask(call.session, call.question))
            case Answer():
                return Said(sums.answer(call.session, call.stage, call.question))
            case Stop():
                return Said()

    def _sums_in(self, home: str) -> SecureSums:
        with self._lock:
            if home not in self._sums:
                self._sums[home] = SecureSums(Path(home), now=self._now)
            return self._sums[home]

    def _opened_as(self, session: bytes) -> OpenSum:
        try:
            return self._opened[session]
        except KeyError as error:
            raise PeerError("no such session was opened on this device") from error


def _masked(answer: bytes, lanes: Lanes | None) -> Said:
    if lanes is None:
        return Said(answer)
    return Said(answer, Array.of(lanes.main), Array.of(lanes.exact))


def main() -> None:
    """Keep the sums of the folder that the first argument names, until nobody needs them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    configure_logging("INFO")
    with _only_keeper_of(folder) as alone:
        if alone:
            keep(folder)


def keep(folder: Path) -> None:
    """Serve until told to stop, or until nobody needs what is kept."""
    keeper, stop = Keeper(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    entrance = Path(tempfile.mkdtemp(prefix="shoal-"))  # mode 0700
    try:
        with _Server(str(entrance / "sums"), keeper, stop) as server:
            serving = threading.Thread(target=server.serve_forever, name="keeper", daemon=True)
            serving.start()
            write_private(folder / PLACE_FILE, msgspec.json.encode(str(entrance / "sums")))
            while not stop.wait(_LOOK_EVERY_S) and keeper.is_needed() and folder.is_dir():
                pass
            (folder / PLACE_FILE).unlink(missing_ok=True)
            server.shutdown()
    finally:
        keeper.close()
        shutil.rmtree(entrance, ignore_errors=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, keeper: Keeper, stop: threading.Event) -> None:
        self.keeper, self.stop = keeper, stop
        super().__init__(path, _Handler)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        """Answer one call."""
        try:
            call = receive(self.request, Calls)
            send(self.request, self._answer(call))
        except (OSError, PeerError) as error:
            logger.warning("a call was not answered: %s", error)
            return
        if isinstance(call, Stop):
            self.server.stop.set()

    def _answer(self, call: Calls) -> Replies:
        try:
            return self.server.keeper.answer(call)
        except Exception:  # the keeper must outlive one bad call
            logger.exception("a call failed")
            return Failed("UnavailableError", "the keeper of secure sums failed; see its log")


@contextlib.contextmanager
def _only_keeper_of(folder: Path) -> Iterator[bool]:
    """Yield whether no other process keeps the folder's sums; this one then does."""
    with (folder / _LOCK_FILE).open("ab") as file:
        (folder / _LOCK_FILE).chmod(0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


if __name__ == "__main__":
    main()
