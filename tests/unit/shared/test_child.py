"""Parent and child over their pipes, with real processes at both ends."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from shared.child import Child
from shared.errors import PeerError, UnavailableError

TIME_LIMIT_S = 20.0
ECHO = """
import sys
import msgspec
from shared.child import ParentLink, die_with_parent

class Word(msgspec.Struct, tag="word"):
    text: str

die_with_parent()
link = ParentLink(Word)
print("what a library prints must not reach the parent", flush=True)
while (word := link.incoming.get(timeout=20)) is not None:
    link.send(word)
"""
CHATTERBOX = """
import sys
sys.stdout.write("x" * 5_000_000)
"""
LEAVER = """
import os, signal
from pathlib import Path
from shared.child import ParentLink
import msgspec

class Word(msgspec.Struct, tag="word"):
    text: str

signal.signal(signal.SIGTERM, signal.SIG_IGN)
link = ParentLink(Word)
link.send(Word("here"))
assert link.incoming.get(timeout=20) is None
for _ in range(2):
    link.send(Word("to nobody"))
Path(os.environ["MARK"]).write_text("ended in order")
"""


class Word(msgspec.Struct, tag="word"):
    text: str


class Number(msgspec.Struct, tag="number"):
    value: int


@contextlib.asynccontextmanager
async def running(program: str, folder: Path, **env: str) -> AsyncIterator[Child]:
    child = await Child.start(
        [sys.executable, "-c", program], name="child", log_path=folder / "child.log", env=env
    )
    try:
        yield child
    finally:
        await child.stop(timeout_s=5)


async def hear(child: Child) -> object:
    return await asyncio.wait_for(anext(child.messages(Word)), TIME_LIMIT_S)


async def test_messages_go_both_ways_and_prints_go_to_the_log(tmp_path: Path) -> None:
    async with running(ECHO, tmp_path) as child:
        await child.send(Word("hello"))
        assert await hear(child) == Word("hello")
        assert "what a library prints" in child.log_tail()


async def test_a_child_ends_when_its_parent_says_what_it_does_not_know(tmp_path: Path) -> None:
    async with running(ECHO, tmp_path) as child:
        await child.send(Number(1))
        assert await asyncio.wait_for(child.wait(), TIME_LIMIT_S) == 0
        assert "cannot be understood" in child.log_tail()


async def test_a_line_without_end_is_the_childs_fault(tmp_path: Path) -> None:
    async with running(CHATTERBOX, tmp_path) as child:
        with pytest.raises(PeerError, match="child said too much in one line"):
            await hear(child)


async def test_a_child_that_speaks_after_its_parent_left_still_ends_in_order(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "mark"
    async with running(LEAVER, tmp_path, MARK=str(mark)) as child:
        assert await hear(child) == Word("here")
        transport = child._process._transport  # type: ignore[attr-defined]
        for number in (0, 1):
            transport.get_pipe_transport(number).close()
        await asyncio.wait_for(child.wait(), TIME_LIMIT_S)
    assert mark.read_text() == "ended in order"


async def test_a_child_that_ignores_every_request_is_killed(tmp_path: Path) -> None:
    program = LEAVER.replace("assert link.incoming.get(timeout=20) is None", "signal.pause()")
    async with running(program, tmp_path) as child:
        assert await hear(child) == Word("here")
        await child.stop(timeout_s=0.1)
        assert child.returncode == -9


async def test_a_program_that_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot start child"):
        await Child.start(["/nowhere/x"], name="child", log_path=tmp_path / "log")


async def test_a_large_log_makes_way_and_one_old_one_is_kept(tmp_path: Path) -> None:
    log, old = tmp_path / "child.log", tmp_path / "child.old"
    old.write_text("from long ago")
    with log.open("wb") as file:
        file.truncate(11 * 1024 * 1024)

    for words in ("first", "second"):
        speak = f"import sys; sys.stderr.write({words!r})"
        child = await Child.start([sys.executable, "-c", speak], name="child", log_path=log)
        await asyncio.wait_for(child.wait(), TIME_LIMIT_S)

    assert log.read_text() == "firstsecond"
    assert old.stat().st_size == 11 * 1024 * 1024


async def test_a_log_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("not a folder")

    with pytest.raises(UnavailableError, match=r"cannot write to .*logs: .*; check the path"):
        await Child.start(["true"], name="child", log_path=tmp_path / "logs" / "child.log")
